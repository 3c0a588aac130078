"""What the pages for users name exists: error codes, options, variables, metrics."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from live_server import serving, write_model
from pages import ROOT

from truffula.config import OPTIONS
from truffula.server.errors import TABLE

DOCS = ROOT / "docs"
DEPLOY = ROOT / "examples" / "deploy"
TROUBLE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")


def first_cells(page: str) -> list[str]:
    return [line.split("|")[1] for line in page.splitlines() if line.startswith("|")]


def test_every_error_code_is_explained_and_exists() -> None:
    """The codes of truffula's classes, and what OpenAI's side calls them."""
    quoted = {code for cell in first_cells(TROUBLE) for code in re.findall(r"`([a-z]+(?:_[a-z]+)*)`", cell)} - {"make"}
    own = set(TABLE)
    outside = {row.openai_code for row in TABLE.values() if row.openai_code}
    assert quoted <= own | outside, "the page explains codes that do not exist"
    assert own | outside <= quoted, "docs/troubleshooting.md should explain these, too"


PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", *DEPLOY.iterdir()])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_variables_exist(page: Path) -> None:
    known = {option.env for option in OPTIONS.values()} | {"TRUFFULA_CONFIG", "TRUFFULA_MODEL"}
    named = set(re.findall(r"\bTRUFFULA_[A-Z_]+[A-Z]\b", page.read_text(encoding="utf-8")))
    assert named <= known


@pytest.mark.parametrize("name", ["troubleshooting.md", "deployment.md", "performance.md"])
def test_options_exist(name: str) -> None:
    """Options in backticks are options of ours; a few belong to pip, docker and truffula's other commands."""
    foreign = {"--force-reinstall", "--no-deps", "--no-cache-dir", "--shm-size"}
    commands = {
        "--config",
        "--raw",
        "--base",
        "--show",
        "--context",
        "--tiny",
        "--url",
        "--rows",
        "--steps",
        "--prefill",
        "--plot",
    }
    text = (DOCS / name).read_text(encoding="utf-8")
    named = {flag for code in re.findall(r"`([^`\n]+)`", text) for flag in re.findall(r"(?<!\S)--[a-z][a-z-]+", code)}
    known = {option.flag for option in OPTIONS.values()} | {
        option.flag.replace("--", "--no-", 1) for option in OPTIONS.values() if option.kind == "switch"
    }
    assert named <= known | foreign | commands
    assert named & known


def test_the_unit_and_the_image_serve_with_options_that_exist() -> None:
    known = {option.flag for option in OPTIONS.values()}
    for name in ("truffula.service", "Dockerfile"):
        text = (DEPLOY / name).read_text(encoding="utf-8")
        commands = re.findall(r"truffula serve (.*)|-t truffula|truffula (smollm2 .*)", text)
        flags = {flag for command in commands for flag in re.findall(r"--[a-z-]+", " ".join(command))}
        assert flags and flags <= known
    unit = (DEPLOY / "truffula.service").read_text(encoding="utf-8")
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(stop) > OPTIONS["drain_timeout"].default


def test_metrics_of_the_deployment_page_exist(tmp_path: Path) -> None:
    page = (DOCS / "deployment.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(truffula_[a-z_]+)`", page))
    with serving(write_model(tmp_path / "model"), backend="auto") as live:
        served = set(re.findall(r"^(truffula_[a-z_]+)", live.client.get("/metrics").text, re.MULTILINE))
    assert len(named) >= 8 and named <= served
