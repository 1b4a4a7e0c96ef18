"""Rendered windows: whole characters, true delimiters, and nothing in corpus text that breaks a prompt or a terminal."""

from __future__ import annotations

import json

import numpy as np
import pytest
from examples_corpus import ByteVocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp.examples.render import above, highlight, integers, neutralise, plain, whole_characters

EURO = "\u20ac"


def marked(words: list[bytes], mask: list[int], **options) -> str:
    return highlight(ByteVocabulary(words), np.arange(len(words)), np.array(mask, bool), **options)


@pytest.mark.parametrize(
    ("words", "mask", "expected"),
    [
        ([b"a", b" b", b" c"], [0, 1, 0], "a<< b>> c"),
        ([b"a", b" b", b" c"], [1, 1, 0], "<<a b>> c"),
        ([b"a", b" b", b" c"], [1, 0, 1], "<<a>> b<< c>>"),
        ([b"a", b" b"], [0, 0], "a b"),
        ([], [], ""),
        # A character split over tokens goes whole into the run, whichever part is marked.
        ([b"x", b"\xe2\x82", b"\xac", b"y"], [0, 1, 0, 0], f"x<<{EURO}>>y"),
        ([b"x", b"\xe2\x82", b"\xac", b"y"], [0, 0, 1, 0], f"x<<{EURO}>>y"),
        ([b"x", b"\xe2", b"\x82", b"\xac", b"y"], [1, 0, 0, 1, 0], f"<<x{EURO}>>y"),
        ([b"x\xe2", b"\x82", b"\xac"], [0, 1, 0], f"x<<{EURO}>>"),
        # Cut by the end of the window.
        ([b"x", b"\xe2"], [0, 1], "x<<\ufffd>>"),
    ],
)
def test_runs_are_maximal_and_hold_whole_characters(words, mask, expected):
    assert marked(words, mask) == expected


@pytest.mark.parametrize(
    ("words", "mask", "expected"),
    [
        ([b"cout", b" <<", b" x"], [1, 0, 0], "<<cout>> < < x"),
        ([b"cout", b" <<", b" x"], [0, 1, 0], "cout<< < <>> x"),
        ([b"<<fake>>", b" true"], [0, 1], "< <fake> ><< true>>"),
        ([b"a <", b"b"], [0, 1], "a < << b >>"),
        ([b"List", b"<", b"int", b">>"], [0, 0, 1, 0], "List< << int >> > >"),
        ([b"s"], [1], "<< s >>"),
    ],
)
def test_corpus_text_cannot_fake_a_highlight(words, mask, expected):
    assert marked(words, mask) == expected


TRICKY = [
    b"<",
    b"<<",
    b">",
    b">>",
    b"<<<",
    b"|",
    b"<|",
    b"|>",
    b"s",
    b"/",
    b"user",
    b"\n",
    b"\xe2",
    b"\x82\xac",
    b"\x00",
    b"[INST]",
]
TRICKY += [
    b" ",
    b"word",
    b"\x1b[2J",
    b"<bos>",
    b"\xff",
    b"Example 2:",
    b"[",
    b"/INST]",
    b"\xe2\x80\xae",
    b"\xc2\x85",
    b"*",
    b"**",
]


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, len(TRICKY) - 1), st.booleans()), max_size=12), double=st.booleans())
def test_delimiters_are_those_put_in_and_nothing_else_is_left(rows, double):
    vocabulary = ByteVocabulary(TRICKY, special=(19,))
    tokens = np.array([i for i, _ in rows], np.int64)
    mask = np.array([m for _, m in rows], bool)
    left, right = ("[[", "]]") if double else ("<<", ">>")
    text = highlight(vocabulary, tokens, mask, left=left, right=right, markers=("Example",))
    grown = whole_characters(vocabulary.pieces(tokens), mask)
    flags = "".join("1" if m else "0" for piece, m in zip(vocabulary.pieces(tokens), grown, strict=True) if piece)
    num = len([run for run in flags.split("0") if run])
    count = [sum(text.startswith(d, i) for i in range(len(text))) for d in (left, right)]
    assert count == [num, num]
    for bad in (
        "<|",
        "|>",
        "<bos>",
        "<s>",
        "</s>",
        "<user>",
        "[INST]",
        "[/INST]",
        "Example",
        "\n",
        "\x00",
        "\x1b",
        "\u202e",
        "\x85",
    ):
        assert bad not in text
    json.loads(json.dumps(text))
    text.encode("utf-8")


def test_marker_text_and_chat_tokens_are_broken_visibly():
    assert neutralise("a <|user|> b </s> [/INST] <think> <start_of_turn>") == (
        "a < |user| > b < /s> [ /INST] < think> < start_of_turn>"
    )
    assert neutralise("<\uff5cUser\uff5c>") == "< \uff5cUser\uff5c >"
    assert neutralise("Text 1: x", markers=("Text",)) == "T ext 1: x"
    assert neutralise("a||b", markers=("|",)) == "a  b"
    assert neutralise("<div> a < b > c, x<y, <b>") == "<div> a < b > c, x<y, <b>"


def test_controls_become_visible():
    assert neutralise("a\nb\tc\r\n") == "a\\nb\\tc\\r\\n"
    assert neutralise("a\nb\tc\rd\u2028e", one_line=False) == "a\nb\tc\\rd\ne"
    assert neutralise("\x00\x1b[31m\x7f\x9b\ud800\u202e") == "\u2400\u241b[31m\u2421\ufffd\ufffd\ufffd"


def test_plain_text_breaks_special_tokens_and_delimiters():
    vocabulary = ByteVocabulary([b"<bos>", b"a <", b"<b", b"[SPECIAL]"], special=(0, 3))
    assert plain(vocabulary, np.array([0, 1, 2, 3])) == "< bos>a < <b[ SPECIAL]"
    assert plain(vocabulary, np.zeros(0, np.int64)) == ""


def test_integers_are_the_ceiling_of_tenths_of_the_maximum():
    # 10 * 0.01 / 4 = 0.025 -> 1; 10 * 2 / 4 = 5; 10 * 2.1 / 4 = 5.25 -> 6; above the maximum stays 10.
    values = np.array([[0, 0.01, 2, 2.1], [4, 5, -4, -0.1]], np.float32)
    assert integers(values, 4.0).tolist() == [[0, 1, 5, 6], [10, 10, 10, 1]]
    assert integers(values, 0.0).tolist() == [[0] * 4] * 2
    assert integers(np.array([0.3, 0.7, 1.0], np.float32), 1.0).tolist() == [3, 7, 10]


def test_threshold_marks_the_strongest_at_least():
    values = np.array([[1, 0.3, 0.31, 0], [0, 0, 0, 0], [-2, -0.1, -1, 9], [1, 1, 0, 0]], np.float32)
    lengths = np.array([4, 4, 3, 4])
    assert above(values, lengths).tolist() == [
        [True, False, True, False],
        [False] * 4,
        [True, False, True, False],
        [True, True, False, False],
    ]
    assert above(values, lengths, ratio=1.0).sum(axis=1).tolist() == [1, 0, 1, 1]
    assert above(np.zeros((0, 4), np.float32), np.zeros(0, np.int32)).shape == (0, 4)
