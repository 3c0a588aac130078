"""Flags and commands of other servers are answered with ours."""

from __future__ import annotations

import re

import pytest
from command import here
from commands import every_command, flags_of

from truffula.cli.foreign_flags import foreign_flags, known_commands, known_flags

SERVERS = {"LoRAX", "TGI", "vLLM", "llama.cpp", "SGLang"}
OWN = {"--system": True, "-n": True, "--raw": False}


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("serve --lora-modules a=b", "an option of vLLM; in truffula: --adapter NAME=FOLDER (repeat it for several)."),
        ("serve --lora-modules=a=b", "--adapter NAME=FOLDER"),
        ("serve base --enable-lora", "adapters can always be served: leave it out"),
        ("serve base --max-lora-rank 64", "adapters of any rank: leave it out"),
        ("serve base --max_loras 4", "--adapter-memory SIZE"),
        ("serve --model base", "MODEL, the first argument"),
        ("serve -m base", "MODEL, the first argument"),
        ("serve --model-id base", "is an option of LoRAX and TGI; in truffula: MODEL, the first argument"),
        ("serve base --max-input-length 9", "--max-model-len N"),
        ("serve base --max-concurrent-requests 9", "--max-open-requests N"),
        ("serve base --adapter-cycle-time-s 2", "requests for all adapters run in one batch"),
        ("serve base --hostname 0.0.0.0", "--host ADDRESS"),
        ("serve base -p 80", "--port PORT"),
        ("serve base --num-shard 2", "computes on one device"),
        ("serve base -ngl 99", "computes on one device"),
        ("serve base -c 2048", "--max-model-len N"),
        ("serve base -t 8", "--threads N"),
        ("serve base --lora x.gguf", "adapters in GGUF files are not served"),
        ("serve base -fa", "leave it out"),
        ("serve -hf org/name", "ORG/NAME/FILE.gguf"),
        ("serve --model-path base", "MODEL, the first argument"),
        ("serve base --lora-paths a=b", "--adapter NAME=FOLDER"),
        ("serve base --mem-fraction-static 0.8", "--memory SIZE"),
        ("generate base hello -np 4", "--max-running N"),
        ("generate base -p hello", "truffula generate MODEL PROMPT"),
        ("chat -m base", "MODEL, the first argument"),
        ("--model-id base", "MODEL, the first argument"),
        ("-m base", "MODEL, the first argument"),
        ("serve base -c4096", "--max-model-len N"),
        ("chat base --temp 0.5", "--temperature VALUE"),
    ],
)  # fmt: skip
def test_a_foreign_flag_is_answered_with_ours(words: str, answer: str) -> None:
    done = here(*words.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert answer in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, "one paragraph"


@pytest.mark.parametrize("flag", known_flags())
def test_each_answer_names_owner_and_way_out_in_flags_that_exist(flag: str) -> None:
    row = known_flags()[flag]
    assert row.flag == flag and set(row.servers) <= SERVERS and row.servers
    assert row.equivalent or row.note, "an answer"
    assert row.message.startswith(f"{flag} is ") and row.message.endswith(".")
    ours = flags_of("serve") | flags_of("generate") | flags_of("chat")
    assert set(re.findall(r"--[a-z][a-z-]+", f"{row.equivalent} {row.note}")) <= ours
    known = {" ".join(path) for path, _ in every_command()}
    commands = set(re.findall(r"`truffula ([a-z]+)", row.equivalent + row.note))
    assert commands <= known


def test_no_foreign_flag_hides_one_of_serve() -> None:
    assert not set(known_flags()) & flags_of("serve")


@pytest.mark.parametrize(
    "flag", ["--quantize", "--dtype", "--port", "--host", "--api-key", "--max-best-of", "--revision"]
)
def test_what_other_servers_have_by_the_same_name_is_ours_too(flag: str) -> None:
    assert flag in flags_of("serve") and flag not in known_flags()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["-n", "3", "--lora", "x"], "--lora"), (["-n=3", "--lora", "x"], "--lora"), (["--raw", "--lora"], "--lora"),
        (["--system", "--lora"], None), (["--system=--lora"], None), (["--", "--lora"], None), (["-n", "-c"], None),
        (["--lora_modules=a"], "--lora-modules"), (["-n", "3"], None),
        (["-n3", "-c4096"], "-c"), (["-p8080"], "-p"), (["-"], None), ([], None),
    ],
)  # fmt: skip
def test_values_and_own_flags_are_not_taken_for_foreign_ones(words: list[str], found: str | None) -> None:
    assert [row.flag for row in foreign_flags(words, OWN)] == ([found] if found else [])


@pytest.mark.parametrize("start", ["serve ", ""])
def test_all_foreign_flags_of_a_line_are_answered_together(start: str) -> None:
    words = f"{start}--model-id base --enable-lora --gpu-memory-utilization .9 --lora-modules a=b --enable-lora"
    done = here(*words.split())
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    for flag in ("--model-id", "--enable-lora", "--gpu-memory-utilization", "--lora-modules"):
        assert done.stderr.count(f"{flag} is ") == 1
    assert f"See `truffula {start.strip()}".rstrip() in done.stderr


def test_a_command_uses_its_own_flag_of_the_same_name() -> None:
    done = here("generate", "./no-such-model.gguf", "hi", "-n", "3", "-t", "0")
    assert done.returncode == 1 and "llama.cpp" not in done.stderr


@pytest.mark.parametrize("word", known_commands())
def test_a_foreign_command_is_answered(word: str) -> None:
    assert (word,) not in dict(every_command())
    done = here(word, "smollm2", "--whatever")
    assert (done.returncode, done.stdout) == (2, "")
    assert known_commands()[word] in done.stderr
    for path in re.findall(r"`truffula ([a-z]+)", known_commands()[word]):
        assert (path,) in dict(every_command())


def test_values_of_other_servers_are_refused_with_what_there_is_instead() -> None:
    for words, answer in (
        ("--quantize bitsandbytes", "GPTQ, AWQ and bitsandbytes are not supported"),
        ("--dtype half", "auto, float32, bfloat16"),
        ("--backend vulkan", "auto, cpu, reference"),
        ("--chat-template chatml", "write the template to a file"),
    ):
        done = here("serve", "no-such-model", *words.split())
        assert done.returncode == 1 and answer in done.stderr, done.stderr
