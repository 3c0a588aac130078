"""The child of ``bench serve --against-llm``: reads a job on standard input, prints one JSON line of summaries."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from truffula.bench.load import Load
from truffula.bench.measured import Measured, Stream


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
        adapters = [load.adapter(client, request) for client in range(load.clients)]
        begun = time.monotonic()
        outputs = llm.generate(prompts, params, adapters=adapters)
        measured.wall_s += time.monotonic() - begun
        for prompt, output in zip(prompts, outputs, strict=True):
            stream = Stream(begun, begun, [], len(output.token_ids), len(prompt), output.cached_tokens)
            measured.streams.append(stream)
    return measured.summary()


if __name__ == "__main__":
    main()
