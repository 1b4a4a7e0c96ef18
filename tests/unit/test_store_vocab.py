"""Tokens as text: pieces always join to the text, whatever the bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp.errors import InputError, StoreError
from autointerp.protocols import Vocabulary
from autointerp.store import StoreVocabulary, write_vocabulary

EURO = "\u20ac".encode()
TOKENS = [b"a", b" the", EURO, EURO[:1], EURO[1:], EURO[1:2], EURO[2:], b"\xff", b"", b"\xe2A", b"<s>"]


def vocabulary():
    return StoreVocabulary(TOKENS, [token == b"<s>" for token in TOKENS])


@given(st.lists(st.integers(0, len(TOKENS) - 1), max_size=12))
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_text(ids):
    pieces = vocabulary().pieces(np.array(ids, np.uint32))
    assert len(pieces) == len(ids)
    assert "".join(pieces) == vocabulary().text(np.array(ids, np.uint32))


@given(st.lists(st.binary(max_size=4), min_size=1, max_size=8))
@settings(max_examples=300, deadline=None)
def test_pieces_join_for_any_bytes(tokens):
    found = StoreVocabulary(tokens, [False] * len(tokens))
    ids = np.arange(len(tokens))
    assert "".join(found.pieces(ids)) == found.text(ids) == b"".join(tokens).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("ids", "pieces"),
    [
        ([], []),
        ([0, 1], ["a", " the"]),
        ([0, 2], ["a", "\u20ac"]),
        ([3, 4, 0], ["", "\u20ac", "a"]),
        ([3, 5, 6], ["", "", "\u20ac"]),
        ([3, 0], ["", "\ufffda"]),
        ([0, 3], ["a", "\ufffd"]),
        ([7, 8], ["\ufffd", ""]),
        ([0, 10], ["a", "<s>"]),
    ],
)
def test_a_split_character_belongs_to_its_last_token(ids, pieces):
    assert vocabulary().pieces(np.array(ids, np.uint32)) == pieces


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_pieces_of_many_windows_are_those_of_each(data):
    lengths = data.draw(st.lists(st.integers(0, 6), max_size=5))
    row = st.lists(st.integers(0, len(TOKENS) - 1), min_size=6, max_size=6)
    tokens = np.array([data.draw(row) for _ in lengths], np.uint32).reshape(len(lengths), 6)
    found = vocabulary().pieces_of(tokens, np.array(lengths, np.int32))
    assert found == [vocabulary().pieces(ids[:length]) for ids, length in zip(tokens, lengths, strict=True)]


def test_pieces_of_another_tokenizer():
    with pytest.raises(InputError, match="not all in the store's vocabulary of 11 tokens"):
        vocabulary().pieces_of(np.array([[0, 11]], np.uint32), np.array([2]))


def test_special_tokens_keep_the_shape():
    assert vocabulary().is_special(np.array([[0, 10], [10, 3]], np.uint32)).tolist() == [[False, True], [True, False]]
    assert len(vocabulary()) == len(TOKENS)
    found: Vocabulary = vocabulary()
    assert found.text(np.array([0])) == "a"


def test_ids_of_another_tokenizer():
    for ids in ([0, 11], [-1]):
        with pytest.raises(InputError, match="not all in the store's vocabulary of 11 tokens"):
            vocabulary().pieces(np.array(ids))
        with pytest.raises(InputError, match="not all in the store's vocabulary of 11 tokens"):
            vocabulary().is_special(np.array(ids))


def test_written_and_read(tmp_path):
    write_vocabulary(tmp_path, TOKENS, [False] * 10 + [True])
    found = StoreVocabulary.read(tmp_path / "vocab.parquet")
    ids = np.arange(len(TOKENS))
    assert found.text(ids) == vocabulary().text(ids) and found.is_special(ids).tolist() == [False] * 10 + [True]
    with pytest.raises(StoreError, match=r"none.parquet is missing"):
        StoreVocabulary.read(tmp_path / "none.parquet")
    with pytest.raises(InputError, match="11 tokens and 1 special flags"):
        write_vocabulary(tmp_path, TOKENS, [True])
