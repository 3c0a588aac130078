"""The parity table of adapters: each kind that PEFT saves × each way to be served, against peft.

``make parity-adapters`` prints it, and the table of refusals. Rows: ``parity_kinds.KINDS``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
if __name__ == "__main__":
    for place in sorted({path.parent for path in HERE.parent.rglob("*.py")}):
        sys.path.insert(0, str(place))

import numpy as np  # noqa: E402
import transformers  # noqa: E402
from folder_loader import FolderLoader  # noqa: E402
from parity import SOME_TOKENS, ParityModel, parity_model  # noqa: E402
from parity_kinds import KINDS as LORA_KINDS  # noqa: E402
from parity_kinds import Kind  # noqa: E402
from parity_methods import KINDS as OTHER_KINDS  # noqa: E402
from quantised_files import Fixture, as_model, write_folder  # noqa: E402
from rig import Rig  # noqa: E402

from truffula.lora.image import AdapterFacts, KvPrefix  # noqa: E402
from truffula.lora.refused import REFUSED as OTHER_METHODS  # noqa: E402
from truffula.testing.programs import Driver  # noqa: E402
from truffula.testing.tiny import tiny_config, write_tiny_checkpoint  # noqa: E402
from truffula.weights.open import open_checkpoint  # noqa: E402

FAMILIES: Mapping[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "num_hidden_layers": 2, "head_dim": 14, "vocab_size": 97},
    "qwen2": {"num_hidden_layers": 2, "vocab_size": 83},
    "gemma3_text": {"num_hidden_layers": 2, "vocab_size": 73},
    "qwen3_5_text": {},
    "gpt2": {"n_layer": 2, "vocab_size": 89},
    "mixtral": {"num_hidden_layers": 2},
    "deepseek_v3": {"num_hidden_layers": 2},
}
QUANTISED = "quantised"
KINDS = [*LORA_KINDS, *OTHER_KINDS]


def write_base(folder: Path, model_type: str, *, tied: bool) -> Path:
    config = tiny_config(model_type, **FAMILIES[model_type], tie_word_embeddings=tied)
    return write_tiny_checkpoint(folder, config, seed=5)


def write_quantised(folder: Path, name: str = "gptq-4-act-order") -> tuple[Path, Path]:
    """A quantised base, and one with its dequantised values, on which peft answers."""
    config, tensors = as_model(Fixture(name))
    quantised = write_folder(folder / "quantised", config, tensors)
    with contextlib.closing(open_checkpoint(quantised)) as opened:
        values = {key: np.asarray(opened.read(key), np.float32) for key in opened.tensors}
    del config["quantization_config"]
    return quantised, write_folder(folder / "plain", config, values)


@contextlib.contextmanager
def served_kinds(
    folder: Path, base: Path, kinds: list[Kind], oracle: Path | None = None, **options: Any
) -> Iterator[ParityModel]:
    """The base with an adapter of each kind; peft makes and computes them on ``oracle``, by default the base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about ties and embeddings
        made = {kind.name: kind.make(folder / str(n), oracle or base, n) for n, kind in enumerate(kinds)}
    with parity_model(base, adapters=made, max_running=len(kinds) + 2, **options) as model:
        model.double, model.oracle = True, oracle
        yield model


def check_alone(model: ParityModel, kind: Kind) -> None:
    """Logits of a prompt, and that the adapter shows."""
    prompt = model.prompt(0)
    ours = Driver(model.loaded.executable, model.settings.capacity, *_load(model, kind.name)).feed(prompt)
    theirs = model.transformers(prompt, kind.name)
    limit = kind.tolerance * max(1.0, float(np.abs(theirs).max()) / 10)
    if np.abs(ours - theirs).max() > limit:  # of a sensitive row PEFT's own float32 is as far from its float64
        model.double = False
        limit = max(limit, 4 * float(np.abs(model.transformers(prompt, kind.name) - theirs).max()))
        model.double = True
    np.testing.assert_allclose(ours, theirs, atol=limit)
    assert np.abs(theirs - model.transformers(prompt)).max() > 30 * limit, "the adapter does not show"


def _load(model: ParityModel, name: str) -> tuple[int, AdapterFacts, KvPrefix | None]:
    """The adapter in a slot of the executable, loaded as a server does."""
    from truffula.lora.image import map_image
    from truffula.lora.worker import LoadRequest, load
    from truffula.types import AdapterRef

    with tempfile.TemporaryDirectory() as staging:
        ref = AdapterRef(name="adapter", locator=str(model.adapters[name]))
        response = load(LoadRequest(ticket=1, ref=ref), model.setup, [Path(staging)])
        assert response.error is None and response.image is not None, response.error
        image = map_image(Path(str(response.image_path)), response.image)
        return model.loaded.executable.adapter(image), response.image.facts, response.image.prefix_of(image)


def check_mixed(model: ParityModel, names: list[str]) -> dict[str, str]:
    """All kinds and the base in one batch; by kind what differed."""
    crowd = [(str(n), model.prompt(n), name) for n, name in enumerate([None, *names])]
    _, answers = model.run([model.request(*each, max_tokens=SOME_TOKENS) for each in crowd])
    failed = {}
    for label, prompt, name in crowd:
        try:
            model.expect(answers[label], prompt, name)
        except Exception as error:  # noqa: BLE001  (peft's, too)
            failed[name or "base"] = _why(error)
    return failed


def _why(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def check_preempted(model: ParityModel, kind: Kind) -> None:
    crowd = [(str(n), model.prompt(n)[:3], kind.name if n % 2 else None) for n in range(6)]
    for blocks in (15, 12, 10):
        rig, answers = model.run(
            [model.request(*each, max_tokens=24) for each in crowd], num_blocks=blocks, prefix_cache=False
        )
        if rig.engine.stats().preemptions:
            break
    assert rig.engine.stats().preemptions > 0
    for label, prompt, adapter in crowd:
        model.expect(answers[label], prompt, adapter)


def check_prefix_and_reload(model: ParityModel, kind: Kind) -> None:
    """A second request hits the first one's blocks; a third comes after the adapter was evicted and loaded again."""
    prompt, name = model.prompt(0), kind.name
    with tempfile.TemporaryDirectory() as staging:
        rig = Rig(model.settings.limits, executable=model.loaded.executable,
                  loader=FolderLoader(model.setup, Path(staging)))  # fmt: skip
        for n, suffix in enumerate(([], [7, 8])):
            ids = [*prompt, *suffix]
            answer = rig.run([model.request(str(n), ids, name, max_tokens=8)])[str(n)]
            model.expect(answer, ids, name)
            assert answer.final is not None and (answer.final.cached_tokens > 0) == bool(suffix), answer.final
        rig.adapters.close()
    _, answers = model.run([model.request("again", prompt, name, max_tokens=8)])
    model.expect(answers["again"], prompt, name)


EACH: dict[str, Callable[[ParityModel, Kind], None]] = {
    "alone": check_alone,
    "preempted": check_preempted,
    "prefix, reload": check_prefix_and_reload,
}


def results(model: ParityModel, kinds: list[Kind], checks: list[str]) -> Iterator[tuple[str, str, str]]:
    """(kind, check, what differed) of each check; empty for what agrees."""
    for kind in kinds:
        for name in checks:
            try:
                EACH[name](model, kind)
                yield kind.name, name, ""
            except Exception as error:  # noqa: BLE001  (peft's, too: one row says so)
                yield kind.name, name, _why(error)
    failed = check_mixed(model, [kind.name for kind in kinds])
    for name in ("base", *(kind.name for kind in kinds)):
        yield name, "mixed", failed.get(name, "")


def refusals() -> Iterator[tuple[str, str]]:
    """What is refused, and the message: fields, methods, files."""
    from test_adapter_fields import PLAIN, REFUSED
    from test_adapter_messages import MESSAGES, WRAPPED, configured, refusal

    made = [(f"{name} = {value!r}", configured(**PLAIN | {name: value})) for name, value in REFUSED]
    made += [(f"peft_type {name}", configured(peft_type=name)) for name in OTHER_METHODS]
    for label, make in [*made, *((name, make) for name, make, _ in (*WRAPPED, *MESSAGES))]:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder) / "adapter")
            yield label, refusal(Path(folder) / "adapter").message


Case = tuple[str, Path, Path | None]


def cases(families: list[str], folder: Path) -> Iterator[Case]:
    """Label, base and oracle of each block of rows."""
    for family in families:
        if family == QUANTISED:
            yield family, *write_quantised(folder / family)
        else:
            for tied in (False, True):
                label = f"{family}{' tied' * tied}"
                yield label, write_base(folder / label, family, tied=tied), None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help=", ".join([*FAMILIES, QUANTISED]))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--kind", action="append", help="only kinds whose name contains this")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    failed: list[str] = []
    columns = [*EACH, "mixed"]
    print(f"{'':46}" + "".join(f"{name:16}" for name in columns), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for label, base, oracle in cases(options.families or [*FAMILIES, QUANTISED], Path(folder)):
            some = [k for k in KINDS if k.applies(oracle or base) and any(t in k.name for t in options.kind or [""])]
            rows: dict[str, dict[str, str]] = {}
            with served_kinds(Path(folder) / f"{label} adapters", base, some, oracle, backend=options.backend) as model:
                for kind, check, why in results(model, some, list(EACH)):
                    rows.setdefault(kind, {})[check] = why
                    if why:
                        failed.append(f"{label}: {kind}: {check}: {why}")
            for kind, row in rows.items():
                marks = "".join(f"{'FAILS' if row.get(c) else 'ok' if c in row else '':16}" for c in columns)
                print(f"{label + ': ' + kind:46}{marks}", flush=True)
    if not options.families and not options.kind:
        print("\nRefused:")
        for label, message in refusals():
            print(f"{label[:45]:46}{message[:200]}", flush=True)
    print("\n".join(["", *failed, f"{len(failed)} failures"]))
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
