"""Compare truffula with other servers, in turn and on the same prompts: medians, spreads and ratios.

    python benchmarks/compare.py --list                      # scenarios and their peers
    python benchmarks/compare.py distinct8 --bench-dir DIR   # one scenario, five rounds
    python benchmarks/compare.py --smoke                     # truffula alone on a tiny random model

One server runs at a time, started fresh and warmed up; rounds alternate. Peers are installed once by benchmarks/peers
(llamacpp.sh setup, vllm.sh setup, ...); a peer that is not installed is reported with the command, and the status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from comparison.machine import commit
from comparison.peers import Place
from comparison.report import figures, markdown, number, report
from comparison.rounds import Result, compare
from comparison.scenarios import BUILT_IN, Row, chosen, read_scenarios
from truffula.bench.server import end_children_on_sigterm
from truffula.cli.doctor import cpu_name
from truffula.cli.output import err, fail, out, table, warn
from truffula.errors import ConfigError, TruffulaError
from truffula.kernels.host import usable_cpus
from truffula.testing.tiny import write_tiny_checkpoint

PEERS = Path(__file__).resolve().parent / "peers"
SMOKE = """
[[row]]
name = "smoke-http"
what = "a tiny model over HTTP"
measure = "throughput"
clients = 2
prompt_tokens = 9
max_tokens = 4
vocab_size = 100
contestant = [{ peer = "truffula", model = "models/tiny", options = { memory = "256MiB" } }]
[[row]]
name = "smoke-decode"
what = "a tiny model without a server"
measure = "decode"
max_tokens = 4
contestant = [{ peer = "truffula", model = "models/tiny" }]
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", help="scenarios or single rows; default: all")
    parser.add_argument("--list", action="store_true", help="print the scenarios and the servers in each")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; in each, every server runs once, in turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run to this file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the rows of README.md to this file")
    parser.add_argument("--scenario-file", type=Path, default=BUILT_IN, metavar="FILE", help="TOML with your own rows")
    parser.add_argument(
        "--bench-dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "bench",
        metavar="FOLDER",
        help="BENCH_DIR of the peers' scripts: models, adapters, peers",
    )
    parser.add_argument("--peers", type=Path, default=PEERS, metavar="FOLDER", help="the peers' scripts")
    parser.add_argument("--smoke", action="store_true", help="truffula alone on a tiny model, one round")
    return parser.parse_args()


def main() -> None:
    asked = parse_arguments()
    try:
        if asked.list:
            list_scenarios(asked.scenario_file)
        elif asked.smoke:
            with tempfile.TemporaryDirectory() as folder:
                asked.bench_dir, asked.repeats = Path(folder), 1
                asked.scenario_file = asked.bench_dir / "smoke.toml"
                asked.scenario_file.write_text(SMOKE)
                write_tiny_checkpoint(asked.bench_dir / "models" / "tiny")
                run(asked)
        else:
            run(asked)
    except TruffulaError as error:
        fail(error)
        sys.exit(1)


def run(asked: argparse.Namespace) -> None:
    if asked.repeats < 1:
        raise ConfigError(f"--repeats is {asked.repeats}; it must be 1 or more.", param="repeats")
    for file in (asked.json, asked.markdown):  # known now, not after an hour
        if file is not None and not file.parent.is_dir():
            raise ConfigError(f"{file} can't be written: {file.parent} is not a folder.", param="json")
    end_children_on_sigterm()
    rows = chosen(read_scenarios(asked.scenario_file), asked.scenarios)
    place = Place(asked.peers, asked.bench_dir.absolute())
    machine = _machine()
    results: list[Result] = []
    for row in rows:
        result = compare(row, place, asked.repeats, lambda text: err().print(text, style="dim"))
        results.append(result)
        _print(result)
        # Written after each row: an interrupted comparison keeps the rows that are complete.
        if asked.json is not None:
            asked.json.write_text(json.dumps(report(results, machine, asked.repeats), indent=1) + "\n")
        if asked.markdown is not None:
            asked.markdown.write_text(markdown(results, machine, asked.repeats))
    what = f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}, commit {machine['commit']}"
    out().print(what, style="dim")
    absent = sum(len(result.absent) for result in results)
    if absent:
        raise ConfigError(f"{absent} contestants were not measured; the reasons are listed above.", param="peers")


def list_scenarios(scenario_file: Path) -> None:
    shown = table("scenario", "row", "what", "contestants")
    for row in read_scenarios(scenario_file):
        shown.add_row(row.scenario or row.name, row.name, row.what, ", ".join(c.title for c in row.contestants))
    out().print(shown)


def _machine() -> dict[str, Any]:
    name, sets = cpu_name()
    return {"cpu": name, "isa": sets[0] if sets else "unknown", "cores": usable_cpus(), "commit": commit()}


def _print(result: Result) -> None:
    row: Row = result.row
    shown = table("", f">{row.unit}", ">spread", ">x", ">x of each round", "also", title=f"{row.name}: {row.what}")
    for one in figures(result):
        ratio = "" if one.ratio is None else Text(f"{one.ratio:.2f}", "bold")
        shown.add_row(
            one.contestant, number(one.median), f"{number(one.low)}-{number(one.high)}", ratio,
            _ratios(one.ratios), one.note,
        )  # fmt: skip
    out().print(shown)
    for why in result.absent.values():
        warn(f"not measured: {why}")


def _ratios(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


if __name__ == "__main__":
    main()
