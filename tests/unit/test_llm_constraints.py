"""What obeys a constraint, how one is written, and how one is held."""

import json
import re

import pytest

from autointerp.errors import ConfigError, Permanent
from autointerp.llm.constraints import conforms, wrap
from autointerp.llm.grammar import Grammar, to_regex
from autointerp.llm.thinking import reasoning_tokens, strip_thinking
from autointerp.records import Choice, JsonSchema, Regex


def schema(value):
    return JsonSchema(schema=json.dumps(value))


LIST = schema({"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 1}, "minItems": 3, "maxItems": 3})
OBJECT = schema(
    {
        "type": "object",
        "properties": {"why": {"type": "string", "maxLength": 20}, "score": {"type": "number"}, "ok": {"type": "boolean"}},
        "required": ["why", "score", "ok"],
        "additionalProperties": False,
    }
)

CASES = [
    (Choice(options=("yes", "no")), ["yes", "no"], ["Yes", " yes", "yes.", "", "yesno"]),
    (Regex(pattern="[01]{3}"), ["010"], ["01", "0101", "010\n", "x010"]),
    (
        LIST,
        ["[0,1,1]", "[0, 1, 0]"],
        ["[0,1]", "[0,1,1,1]", "[0,1,2]", "[0,1,true]", "[0,1,1", "0,1,1", "Sure: [0,1,1]", "[]", "[0,1,0.5]"],
    ),
    (
        OBJECT,
        ['{"why":"a \\"b\\" \\u00e9","score":-1.5,"ok":true}', '{"why": "", "score": 3, "ok": false}'],
        ['{"why":"a","score":1}', '{"why":1,"score":1,"ok":true}', '{"why":"a","score":1,"ok":1}', "{}", "[]", '{"why":"'],
    ),
    (schema({"enum": ["a", 1, None]}), ['"a"', "1", "null"], ["a", "true", '"1"', "2"]),
    (schema({"anyOf": [{"type": "null"}, {"const": "x"}]}), ["null", '"x"'], ['"y"']),
    (
        schema({"type": "array", "items": {"type": "string", "pattern": "^[ab]+$"}, "maxItems": 2}),
        ["[]", '["a"]', '["a","bb"]'],
        ['["c"]', '["a","a","a"]'],
    ),
    (schema({"type": "array", "items": {"type": "integer"}, "minItems": 1}), ["[-10]", "[1,2,3,4]"], ["[]", "[01]"]),
]


@pytest.mark.parametrize(("constraint", "good", "bad"), CASES)
def test_conforms(constraint, good, bad):
    assert all(conforms(constraint, text) for text in good), [text for text in good if not conforms(constraint, text)]
    assert not any(conforms(constraint, text) for text in bad), [text for text in bad if conforms(constraint, text)]


@pytest.mark.parametrize(("constraint", "good", "bad"), CASES)
def test_a_grammar_begins_every_good_reply_and_completes_no_bad_one(constraint, good, bad):
    grammar = Grammar(constraint)
    for text in good:
        assert all(grammar.may_begin(text[:cut]) for cut in range(len(text) + 1)), text
        assert grammar.is_complete(text)
        assert re.fullmatch(to_regex(constraint), text)
    assert not any(grammar.is_complete(text) for text in bad), [text for text in bad if grammar.is_complete(text)]


def test_no_constraint_is_obeyed_by_all():
    assert conforms(None, "anything")


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(ConfigError, match=r"keyword '\$ref' is not supported"):
        conforms(schema({"$ref": "#/x"}), "1")
    with pytest.raises(ConfigError, match="not a regular expression"):
        conforms(Regex(pattern="("), "1")
    for odd in ({"type": "integer", "minimum": 3}, {"type": "number", "minimum": 0}, {"type": "array"}, {"$ref": "x"}, {}):
        with pytest.raises(Permanent, match="cannot hold a reply to this JSON schema"):
            to_regex(schema(odd))


@pytest.mark.parametrize(
    ("constraint", "reply", "answer"),
    [
        (Choice(options=("yes", "no")), '{"answer":"no"}', "no"),
        (Choice(options=("yes", "no")), "no", "no"),
        (Choice(options=("yes", "no")), '{"answer":"no","why":"x"}', '{"answer":"no","why":"x"}'),
        (Choice(options=("yes", "no")), '{"answer":1}', '{"answer":1}'),
        (Regex(pattern="[01]+"), '{"answer": "01"}', "01"),
        (LIST, '{"answer": [0, 1, 1]}', "[0,1,1]"),
        (LIST, "[0, 1, 1]", "[0, 1, 1]"),
        (OBJECT, '{"why": "a", "score": 1, "ok": true}', '{"why": "a", "score": 1, "ok": true}'),
    ],
)
def test_a_standard_server_wraps_and_we_unwrap(constraint, reply, answer):
    wrapped = wrap(constraint)
    assert wrapped.schema["type"] == "object"
    assert wrapped.unwrap(reply) == answer


@pytest.mark.parametrize(
    ("text", "answer", "is_open"),
    [
        ("plain", "plain", False),
        ("<think>a</think>\n\nb", "b", False),
        (" \n<think>\na\n</think>b", "b", False),
        ("a, so</think>\n\nb", "b", False),
        ("<think>a</think><think>c</think> b", "b", False),
        ("<think></think>\n\nb", "b", False),
        ("<thinking>a</thinking>b", "b", False),
        ("<think>on and on", "", True),
        ("<think>a</think>", "", False),
        ('Fires on "<think>" tags', 'Fires on "<think>" tags', False),
        ('Fires on "</think>" tags', 'Fires on "</think>" tags', False),
        ("Fires on <think> tags", "Fires on <think> tags", False),
        ("<think>a</think>Fires on `</think>` tags", "Fires on `</think>` tags", False),
        ("<think>a</think>Fires on </think> tags", "Fires on </think> tags", False),
        ("", "", False),
    ],
)
def test_thinking_is_taken_off(text, answer, is_open):
    stripped = strip_thinking(text)
    assert (stripped.text, stripped.is_open) == (answer, is_open)
    assert stripped.num_thinking_chars == (0 if answer == text else len(text) - len(answer))


def test_thinking_is_counted_by_its_share():
    assert reasoning_tokens(100, 75, 100) == 75
    assert reasoning_tokens(100, 0, 100) == 0
    assert reasoning_tokens(0, 5, 5) == 0
