"""lm-eval: log-likelihoods and generations of completions and chats equal what the server says of them elsewhere."""

from __future__ import annotations

import json
import urllib.request

import requests
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from scenario import ADAPTER, BASE, QUESTION, TALK, URL, differ, raises

TEXTS = [("The Lorax spoke", " for the trees"), ("The Lorax spoke", " for them."), ("東京の", "空 🌲"), ("", "Hello")]
RETRIES = {"max_retries": 1, "num_concurrent": 1}


def post(path: str, **body: object) -> dict:
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request))


def completions(model: str, **more: object) -> object:
    return get_model("local-completions")(base_url=f"{URL}/v1/completions", model=model, **RETRIES | more)


def ask(model: object, kind: str, arguments: tuple) -> list:
    asked = [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]
    return getattr(model, kind)(asked, disable_tqdm=True)


def ids(text: str) -> list[int]:
    return post("/tokenize", prompt=text, add_special_tokens=False)["tokens"]


def scored(model: str, context: str, text: str) -> tuple[float, bool]:
    """The log-likelihood of ``text``, and whether it is the likeliest one, from ``prompt_logprobs``."""
    before, whole = ids(context), ids(context + text)
    if context:
        whole = before + whole[len(before) :]  # as lm-eval cuts it
    else:
        before = [completions(model).prefix_token_id]
        whole = before + whole
    rows = post("/v1/completions", model=model, prompt=whole, max_tokens=1, prompt_logprobs=1)
    rows = rows["choices"][0].get("prompt_logprobs") or rows["prompt_logprobs"]
    pairs = list(zip(rows, whole, strict=True))[len(before) :]
    chosen = [row[str(token)]["logprob"] for row, token in pairs]
    best = [max(entry["logprob"] for entry in row.values()) for row, _ in pairs]
    return sum(chosen), chosen == best


def likelihoods() -> None:
    for name in (BASE, ADAPTER):
        for more in ({}, {"batch_size": 4}, {"num_concurrent": 4}):
            found = ask(completions(name, **more), "loglikelihood", TEXTS)
            for (score, greedy), text in zip(found, TEXTS, strict=True):
                expected, likeliest = scored(name, *text)
                assert abs(score - expected) < 1e-3 and greedy == likeliest, (name, text, score, expected)
    assert ask(completions(BASE), "loglikelihood", TEXTS) != ask(completions(ADAPTER), "loglikelihood", TEXTS)
    (rolling,) = ask(completions(ADAPTER), "loglikelihood_rolling", [("The Lorax spoke for the trees",)])
    assert abs(rolling - scored(ADAPTER, "", "The Lorax spoke for the trees")[0]) < 1e-3


def generations() -> None:
    limits = {"max_gen_toks": 12, "until": ["\n"]}
    text = differ(lambda name: ask(completions(name), "generate_until", [(QUESTION, dict(limits))])[0])
    whole = post("/v1/completions", model=ADAPTER, prompt=ids(QUESTION), max_tokens=12, temperature=0, stop=["\n"])
    assert whole["choices"][0]["text"] == text
    chat = get_model("local-chat-completions")(base_url=f"{URL}/v1/chat/completions", model=ADAPTER, **RETRIES)
    prompt = chat.apply_chat_template(TALK)
    (text,) = ask(chat, "generate_until", [(prompt, dict(limits))])
    whole = post("/v1/chat/completions", model=ADAPTER, messages=TALK, max_tokens=12, temperature=0, stop=["\n"])
    assert whole["choices"][0]["message"]["content"] == text


likelihoods()
generations()
raises(requests.HTTPError, lambda: ask(completions("missing"), "loglikelihood", TEXTS[:1]), "404")
