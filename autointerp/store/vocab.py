"""The vocabulary inside a store: the bytes of every token, so that readers need neither tokenizer nor hub.

Tokens are joined as bytes and decoded once, with U+FFFD for what is no UTF-8, so characters split over tokens survive.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from autointerp.errors import InputError
from autointerp.store.layout import FileEntry
from autointerp.store.parquet import read_table, write_table

VOCABULARY = pa.schema([("token_id", pa.uint32()), ("bytes", pa.binary()), ("text", pa.string()), ("is_special", pa.bool_())])
"""One row per token id from 0; ``text`` is the bytes decoded alone, for people."""


def write_vocabulary(folder: Path, token_bytes: Sequence[bytes], is_special: Sequence[bool]) -> FileEntry:
    """Commit ``vocab.parquet`` to a folder; the index in both lists is the token id."""
    if len(token_bytes) != len(is_special):
        raise InputError(f"{len(token_bytes)} tokens and {len(is_special)} special flags were given; expected as many of each")
    columns = [
        pa.array(np.arange(len(token_bytes), dtype=np.uint32)),
        pa.array(list(token_bytes), pa.binary()),
        pa.array([value.decode("utf-8", "replace") for value in token_bytes], pa.string()),
        pa.array(np.asarray(is_special, dtype=bool)),
    ]
    return write_table(folder / "vocab.parquet", pa.Table.from_arrays(columns, schema=VOCABULARY))


class StoreVocabulary:
    """Implements :class:`autointerp.protocols.Vocabulary`; may be shared between threads."""

    def __init__(self, token_bytes: Sequence[bytes], is_special: Sequence[bool] | np.ndarray) -> None:
        self._bytes = list(token_bytes)
        self._special = np.asarray(is_special, dtype=bool)

    @classmethod
    def read(cls, path: Path) -> StoreVocabulary:
        """Return the vocabulary in a file.

        Raises: StoreError when it is missing or damaged.
        """
        table = read_table(path, ["bytes", "is_special"], schema=VOCABULARY)
        return cls(table["bytes"].to_pylist(), table["is_special"].to_pylist())

    def __len__(self) -> int:
        return len(self._bytes)

    @cached_property
    def _texts(self) -> list[str | None]:
        """The text of each token that is whole characters, None for the others."""
        texts: list[str | None] = []
        for value in self._bytes:
            try:
                texts.append(value.decode("utf-8"))
            except UnicodeDecodeError:
                texts.append(None)
        return texts

    @cached_property
    def _text_array(self) -> np.ndarray:
        return np.array(self._texts, dtype=object)

    @cached_property
    def _is_broken(self) -> np.ndarray:
        """Which tokens are no whole characters."""
        return np.array([text is None for text in self._texts], dtype=bool)

    def _checked(self, ids: np.ndarray) -> list[int]:
        listed: list[int] = np.asarray(ids).tolist()
        if listed and not 0 <= min(listed) <= max(listed) < len(self._bytes):
            raise InputError(
                f"token ids {min(listed)} to {max(listed)} are not all in the store's vocabulary of {len(self._bytes)} tokens; "
                "the store was made with another tokenizer"
            )
        return listed

    def text(self, ids: np.ndarray) -> str:
        """Return the text of a run of tokens (1-D)."""
        return b"".join([self._bytes[token] for token in self._checked(ids)]).decode("utf-8", "replace")

    def pieces(self, ids: np.ndarray) -> list[str]:
        """Return one string per token, joined they are ``text(ids)``; a split character belongs to its last token."""
        listed = self._checked(ids)
        texts = self._texts
        pieces = [texts[token] for token in listed]
        if None not in pieces:
            return pieces  # type: ignore[return-value]  # just checked
        # Whole tokens on both sides of a broken one may still owe it a character, so all go through one decoder.
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        decoded = [decode(self._bytes[token]) for token in listed]
        decoded[-1] += decode(b"", True)
        return decoded

    def pieces_of(self, tokens: np.ndarray, lengths: np.ndarray) -> list[list[str]]:
        """Return :meth:`pieces` of the first ``lengths[i]`` tokens of each row of `tokens` [E, W], in much less time."""
        if not tokens.size:
            return [[] for _ in lengths]
        self._checked(np.array([tokens.min(), tokens.max()]))
        found: list[list[str]] = self._text_array.take(tokens).tolist()
        is_broken = self._is_broken[tokens].any(axis=1)
        for row in np.flatnonzero(is_broken | (np.asarray(lengths) < tokens.shape[1])).tolist():
            length = int(lengths[row])
            found[row] = self.pieces(tokens[row, :length]) if is_broken[row] else found[row][:length]
        return found

    def is_special(self, ids: np.ndarray) -> np.ndarray:
        """Return a bool array of the same shape."""
        array = np.asarray(ids, dtype=np.int64)
        if array.size:
            self._checked(np.array([array.min(), array.max()]))
        return np.asarray(self._special[array])
