"""The parity matrix: each architecture with tiny weights × each check of ``parity.CHECKS``. ``make parity`` prints it.

Rows are the cases of ``test_architecture_parity.py`` and ``parity_cases_*.py``, which our own code computes, and the
types of ``fallback_types.py``, which transformers' code computes.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
if __name__ == "__main__":
    for folder in sorted({path.parent for path in HERE.parent.rglob("*.py")}):
        sys.path.insert(0, str(folder))

from fallback_types import SERVED, small_config, write_small  # noqa: E402
from parity import CHECKS, parity_model  # noqa: E402

from truffula.testing.tiny import tiny_config, write_tiny_checkpoint  # noqa: E402


@dataclass(frozen=True)
class Row:
    """A tiny model. ``served`` is the kind of implementation that must compute it."""

    model_type: str
    name: str
    served: str
    write: Callable[[Path], Path]

    @property
    def label(self) -> str:
        return f"{self.model_type}: {self.name}" if self.name else self.model_type

    def run(self) -> Iterator[tuple[str, str]]:
        """The result of each check, as it is made: empty, or what differed."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                with parity_model(self.write(Path(folder) / "model")) as model:
                    kind = model.plan.implementation.kind
                    yield "served", "" if kind == self.served else f"{kind}: {model.plan.implementation.reason}"
                    yield "adapters", "" if model.adapters else "none can act"
                    for name, check in CHECKS.items():
                        try:
                            check(model)
                            yield name, ""
                        except Exception as error:  # noqa: BLE001  (peft's and transformers', too: one row says so)
                            yield name, " ".join(str(error).split())[:200] or type(error).__name__
            except Exception as error:  # noqa: BLE001
                yield "load", f"{type(error).__name__}: {error}"


def rows() -> list[Row]:
    """All rows: the native ones first."""
    names = ["test_architecture_parity", *sorted(path.stem for path in HERE.glob("parity_cases_*.py"))]
    cases = {(case[0], case[1]): case[2] for name in names for case in importlib.import_module(name).CASES}
    # The engine refuses a model without a KV cache.
    del cases["qwen3_5_text", "linear attention alone, long convolution"]
    made = [Row(*key, "native", _writer(key[0], overrides)) for key, overrides in cases.items()]
    return made + [Row(name, "", served, _small_writer(name)) for name, served in SERVED.items()]


def _writer(model_type: str, overrides: dict[str, object]) -> Callable[[Path], Path]:
    return lambda folder: write_tiny_checkpoint(folder, tiny_config(model_type, **overrides), seed=3)


def _small_writer(model_type: str) -> Callable[[Path], Path]:
    return lambda folder: write_small(folder, small_config(model_type))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types (all)")
    parser.add_argument("--first", action="store_true", help="only the first row of each type")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # of transformers, and of adapters that name another base
    failed: list[str] = []
    seen: set[str] = set()
    print(f"{'':52} {'served':9}" + "".join(f"{name:10}" for name in CHECKS), flush=True)
    for row in rows():
        if (options.types and row.model_type not in options.types) or (options.first and row.model_type in seen):
            continue
        seen.add(row.model_type)
        print(f"{row.label[:52]:52} {row.served:9}", end="", flush=True)
        for name, why in row.run():
            if why:
                failed.append(f"{row.label}: {name}: {why}")
            if name in CHECKS or why:
                print(f"{'FAILS' if why else 'ok':10}", end="", flush=True)
        print(flush=True)
    print("\n".join(["", *failed, f"{len(failed)} failures"]))
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
