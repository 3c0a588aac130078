"""``/v1/decisions`` with the real openai client."""

import math
import threading

import openai
import pytest
from live_server import MODEL, serving
from openai.types import Decision

CHOICES = [{"value": "Lorax", "description": "small"}, {"value": True}, {"value": "true"}]
LEVELS = [{"label": "dark"}, {"label": "dim"}, {"label": "bright"}]
QUESTIONS = [
    {"type": "predicate", "instructions": "The text names a colour.", "name": "colour"},
    {"type": "choice", "instructions": "Who speaks?", "choices": CHOICES},
    {"type": "score", "instructions": [{"type": "input_text", "text": "How bright?"}], "levels": LEVELS},
]
INPUT = "The trees were bright."


@pytest.fixture(scope="module")
def live(long_model_folder, adapter_folders):
    with serving(long_model_folder, adapters={"pirate": str(adapter_folders["pirate"])}, backend="auto") as found:
        yield found


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="EMPTY", max_retries=0) as made:
        yield made


def ask(client, **more):
    return client.decisions.create(**{"model": MODEL, "input": INPUT, "questions": QUESTIONS, **more})


def test_answers_are_of_the_clients_types_and_in_the_order_of_the_questions(client):
    found = ask(client)
    Decision.model_validate(found.model_dump(), strict=True)
    predicate, choice, score = found.answers
    assert predicate.type == "predicate" and predicate.name == "colour" and 0 < predicate.probability < 1
    assert [row.value for row in choice.probabilities] == ["Lorax", True, "true"]
    assert choice.choice == max(choice.probabilities, key=lambda row: row.probability).value
    assert [(row.label, row.value) for row in score.probabilities] == [("dark", 1), ("dim", 2), ("bright", 3)]
    assert score.score == pytest.approx(sum(row.value * row.probability for row in score.probabilities))
    for answer in (choice, score):
        assert sum(row.probability for row in answer.probabilities) == pytest.approx(1)
        assert answer.confidence == max(row.probability for row in answer.probabilities)
    assert found.usage.output_tokens == 3 and found.model == MODEL


def test_the_probabilities_are_those_of_the_letters(live, client):
    """Against the scores of the prompt with each letter after it."""
    (answer,) = ask(client, questions=[QUESTIONS[0]]).answers
    asked = f"{INPUT}\nTrue or false? The text names a colour.\n\nOptions:\nA. true\n"
    asked += "B. false\n\nAnswer with one letter."
    prompt = live.post("/tokenize", {"messages": [{"role": "user", "content": asked}]}).json()["tokens"]

    def score(letter):
        (token,) = live.post("/tokenize", {"prompt": letter, "add_special_tokens": False}).json()["tokens"]
        found = live.completion(prompt=[*prompt, token], echo=True, logprobs=0, max_tokens=0)
        return found["choices"][0]["logprobs"]["token_logprobs"][-1]

    assert answer.probability == pytest.approx(1 / (1 + math.exp(score("B") - score("A"))), abs=1e-4)


def test_probabilities_do_not_move_with_the_batch(live, client):
    alone = ask(client).answers
    stop = threading.Event()

    def load():
        while not stop.is_set():
            live.completion(prompt=["Hello", "The Lorax", "spoke"], max_tokens=20)

    busy = threading.Thread(target=load)
    busy.start()
    try:
        for _ in range(5):
            assert ask(client).answers == alone
    finally:
        stop.set()
        busy.join()
    assert [ask(client, questions=[one]).answers[0] for one in QUESTIONS] == alone
    assert ask(client, model="pirate").answers != alone


def test_a_conversation_with_calls_of_tools_is_an_input(client):
    talk = [
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "Weather?"}, {"type": "input_json", "data": {"a": 1}}],
        },
        {"role": "assistant", "content": [{"type": "output_text", "text": "Bright."}]},
    ]
    assert len(ask(client, input=talk).answers) == 3


def question(kind, **more):
    return {"questions": [{"type": kind, "instructions": "?", **more}]}


IMAGE = [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"questions": []}, "questions"),
        (question("choice", choices=[{"value": "a"}]), "questions[0].choices"),
        (question("choice", choices=[{"value": "a"}] * 2), "questions[0].choices"),
        (question("score", levels=[{"label": "a"}, {}]), "questions[0].levels[1].label"),
        (question("essay"), "questions[0].type"),
        ({"input": IMAGE}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "5"}]}, "input[0].call_id"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_errors_name_the_field(client, body, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **body)
    assert caught.value.param == param
