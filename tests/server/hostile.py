"""Bodies by which a client could occupy a server, or deceive it: path, body and the parameter that the error names.

None as the parameter: the body is not read that far.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

TALK = [{"role": "user", "content": "Hello"}]
CHAT, COMPLETION, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, COUNT, DECISIONS, NATIVE = "/v1/messages", "/v1/messages/count_tokens", "/v1/decisions", "/generate"
LOAD = "/v1/load_lora_adapter"
GENERATING: dict[str, dict[str, Any]] = {
    CHAT: {"messages": TALK, "max_tokens": 2},
    COMPLETION: {"prompt": "Hello", "max_tokens": 2},
    RESPONSES: {"input": "Hello", "max_output_tokens": 2},
    MESSAGES: {"messages": TALK, "max_tokens": 2},
    NATIVE: {"inputs": "Hello", "parameters": {"max_new_tokens": 2}},
}
INJECTION = "pirate\r\nset-cookie: injected=1\r\n\r\n<html>"
HUGE = 10**9


def doubled(levels: int) -> dict[str, Any]:
    """A schema that is two of the next, which is two of the next: 2 to the power of ``levels`` in all."""
    rows = {
        f"a{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/a{i + 1}"}] * 2, "items": False, "minItems": 2}
        for i in range(levels)
    }
    return {"$ref": "#/$defs/a0", "$defs": {**rows, f"a{levels}": {"type": "integer"}}}


def nested(levels: int) -> Any:
    value: Any = {"type": "string"}
    for _ in range(levels):
        value = {"type": "array", "items": value}
    return value


NODE = {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}
SCHEMAS: dict[str, Any] = {
    "refers to itself for ever": {"$ref": "#/$defs/n", "$defs": {"n": NODE}},
    "refers to itself": {"$ref": "#"},
    "doubles 40 times": doubled(40),
    "100,000 values": {"enum": [f"value {i}" for i in range(100_000)]},
    "20,000 properties": {"type": "object", "properties": {f"p{i}": {} for i in range(20_000)}},
    "a million items": {"type": "array", "items": {"type": "integer"}, "minItems": 10**6},
    "nested 900 times": nested(900),
    "a pattern of a million": {"type": "string", "pattern": "^(a|b){1,1000000}$"},
    "patterns in patterns": {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
}
REGEXES = {
    "a million": "a{1,1000000}",
    "to the third": "((a{1,1000}){1,1000}){1,1000}",
    "5,000 groups": "(" * 5000 + "a" + ")" * 5000,
    "nested stars": "(((((a*)*)*)*)*)*b" * 50,
    "a long class": "[" + "".join(f"\\u{i:04x}-\\u{i + 1:04x}" for i in range(0x1000, 0x9000, 4)) + "]{1,500}",
    "a backslash": "\\",
}
GRAMMARS = {
    "50,000 rules": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(50_000)) + 'r50000: "a"\n',
    "circles": 'start: a\na: b "x"\nb: a "y"',
    "doubling": "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(40)) + 'r40: "a"\n',
}


def constrained(path: str, kind: str, value: Any) -> tuple[dict[str, Any], str]:
    """The body that asks for an answer of a kind (``schema``, ``regex``, ``grammar``), and the field in it."""
    body = json.loads(json.dumps(GENERATING[path]))
    if path == NATIVE:
        body["parameters"]["grammar"] = {"type": "json" if kind == "schema" else "regex", "value": value}
        return body, "grammar"
    if path == MESSAGES:
        return {**body, "output_format": {"type": "json_schema", "schema": value}}, "output_format"
    if path == RESPONSES and kind == "schema":
        return {**body, "text": {"format": {"type": "json_schema", "name": "a", "schema": value}}}, "text.format"
    name = {"schema": "guided_json", "regex": "guided_regex", "grammar": "guided_grammar"}[kind]
    return {**body, name: value}, name


def bombs() -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """Constraints that would take very long or very much memory: name, path, body, parameter."""
    for table, kind in ((SCHEMAS, "schema"), (REGEXES, "regex"), (GRAMMARS, "grammar")):
        paths = [
            p
            for p in GENERATING
            if kind == "schema" or p in (CHAT, COMPLETION, RESPONSES) or (p == NATIVE and kind == "regex")
        ]
        for index, (name, value) in enumerate(table.items()):
            path = paths[index % len(paths)]
            yield (f"{kind}: {name}", path, *constrained(path, kind, value))


def large() -> Iterator[tuple[str, str, dict[str, Any], str | None]]:
    """Fields that are too many, too long or too deep."""
    for path, body in GENERATING.items():
        stop = "stop_sequences" if path == MESSAGES else "stop"
        inner = "parameters" if path == NATIVE else ""

        def put(name: str, value: Any, body: dict[str, Any] = body, inner: str = inner) -> dict[str, Any]:
            return {**body, inner: {**body[inner], name: value}} if inner else {**body, name: value}

        yield "a million stop strings", path, put(stop, ["a"] * 10**6), None
        yield "100,000 stop strings", path, put(stop, ["a"] * 10**5), stop
        yield "a long stop string", path, put(stop, ["a" * 10**6]), stop
        yield "deep", path, {**body, "wish": nested(20_000)}, None
        yield "10,000 keys", path, {**body, **{f"k{i}": 1 for i in range(10_000)}}, None
        yield "a long model", path, {**body, "model": "m" * 10**6}, "model"
        yield "a wide bias", path, put("logit_bias", {str(i): 1.0 for i in range(50_000)}), "logit_bias"
    for path, name in ((CHAT, "n"), (COMPLETION, "n"), (COMPLETION, "best_of"), (CHAT, "prompt_logprobs")):
        yield f"{name} is huge", path, {**GENERATING[path], name: HUGE}, name
    for path, name in ((CHAT, "seed"), (COMPLETION, "max_tokens"), (RESPONSES, "max_output_tokens"), (CHAT, "top_k")):
        yield f"{name} of 400 digits", path, {**GENERATING[path], name: 10**400}, name
    native = {"best_of": HUGE, "top_n_tokens": HUGE, "truncate": HUGE, "max_new_tokens": HUGE}
    for name, value in native.items():
        yield f"{name} is huge", NATIVE, {"inputs": "a", "parameters": {name: value}}, name
    yield "300,000 prompts", COMPLETION, {"prompt": ["a"] * 300_000}, "prompt"
    yield (
        "100,000 questions",
        DECISIONS,
        {"input": "a", "questions": [{"type": "predicate", "instructions": "b"}] * 30_000},
        "questions",
    )
    question = {"type": "choice", "instructions": "b", "choices": [{"value": str(i)} for i in range(20_000)]}
    yield "20,000 choices", DECISIONS, {"input": "a", "questions": [question]}, "questions[0].choices"
    yield "a million ids", "/detokenize", {"tokens": [5] * 1_000_000}, None
    yield "ids of no token", "/detokenize", {"tokens": [HUGE, -1]}, "tokens"


def words() -> Iterator[tuple[str, str, bytes, str | None]]:
    """Bodies, as they are sent, with characters that are none, that end strings, or that begin a header."""
    for path, body in {**GENERATING, COUNT: {"messages": TALK}, "/tokenize": {"inputs": "a"}}.items():
        raw = json.dumps(body)
        yield "a lone surrogate", path, raw.replace("Hello", "\\ud800").replace('"a"', '"\\ud800"').encode(), None
        yield "a lone surrogate in a key", path, raw.replace("{", '{"\\udfff": 1, ', 1).encode(), None
        yield "an adapter that is a header", path, json.dumps({**body, "model": INJECTION}).encode(), "model"
        yield "an adapter with NUL", path, json.dumps({**body, "model": "pi\0rate"}).encode(), "model"
        yield (
            "not UTF-8",
            path,
            raw.replace("Hello", "\udcff").replace('"a"', '"\udcff"').encode("utf-8", "surrogateescape"),
            None,
        )
        yield "a key twice", path, (raw[:-1] + ', "model": "a", "model": "b"}').encode(), "model"
    for name in (INJECTION, "a\0b", "../../etc/passwd", "a" * 10**5, "\u202egnp", ""):
        yield f"loading {name[:12]!r}", LOAD, json.dumps({"lora_name": name, "lora_path": "/nowhere"}).encode(), None
    for place in ("/proc/self/mem", "/dev/zero", "\0", "~root", INJECTION):
        yield f"loading from {place[:12]!r}", LOAD, json.dumps({"lora_name": "new", "lora_path": place}).encode(), None
