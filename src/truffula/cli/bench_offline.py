"""The child of ``bench serve --against-llm``: reads a job on standard input, prints one JSON line of summaries."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from truffula.cli.bench_load import Load, Measured


def main() -> None:
    from truffula import LLM

    job = json.load(sys.stdin)
    options = {name: value for name, value in job["config"].items() if value is not None}
    with LLM(options.pop("model"), adapters=job["adapters"], **options) as llm:
        runs = [_run(llm, Load(**{**load, "adapters": tuple(load["adapters"])})) for load in job["loads"]]
    sys.stdout.write(json.dumps(runs) + "\n")


def _run(llm: Any, load: Load) -> dict[str, Any]:
    """All requests of a closed loop of one round at once: what ``LLM.generate`` is for."""
    from truffula import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=load.max_tokens, ignore_eos=True)
    measured = Measured()
    for request in range(load.requests):
        prompts = [load.prompt(client, request) for client in range(load.clients)]
        begun = time.monotonic()
        outputs = llm.generate(prompts, params, adapters=[load.adapter(client) for client in range(load.clients)])
        measured.wall_s += time.monotonic() - begun
        measured.output_tokens += sum(len(output.token_ids) for output in outputs)
        measured.prompt_tokens += sum(len(prompt) for prompt in prompts)
        measured.cached_tokens += sum(output.cached_tokens for output in outputs)
    return measured.summary()


if __name__ == "__main__":
    main()
