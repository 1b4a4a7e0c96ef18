import json

import numpy as np
import pytest
from planted import ID, VOCABULARY, WORDS

from autointerp.errors import InputError
from autointerp.rules import CLASSES, Clause, Condition, Rule, describe, quoted, word_of

PATH = Condition(kind="token", offset=0, value=ID["path"])
OS = Condition(kind="token", offset=-2, value=ID["os"])
DOT = Condition(kind="token", offset=-1, value=ID["."])


def rule(*clauses):
    return Rule(clauses=tuple(Clause(conditions=c, score=s) for c, s in clauses))


def predict(rule, *words):
    tokens = np.array([[ID[word] for word in words]], np.uint32)
    return rule.predict(tokens, np.array([len(words)]), VOCABULARY)[0].tolist()


def slow_match(condition, row):
    """Whether a condition holds at each token, by definition."""
    found = []
    for i in range(len(row)):
        if condition.kind in ("line", "quoted", "column", "seen"):
            found.append(slow_line(condition, [WORDS[token] for token in row], i))
            continue
        if condition.kind == "recent":
            found.append(condition.value in row[max(0, i - condition.offset) : i])
            continue
        j = i + condition.offset
        text = WORDS[row[j]] if 0 <= j < len(row) else None
        found.append(
            text is not None
            and {
                "token": lambda text=text, j=j: row[j] == condition.value,
                "word": lambda text=text: word_of(text) == condition.value,
                "class": lambda text=text: CLASSES[condition.value][1](text),
            }[condition.kind]()
        )
    return found


def slow_line(condition, texts, i):
    """Whether a condition on the line, or on what came before, holds at token `i`, by definition."""
    if condition.kind == "seen":
        return texts[i] in texts[max(0, i - condition.offset) : i]
    breaks = [j for j in range(i + 1) if "\n" in texts[j]]
    if i in breaks:
        return False
    line = texts[breaks[-1] + 1 if breaks else 0 : i]
    if condition.kind == "column":
        return bool(breaks) and len(line) == condition.value
    if condition.kind == "line":
        return condition.value in [text.strip() for text in line]
    marks = [text for text in line if text.count('"') + text.count("'") == 1 and text != "'s"]
    return len(marks) % 2 == 1


QUOTES = ["\n", " a", "(", "'", "b", '"', "'s", " #", "c", "\n    ", '""', "a"]


class QuoteVocabulary(type(VOCABULARY)):
    def text(self, ids):
        return "".join(QUOTES[i] for i in ids)

    def __len__(self):
        return len(QUOTES)


@pytest.mark.parametrize(
    "condition",
    [
        Condition(kind="line", offset=0, value="#"),
        Condition(kind="line", offset=0, value="a"),
        Condition(kind="quoted", offset=0, value="line"),
        Condition(kind="column", offset=0, value=0),
        Condition(kind="column", offset=0, value=2),
        Condition(kind="seen", offset=3, value="same"),
        Condition(kind="seen", offset=50, value="same"),
    ],
)
def test_conditions_on_the_line_against_a_slow_oracle(condition):
    random = np.random.default_rng(0)
    tokens = random.integers(0, len(QUOTES), (60, 12)).astype(np.uint32)
    lengths = random.integers(1, 13, 60)
    found = rule(((condition,), 1.0)).predict(tokens, lengths, QuoteVocabulary())
    for row, length, result in zip(tokens.tolist(), lengths, found.tolist(), strict=True):
        texts = [QUOTES[token] for token in row[:length]]
        assert result[:length] == [slow_line(condition, texts, i) for i in range(length)], texts
        assert not any(result[length:])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "seen", "offset": 0, "value": "same"}, "how many tokens back"),
        ({"kind": "seen", "offset": 4, "value": "other"}, "expected 'same'"),
        ({"kind": "line", "offset": -1, "value": "#"}, "expected 0, since it concerns"),
        ({"kind": "column", "offset": 0, "value": "x"}, "a number of tokens"),
        ({"kind": "quoted", "offset": 0, "value": "always"}, "expected 'line'"),
    ],
)
def test_conditions_on_the_line_are_checked(values, message):
    text = json.dumps({"rule": 1, "any": [{"all": [values], "score": 1}]})
    with pytest.raises(InputError, match=message):
        Rule.from_json(text)


def test_conditions_on_the_line_in_words():
    def said(*conditions):
        return describe(rule((conditions, 1.0)), QuoteVocabulary())

    word = Condition(kind="word", offset=0, value="a")
    assert said(word, Condition(kind="line", offset=0, value="#")) == "`a` after `#` in the same line"
    assert said(word, Condition(kind="quoted", offset=0, value="line")) == "`a` inside quotation marks"
    assert said(Condition(kind="column", offset=0, value=1)) == "any token as token 2 of a line"
    assert said(word, Condition(kind="seen", offset=5, value="same")) == "`a` within 5 tokens after it came before"


def test_conjunction_looks_at_neighbours():
    found = predict(rule(((PATH, DOT, OS), 1.0)), "path", "os", ".", "path", ".", "path")
    assert found == [False, False, False, True, False, False]


def test_clauses_are_joined_by_or_and_scores_by_maximum():
    both = rule(((PATH,), 0.3), ((PATH, DOT), 0.9))
    tokens = np.array([[ID["path"], ID["."], ID["path"]]], np.uint32)
    assert both.scores(tokens, np.array([3]), VOCABULARY)[0] == pytest.approx([0.3, 0, 0.9])


@pytest.mark.parametrize(
    "condition",
    [
        Condition(kind="token", offset=1, value=3),
        Condition(kind="token", offset=-20, value=3),
        Condition(kind="word", offset=0, value="name"),
        Condition(kind="word", offset=-3, value="nowhere"),
        Condition(kind="class", offset=-1, value="digits"),
        Condition(kind="recent", offset=2, value=5),
        Condition(kind="recent", offset=50, value=5),
    ],
)
def test_every_kind_equals_its_definition(condition):
    tokens = np.random.default_rng(0).integers(0, len(WORDS), (30, 9)).astype(np.uint32)
    found = rule(((condition,), 1.0)).predict(tokens, np.full(30, 9), VOCABULARY)
    assert found.tolist() == [slow_match(condition, row.tolist()) for row in tokens]


def test_padding_never_matches_and_is_never_seen():
    # Padding is token 0, which is a word of the vocabulary as well.
    tokens = np.array([[ID["path"], 0, 0]], np.uint32)
    zero = rule(((Condition(kind="token", offset=0, value=0),), 1.0), ((Condition(kind="token", offset=1, value=0),), 1.0))
    assert not zero.predict(tokens, np.array([1]), VOCABULARY).any()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digits", {" 1", " 23"}),
        ("newline", {"\n    "}),
        ("indent", {"\n    "}),
        ("capitalised", {" Name"}),
        ("upper", {" NAME"}),
        ("opening", {"("}),
        ("closing", {")"}),
        ("underscore", {"_"}),
        ("wide", {" \u00e9t\u00e9"}),
    ],
)
def test_classes(name, words):
    assert {word for word in WORDS if CLASSES[name][1](word)} == words


def test_words_ignore_case_and_space():
    name = rule(((Condition(kind="word", offset=0, value="name"),), 1.0))
    assert predict(name, " Name", " NAME", " the") == [True, True, False]


def test_json_is_canonical_and_round_trips():
    original = rule(
        ((PATH, DOT, Condition(kind="recent", offset=8, value=4)), 0.5),
        ((Condition(kind="class", offset=0, value="hex"),), 0.25),
    )
    text = original.to_json()
    assert Rule.from_json(text) == original
    assert Rule.from_json(text).to_json() == text
    assert " " not in text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("no json", "not valid JSON"),
        ("[]", 'expected {"rule": 1'),
        ('{"rule":2,"any":[]}', "of this release"),
        ('{"rule":1,"any":[{"all":[],"score":1}]}', "a clause of a rule reads"),
        ('{"rule":1,"any":[{"all":[{"kind":"tokn","offset":0,"value":1}],"score":1}]}', "did you mean 'token'"),
        ('{"rule":1,"any":[{"all":[{"kind":"class","offset":0,"value":"digit"}],"score":1}]}', "did you mean 'digits'"),
        ('{"rule":1,"any":[{"all":[{"kind":"token","offset":0,"value":"x"}],"score":1}]}', "expected a token id"),
        ('{"rule":1,"any":[{"all":[{"kind":"token","offset":0.5,"value":1}],"score":1}]}', "offset 0.5"),
        ('{"rule":1,"any":[{"all":[{"kind":"recent","offset":-1,"value":1}],"score":1}]}', "1 or more"),
        ('{"rule":1,"any":[{"all":[{"kind":"token","offset":0,"value":1}],"score":2}]}', "from 0 to 1"),
        ('{"rule":1,"any":[{"all":[{"kind":"token","offset":0}],"score":1}]}', "the keys kind, offset and value"),
    ],
)
def test_bad_rules_are_refused_with_a_sentence(text, sentence):
    with pytest.raises(InputError, match=sentence.replace("{", r"\{").replace("[", r"\[")):
        Rule.from_json(text)


def test_rules_of_more_than_ten_clauses_are_refused():
    with pytest.raises(InputError, match="at most 10"):
        Rule.from_json(rule(*[((PATH,), 0.5)] * 11).to_json())


def test_description_in_words():
    assert describe(rule(((PATH, DOT, OS), 1.0)), VOCABULARY) == "`path` after `os.`"
    raised = rule(*[((Condition(kind="token", offset=0, value=ID[w]), DOT), 1.0) for w in (" cat", " the", "path")])
    assert describe(raised, VOCABULARY) == "` cat`, ` the` or `path` after `.`"
    assert describe(rule(((Condition(kind="class", offset=-1, value="digits"),), 1.0)), VOCABULARY) == "any token after digits"
    assert "before" in describe(rule(((PATH, Condition(kind="token", offset=1, value=ID["("])), 1.0)), VOCABULARY)


def test_quoted_text_is_one_line():
    assert quoted("a\n\tb\x1b") == "`a\\n\\tb\\x1b`"
    assert quoted(" \u00e9") == "` \u00e9`"
