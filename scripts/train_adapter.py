"""Train a LoRA adapter with PEFT and say how to serve it.

    python scripts/train_adapter.py --base smollm2 --data my.jsonl --out my-adapter --rank 8

Needs the extra truffula[train] (docs/training.md). DATA has one JSON object per line, in one of these forms:

    {"prompt": "What is coffee?", "completion": "Arr, a black brew."}
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy!"}]}
    {"text": "A passage to continue in this style."}

Prompts and messages are written with the model's chat template (--raw: prompts as they are). Only completions and
assistant messages are learned; of a text, all of it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100  # the label that the loss of transformers' models leaves out
FORMS = ({"prompt", "completion"}, {"messages"}, {"text"})
REPORTS = 20  # progress lines of a run, about


@dataclass(frozen=True)
class Row:
    """One line of the data file: ``fields`` has the keys of one of ``FORMS``."""

    line: int
    fields: dict[str, Any]


@dataclass(frozen=True)
class Example:
    """Token ids, and as labels the same ids where they are learned, else ``IGNORED``."""

    line: int
    ids: list[int]
    labels: list[int]


def fail(message: str) -> NoReturn:
    raise SystemExit(f"error: {message}")


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file; blank lines are skipped. Exits with the line's number when one is not a row."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        fail(f"--data {path}: {error.strerror}.")
    except UnicodeDecodeError as error:
        fail(f"--data {path} is not UTF-8 text: {error}.")
    if text.lstrip().startswith("["):
        fail(f"--data {path} is a JSON array; it must be JSONL: one JSON object per line.")
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            fail(f"{where} is not JSON: {error}.")
        if not isinstance(fields, dict):
            fail(f"{where} is a JSON {type(fields).__name__}; it must be an object.")
        if set(fields) not in FORMS:
            fail(
                f"{where} has the keys {', '.join(map(repr, fields)) or '(none)'}; expected 'prompt' and 'completion', "
                "or 'messages', or 'text', and no other keys."
            )
        check_values(fields, where)
        rows.append(Row(number, fields))
    if not rows:
        fail(f"--data {path} has no rows.")
    return rows


def check_values(fields: dict[str, Any], where: str) -> None:
    for key, value in fields.items():
        if key == "messages":
            check_messages(value, where)
        elif not isinstance(value, str):
            fail(f"{where}: {key!r} must be a string, got {value!r}.")
        elif key != "prompt" and not value.strip():
            fail(f"{where}: {key!r} is empty; there is nothing to learn.")


def check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        fail(f"{where}: 'messages' must be a list of objects with 'role' and 'content'.")
    for index, message in enumerate(messages):
        at = f"{where}: messages[{index}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            fail(f"{at} must be an object with 'role' and 'content' and no other keys.")
        if not all(isinstance(value, str) for value in message.values()):
            fail(f"{at}: 'role' and 'content' must be strings.")
        if message["role"] == "assistant" and not message["content"].strip():
            fail(f"{at} is an empty assistant message; there is nothing to learn.")
    if all(message["role"] != "assistant" for message in messages):
        fail(f"{where} has no message with the role 'assistant'; there is nothing to learn.")


def encode(tokenizer: PreTrainedTokenizerBase, row: Row, raw: bool) -> Example:
    """The row as tokens. Prompt and answer are tokenised apart, as a server does that sees the prompt alone."""
    example = Example(row.line, [], [])
    for text, learned, special in segments(tokenizer, row, raw):
        ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        if special and ids and ids[-1] == tokenizer.eos_token_id:
            ids.pop()  # some tokenizers end every text; the end is learned below
        example.ids.extend(ids)
        example.labels.extend(ids if learned else [IGNORED] * len(ids))
    if "messages" not in row.fields and (raw or "text" in row.fields) and tokenizer.eos_token_id is not None:
        example.ids.append(tokenizer.eos_token_id)
        example.labels.append(tokenizer.eos_token_id)
    return example


def segments(tokenizer: PreTrainedTokenizerBase, row: Row, raw: bool) -> Iterator[tuple[str, bool, bool]]:
    """Pieces of the row's text: (text, whether it is learned, whether the tokenizer adds its special tokens)."""
    if "text" in row.fields:
        yield row.fields["text"], True, True
    elif "prompt" in row.fields and raw:
        yield row.fields["prompt"], False, True
        yield row.fields["completion"], True, False
    else:
        messages = row.fields.get("messages") or [
            {"role": "user", "content": row.fields["prompt"]},
            {"role": "assistant", "content": row.fields["completion"]},
        ]
        yield from turns(tokenizer, messages, row.line)


def turns(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], line: int
) -> Iterator[tuple[str, bool, bool]]:
    """The conversation as the chat template writes it, cut before and after each assistant message."""
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = render(tokenizer, messages[:index], line, add_generation_prompt=True)
        answered = render(tokenizer, messages[: index + 1], line)
        if not (asked.startswith(done) and answered.startswith(asked)):
            fail(
                f"line {line}: the chat template writes the conversation differently once an answer is added, so the "
                "answer cannot be separated. Write one row per assistant message, or use --raw with prompt and "
                "completion."
            )
        answer = answered[len(asked) :]
        if answer.rstrip().endswith(message["content"].rstrip()):  # this template has no end-of-turn token
            answer += tokenizer.eos_token or ""
        yield asked[len(done) :], False, False
        yield answer, True, False
        done = answered


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], line: int, **options: Any) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TemplateError as error:
        fail(f"line {line}: the chat template refuses these messages: {error}.")


def encode_all(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], args: argparse.Namespace) -> list[Example]:
    """All rows as tokens, cut to ``--max-length``; says which were cut."""
    raw = args.raw
    if not raw and not tokenizer.chat_template:
        if any("messages" in row.fields for row in rows):
            fail("the base has no chat template, so 'messages' cannot be written; use 'prompt' and 'completion'.")
        print("The base has no chat template: prompts are taken as they are.")
        raw = args.raw = True
    examples, cut = [], []
    for row in rows:
        whole = encode(tokenizer, row, raw)
        example = Example(row.line, whole.ids[: args.max_length], whole.labels[: args.max_length])
        if all(label == IGNORED for label in example.labels[1:]):
            fail(
                f"{args.data}, line {row.line}: the first {args.max_length} of its {len(whole.ids)} tokens hold "
                "nothing to learn; raise --max-length or remove the row."
            )
        if len(whole.ids) > args.max_length:
            cut.append(row.line)
        examples.append(example)
    if cut:
        lines = ", ".join(map(str, cut[:10])) + (", ..." if len(cut) > 10 else "")
        print(f"Rows longer than --max-length {args.max_length} were cut: {len(cut)} of {len(rows)} (lines {lines}).")
    return examples


def batches(examples: Sequence[Example], size: int, rng: random.Random) -> list[list[Example]]:
    """Every example once: batches of similar length, in random order."""
    order = sorted(examples, key=lambda example: (len(example.ids), rng.random()))
    found = [order[i : i + size] for i in range(0, len(order), size)]
    rng.shuffle(found)
    return found


def loss_of(model: PreTrainedModel, batch: Sequence[Example]) -> torch.Tensor:
    """The mean negative log-likelihood of the learned tokens of ``batch``, padded on the right."""
    import torch

    width = max(len(example.ids) for example in batch)
    device = model.device
    ids = torch.tensor([e.ids + [0] * (width - len(e.ids)) for e in batch], device=device)
    labels = torch.tensor([e.labels + [IGNORED] * (width - len(e.ids)) for e in batch], device=device)
    mask = torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in batch], device=device)
    loss: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return loss


def evaluate(model: PreTrainedModel, examples: Sequence[Example], size: int) -> float:
    """The mean loss per learned token of ``examples``."""
    import torch

    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(examples), size):
            batch = examples[start : start + size]
            learned = sum(label != IGNORED for example in batch for label in example.labels[1:])
            total, count = total + loss_of(model, batch).item() * learned, count + learned
    model.train()
    return total / count


def fit(model: PreTrainedModel, train: Sequence[Example], held: Sequence[Example], args: argparse.Namespace) -> None:
    """AdamW with a linear warm-up over a tenth of the steps, then a cosine to zero. Prints loss and time."""
    import torch

    rng = random.Random(args.seed)
    steps = [(epoch, batch) for epoch in range(1, args.epochs + 1) for batch in batches(train, args.batch_size, rng)]
    warm_up = max(1, len(steps) // 10)

    def rate(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, len(steps) - warm_up)))

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    began, losses = time.monotonic(), []
    for number, (epoch, batch) in enumerate(steps, 1):
        loss = loss_of(model, batch)
        if not torch.isfinite(loss):
            fail(f"the loss of step {number} is {loss.item()}; lower --lr, or use --dtype float32. Nothing was saved.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        last_of_epoch = number == len(steps) or steps[number][0] != epoch
        if number % max(1, len(steps) // REPORTS) == 0 or last_of_epoch:
            spent = time.monotonic() - began
            left = spent / number * (len(steps) - number)
            print(
                f"epoch {epoch}/{args.epochs}  step {number}/{len(steps)}  loss {sum(losses) / len(losses):.3f}  "
                f"{spent:.0f} s, about {left:.0f} s left",
                flush=True,
            )
            losses.clear()
        if held and last_of_epoch:
            print(f"epoch {epoch}/{args.epochs}  loss on {len(held)} held-out rows {evaluate(model, held, 8):.3f}")


def load_base(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Tokenizer and model of ``--base``; the weights of a GGUF file are dequantised."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from truffula.errors import TruffulaError
    from truffula.settings import load_config
    from truffula.weights.sources import resolve_source

    said: set[str] = set()

    def report(what: str, _done: int, _total: int | None) -> None:
        if what not in said:
            said.add(what)
            print(f"{what} ...", flush=True)

    try:
        config = load_config({"model": args.base}).engine
        path = resolve_source(args.base, cache_dir=config.cache_dir, offline=config.offline, progress=report)
    except TruffulaError as error:
        fail(f"--base {args.base}: {error}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, faster_dtype(device) if args.dtype == "auto" else args.dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if path.is_file():
        options |= {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, **options)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, **options)
    return model.to(device), tokenizer


def faster_dtype(device: str) -> str:
    """bfloat16 where the processor has instructions for it, else float32."""
    import torch

    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    has = torch.cpu.get_capabilities()
    return "bfloat16" if any(has.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")) else "float32"


def train(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    from truffula.environment import prepare_compute

    prepare_compute()  # before torch: its threads sleep while they wait, which matters beside other work
    import torch
    from peft import LoraConfig, get_peft_model

    # transformers and peft warn each other of names they will change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\b")
    torch.manual_seed(args.seed)
    base, tokenizer = load_base(args)
    examples = encode_all(tokenizer, rows, args)
    random.Random(args.seed).shuffle(examples)
    held, examples = examples[: held_out(args.eval, len(rows))], examples[held_out(args.eval, len(rows)) :]
    targets = args.targets if args.targets == "all-linear" else args.targets.split(",")
    alpha = 2 * args.rank if args.alpha is None else args.alpha
    try:
        config = LoraConfig(r=args.rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
    except ValueError as error:
        fail(f"--targets {args.targets}: {error}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(
        f"{len(examples)} rows, {sum(len(example.ids) for example in examples)} tokens; "
        f"{sum(parameter.numel() for parameter in trained):,} trained parameters of rank {args.rank}; "
        f"the base computes in {str(base.dtype).removeprefix('torch.')} on {base.device.type}."
    )
    fit(model, examples, held, args)
    for parameter in trained:
        parameter.data = parameter.data.to(getattr(torch, args.save_dtype))
    base_path = Path(args.base).expanduser()
    named = args.base_name or (str(base_path.resolve()) if base_path.exists() else args.base)
    model.peft_config["default"].base_model_name_or_path = named
    # Without this PEFT asks the Hub for the config of a model of this name, to see whether the vocabulary grew.
    model.save_pretrained(args.out, save_embedding_layers=False)


def held_out(fraction: float, rows: int) -> int:
    """How many rows ``--eval`` keeps from training."""
    return math.ceil(fraction * rows)


def what_next(args: argparse.Namespace, rows: Sequence[Row]) -> str:
    """The commands that serve the adapter and ask it a question of its own data."""
    name, base = args.out.resolve().name, shlex.quote(args.base)
    out = shlex.quote(str(args.out))
    fields = rows[0].fields
    chat = "messages" in fields or ("prompt" in fields and not args.raw)
    if "messages" in fields:
        question = next((m["content"] for m in fields["messages"] if m["role"] == "user"), "Hello")
    else:
        question = fields.get("prompt") or " ".join(fields["text"].split()[:5])
    question = question if len(question) <= 300 else question[:300].rsplit(" ", 1)[0]
    body: dict[str, Any] = {"model": name}
    body |= {"messages": [{"role": "user", "content": question}]} if chat else {"prompt": question}
    path = "chat/completions" if chat else "completions"
    data = shlex.quote(json.dumps(body | {"max_tokens": 64, "temperature": 0}, ensure_ascii=False))
    file = args.out / "adapter_model.safetensors"
    raw = "" if chat else " --raw"
    return (
        f"\nSaved {args.out} ({file.stat().st_size / 1e6:.1f} MB). Serve it:\n"
        f"  truffula serve {base} --adapter {shlex.quote(name)}={out}\n"
        "and ask it, in another terminal:\n"
        f"  curl -s http://127.0.0.1:8000/v1/{path} -H 'content-type: application/json' -d {data}\n"
        "Or compare it with its base, without a server:\n"
        f"  truffula generate {base} {shlex.quote(question)} -a base -a {out} --max-tokens 64{raw}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_adapter.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", required=True, metavar="MODEL", help="an alias (smollm2), a .gguf file, a folder or a Hub id")
    add("--data", required=True, type=Path, metavar="FILE", help="training rows, JSONL")
    add("--out", required=True, type=Path, metavar="FOLDER", help="where the adapter is saved; its name when served")
    add("--rank", type=int, default=8, metavar="N", help="rank of the adapter (default: 8)")
    add("--alpha", type=float, metavar="X", help="scale is alpha / rank (default: twice the rank)")
    add(
        "--targets",
        default="all-linear",
        metavar="NAMES",
        help="modules to adapt, separated by commas, such as q_proj,v_proj (default: all-linear)",
    )
    add("--epochs", type=int, default=3, metavar="N", help="passes over the data (default: 3)")
    add("--batch-size", type=int, default=8, metavar="N", help="rows per step (default: 8)")
    add(
        "--lr",
        type=float,
        default=1e-3,
        metavar="X",
        help="peak learning rate (default: 1e-3, right for small models; try 2e-4 from about 3B parameters on)",
    )
    add("--max-length", type=int, default=1024, metavar="N", help="tokens of a row; longer ones are cut (1024)")
    add("--eval", type=float, default=0.0, metavar="X", help="fraction of the rows held out to measure the loss (0)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the base (default: the faster)")
    add("--save-dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the file (default: bfloat16)")
    add("--base-name", metavar="NAME", help="base_model_name_or_path of the adapter (default: --base)")
    add("--raw", action="store_true", help="write prompts as they are, without the chat template")
    add("--seed", type=int, default=0, metavar="N", help="of weights, order and held-out rows (default: 0)")
    add("--overwrite", action="store_true", help="replace an adapter that --out already holds")
    args = parser.parse_args(argv)
    for name in ("rank", "epochs", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1.")
    if args.max_length < 2:
        parser.error(f"--max-length is {args.max_length}; it must be at least 2.")
    if not 0 <= args.eval < 1:
        parser.error(f"--eval is {args.eval:g}; it must be at least 0 and below 1.")
    for name in ("lr", "alpha"):
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            parser.error(f"--{name} is {value:g}; it must be a number above 0.")
    if not all(args.targets.split(",")):
        parser.error(f"--targets is {args.targets!r}; it must be module names separated by commas, or all-linear.")
    if args.out.is_file():
        parser.error(f"--out {args.out} is a file; it must be a folder.")
    if (args.out / "adapter_config.json").exists() and not args.overwrite:
        parser.error(f"--out {args.out} already holds an adapter; choose another folder, or add --overwrite.")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    rows = read_rows(args.data)
    if held_out(args.eval, len(rows)) >= len(rows):
        fail(f"--eval {args.eval:g} holds out all {len(rows)} rows of {args.data}; none is left for training.")
    try:
        train(args, rows)
    except ImportError as error:
        fail(f"{error}. Training needs the extra: pip install 'truffula[train]' (docs/training.md).")
    print(what_next(args, rows))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; nothing was saved.")
