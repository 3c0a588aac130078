"""The help of every command: whole at 80 columns, common options first, and by every name users try."""

from __future__ import annotations

import re

import pytest
from command import here, truffula
from commands import every_command, flags_of

from truffula import __version__
from truffula.cli.help import NARROWEST
from truffula.cli.options import TOPICS
from truffula.config import ENGINE_PROCESS, OPTIONS

PATHS = [path for path, _ in every_command()]
IDS = [" ".join(path) or "truffula" for path in PATHS]


def help_of(*path: str, columns: int = 80) -> str:
    done = here(*path, "--help", COLUMNS=str(columns))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_help_fits_80_columns_whole(path: tuple[str, ...]) -> None:
    text = help_of(*path)
    assert text.startswith(f"Usage: {' '.join(('truffula', *path))} ")
    assert max(map(len, text.splitlines())) <= 80
    for cut in ("…", "<bool>", "VALUE", "\x1b", "\u00a0", "None"):
        assert cut not in text
    assert "\n  -h, --help " in text


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_every_command_and_option_is_explained(path: tuple[str, ...]) -> None:
    command = dict(every_command())[path]
    assert command.help
    for param in command.params:
        assert param.help, param.name


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_short_help_and_the_help_command_say_the_same(path: tuple[str, ...]) -> None:
    text = help_of(*path)
    assert here(*path, "-h", COLUMNS="80").stdout == text
    assert here("help", *path, COLUMNS="80").stdout == text


@pytest.mark.parametrize("columns", [20, NARROWEST, 80, 200])
def test_serve_shows_each_flag_with_its_variable_on_one_line(columns: int) -> None:
    text = help_of("serve", columns=columns)
    for option in OPTIONS.values():
        if option.name != "model":
            assert re.search(rf"^  (-\w, )?{option.flag}[ ,\n]", text, re.MULTILINE), option.flag
        if columns >= 80:
            assert f"[env: {option.env}" in text, option.env
        else:
            assert option.env in text, option.env


def test_serve_shows_the_common_options_first_and_the_advanced_last() -> None:
    text = help_of("serve")
    titles = re.findall(r"^(\w[\w ]*):$", text, re.MULTILINE)
    assert titles == ["Arguments", *TOPICS, "Options"]
    common = text.split("\nCommon:\n")[1].split("\nModel:\n")[0]
    assert re.findall(r"^  .*?(--[a-z-]+)", common, re.MULTILINE)[:4] == [
        "--host",
        "--port",
        "--adapter",
        "--adapter-dir",
    ]
    assert {"--api-key", "--dtype", "--memory", "--max-model-len", "--config"} <= set(re.findall(r"--[a-z-]+", common))
    assert {option.topic for option in OPTIONS.values()} == set(TOPICS)


def test_help_says_what_values_look_like_and_how_to_give_several() -> None:
    text = " ".join(help_of("serve").split())
    assert "-a, --adapter NAME=FOLDER" in text
    assert "repeat for several [env: TRUFFULA_ADAPTERS, separated by commas]" in text
    for option in OPTIONS.values():
        if option.repeatable:
            assert f"[env: {option.env}, separated by commas]" in text
        if option.choices:
            assert f"{option.flag} {'|'.join(option.choices)}" in text
        if option.kind == "switch":
            assert f"{option.flag}, --no-{option.flag[2:]}" in text
    assert "[default: 8000]" in text and "[default: 2 MiB]" in text and "[default: 600]" in text
    assert "[default: all CPUs available to this process]" in text


def test_usage_lines_name_arguments_in_capitals() -> None:
    assert help_of("serve").startswith("Usage: truffula serve [OPTIONS] [MODEL]\n")
    assert help_of("generate").startswith("Usage: truffula generate [OPTIONS] [MODEL] [PROMPT]\n")
    assert help_of("adapters", "load").startswith("Usage: truffula adapters load [OPTIONS] NAME FOLDER\n")


def test_alone_it_shows_the_three_most_used_commands_first() -> None:
    done = truffula(COLUMNS="80")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == help_of()
    assert re.findall(r"^  ([a-z]+) ", done.stdout, re.MULTILINE)[:3] == ["serve", "generate", "chat"]
    assert here("bench").stdout == here("bench", "--help").stdout


@pytest.mark.parametrize("words", ["version", "--version", "-V", "-v"])
def test_the_version_by_every_name(words: str) -> None:
    done = here(words)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"truffula {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("verison", "Unknown command verison. Did you mean version?"), ("help srve", "Did you mean serve?"),
        ("help serve deeper", "truffula serve has no commands"), ("adapters lst", "Did you mean list?"),
        ("xyzzy", "Unknown command xyzzy. See `truffula --help`."),
        ("serve base --max-runing 3", "Unknown option --max-runing. Did you mean --max-running?"),
        ("serve base --xyzzy", "Unknown option --xyzzy. See `truffula serve --help`."),
        ("serve one two", "(two). See `truffula serve --help`."), ("pull", "Missing argument 'MODEL'."),
        ("generate base --max-tokens many", "--max-tokens"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_paragraph_with_status_2(words: str, said: str) -> None:
    done = here(*words.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_completion_still_knows_the_options() -> None:
    done = truffula(_TRUFFULA_COMPLETE="complete_bash", COMP_WORDS="truffula serve --adapter", COMP_CWORD="2")
    assert {"--adapter", "--adapter-dir", "--adapter-admin"} <= set(done.stdout.split())
    assert {"--install-completion", "--show-completion"} <= flags_of()


@pytest.mark.parametrize("command", ["generate", "chat", "verify"])
def test_commands_without_an_engine_process_have_no_options_of_it(command: str) -> None:
    text = help_of(command)
    for option in OPTIONS.values():
        assert not (option.topic == ENGINE_PROCESS and f"{option.flag} " in text), option.flag
    assert "--heartbeat-timeout " in help_of("serve") and "--heartbeat-timeout " in help_of("bench", "serve")
