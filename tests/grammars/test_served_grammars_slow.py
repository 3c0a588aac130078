"""Every schema, regex, choice and grammar of the corpus through engines, in mixed batches and alone."""

import json
import re

import pytest
from corpus import GRAMMARS, REGEXES, SCHEMAS, compiled_suite
from oracle import is_valid
from served import OPTIONS, write_model
from test_walks import CLASSES, OTHER_SYNTAX
from walker import compiled, small

from truffula import LLM, SamplingParams
from truffula.errors import InvalidRequest
from truffula.items import Constraint

pytestmark = pytest.mark.slow
CHOICES = [["yes", "no"], ["a", "ab", "abc"], ["é", "日本", "😀", 'q"'], [f"{i}" for i in range(2000)]]


def matches(pattern, text):
    python = re.sub(r"\\(p\{\w+\}|.)", lambda found: CLASSES.get(found[0], found[0]), pattern, flags=re.DOTALL)
    return re.fullmatch(python, text) is not None or re.search(r"\\[wWp]", pattern) is not None


def cases():
    """A constraint, and whether a text meets it, by another judge than llguidance where there is one."""
    for schema in SCHEMAS:
        yield Constraint(kind="json_schema", value=json.dumps(schema)), lambda text, s=schema: is_valid(s, text)
    for case, source in compiled_suite():
        if isinstance(source, InvalidRequest) or case.name.startswith(OTHER_SYNTAX) or r"\p{" in str(case.schema):
            continue
        yield (
            Constraint(kind="json_schema", value=json.dumps(case.schema)),
            lambda text, s=case.schema: is_valid(s, text),
        )
    yield Constraint(kind="json_object"), lambda text: isinstance(json.loads(text), dict)
    for pattern in REGEXES:
        yield Constraint(kind="regex", value=pattern), lambda text, p=pattern: matches(p, text)
    for choices in CHOICES:
        yield Constraint(kind="choice", value=json.dumps(choices)), lambda text, c=choices: text in c
    for grammar, _, _ in GRAMMARS:
        source = compiled("lark", grammar)
        yield Constraint(kind="lark", value=grammar), lambda text, s=source: small().accepts(s, text)


@pytest.fixture(scope="module", params=["random", "random in a process", "smollm2"])
def llm(request, tmp_path_factory):
    if request.param == "smollm2":
        model, options = "smollm2", {"max_model_len": 512}
    else:
        model = write_model(tmp_path_factory.mktemp("grammars") / "model")
        options = OPTIONS | {"max_model_len": 512, "max_running": 24}
    with LLM(model, transport="process" if "process" in request.param else "inline", **options) as made:
        yield made


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.5])
def test_every_answer_that_ended_by_stop_is_valid(llm, temperature):
    trained = "smollm2" in llm.info.model.lower()
    listed = list(cases())[:: 3 if trained else 1]
    given, params = [], []
    for number, (constraint, _) in enumerate([*listed, *((None, None) for _ in range(40))]):
        given.append({"prompt": f"Item {number % 7}:", "constraint": constraint})
        params.append(SamplingParams(max_tokens=120, temperature=temperature, seed=number))
    order = sorted(range(len(given)), key=lambda number: number * 2654435761 % 2**32)  # free ones among the others
    found = llm._run([given[i] for i in order], [params[i] for i in order], None, "return", False)
    outputs = [output for _, output in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]
    ended = 0
    for (constraint, valid), output in zip(listed, outputs, strict=False):
        assert not isinstance(output, Exception), f"{constraint.value}: {output}"
        if output.finish_reason == "stop":
            ended += 1
            assert valid(output.text), f"{constraint.kind} {constraint.value}: {output.text}"
    print(f"{ended} of {len(listed)} answers ended by stop")
    assert ended > (0.4 if trained else 0.6) * len(listed)  # a trained model fills strings without a bound
    for number in range(0, len(listed), 40):
        (alone,) = llm._run([given[number]], [params[number]], None, "return", False)
        if not trained:  # there the batch decides over the last bit of a logit
            assert alone.text == outputs[number].text
        assert alone.finish_reason != "stop" or listed[number][1](alone.text)
