"""The corpus inside a store: contexts, the documents they hold, and the digest of their token ids.

A context is a run of at most `ctx_len` tokens; its segments say where each document in it begins. Kept columns have declared
types, so that every part has the same schema whatever values it happens to hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from autointerp.digest import canonical_json
from autointerp.errors import ConfigError, IdentityError, InputError
from autointerp.store.layout import FileEntry
from autointerp.store.parquet import iterate_tables, write_table

TOKENS = pa.schema(
    [
        ("context", pa.int64()),
        ("tokens", pa.list_(pa.uint32())),
        ("documents", pa.list_(pa.int64())),
        ("starts", pa.list_(pa.int32())),
    ]
)
"""One row per context: ids of its tokens, and for each document in it the id and the offset where it starts."""

_COLUMN_TYPES = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}
_TOKENS_PER_ROW_GROUP = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document of the corpus. Ids ascend in the order of the corpus."""

    document: int
    """Id."""
    source_row: int
    """Row, or other running number, in the source."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Values of the kept columns; None where there is none."""


def documents_schema(columns: Mapping[str, str]) -> pa.Schema:
    """Return the schema of documents with kept columns of the named types.

    Raises: ConfigError for a type that is not ``string``, ``int64``, ``float64`` or ``bool``, or a name that is taken.
    """
    fields = [("document", pa.int64()), ("source_row", pa.int64())]
    for name, kind in columns.items():
        if kind not in _COLUMN_TYPES:
            raise ConfigError(f"the kept column {name!r} cannot have type {kind!r}; known: {', '.join(_COLUMN_TYPES)}")
        if name in ("document", "source_row"):
            raise ConfigError(f"a kept column cannot be named {name!r}, which the store uses itself; rename it in the corpus")
        fields.append((name, _COLUMN_TYPES[kind]))
    return pa.schema(fields)


def as_token_ids(tokens: Any, *, ctx_len: int) -> np.ndarray:
    """Return the ids of one context as uint32.

    Raises: InputError when there are none, too many, or they are no uint32.
    """
    array = np.asarray(tokens)
    if array.ndim != 1 or not 1 <= len(array) <= ctx_len:
        raise InputError(f"a context of shape {array.shape} cannot be stored; expected 1 to {ctx_len} token ids")
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 0xFFFFFFFF:
        raise InputError(f"token ids of {array.dtype} from {array.min()} to {array.max()} cannot be stored; expected uint32")
    return array.astype(np.uint32)


def as_segments(segments: Sequence[tuple[int, int]], *, num_tokens: int) -> tuple[list[int], list[int]]:
    """Return document ids and starts of one context.

    Raises: InputError unless starts begin at 0 and ascend within the context, and ids do not descend.
    """
    documents, starts = [int(document) for document, _ in segments], [int(start) for _, start in segments]
    rising = all(a < b for a, b in pairwise(starts))
    if not starts or starts[0] != 0 or not rising or starts[-1] >= num_tokens or documents != sorted(documents):
        raise InputError(
            f"segments {list(segments)[:4]} of a context of {num_tokens} tokens cannot be stored; "
            "expected (document, start) from start 0, both ascending"
        )
    return documents, starts


def write_tokens(
    path: Path, *, first_context: int, tokens: list[np.ndarray], documents: list[list[int]], starts: list[list[int]]
) -> FileEntry:
    """Commit the contexts of a run."""
    columns = [
        pa.array(np.arange(first_context, first_context + len(tokens)), pa.int64()),
        _lists(tokens, np.uint32, pa.uint32()),
        _lists(documents, np.int64, pa.int64()),
        _lists(starts, np.int32, pa.int32()),
    ]
    rows = max(1, _TOKENS_PER_ROW_GROUP // max((len(context) for context in tokens), default=1))
    return write_table(path, pa.Table.from_arrays(columns, schema=TOKENS), row_group_rows=rows)


def _lists(rows: Sequence[Any], dtype: Any, kind: pa.DataType) -> pa.Array:
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    values = np.concatenate([np.asarray(row, dtype) for row in rows]) if len(rows) else np.zeros(0, dtype)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values, kind))


def write_documents(path: Path, documents: Sequence[Document], schema: pa.Schema) -> FileEntry:
    """Commit the documents that begin in a run.

    Raises: InputError when a kept column holds a value of another type than declared.
    """
    rows: dict[str, list[Any]] = {
        "document": [row.document for row in documents],
        "source_row": [row.source_row for row in documents],
    }
    arrays = []
    for column in schema:
        values = rows.get(column.name)
        if values is None:
            values = [_plain(row.columns.get(column.name), column.type) for row in documents]
        try:
            arrays.append(pa.array(values, column.type))
        except (pa.ArrowException, OverflowError, TypeError) as error:
            raise InputError(
                f"the kept column {column.name!r} holds a value that is no {column.type} ({error}); keep it as string"
            ) from error
    return write_table(path, pa.Table.from_arrays(arrays, schema=schema))


def _plain(value: Any, kind: pa.DataType) -> Any:
    if kind == pa.string() and value is not None and not isinstance(value, str):
        return canonical_json(value).decode()
    return value


def iterate_contexts(paths: Iterable[Path]) -> Iterator[np.ndarray]:
    """Yield the token ids of every context in order, holding one row group at a time.

    Raises: StoreError when a part is missing or damaged.
    """
    for path in paths:
        for table in iterate_tables(path, ["tokens"], schema=TOKENS):
            for chunk in table["tokens"].chunks:
                values = np.asarray(chunk.flatten())
                offsets = np.asarray(chunk.offsets) - chunk.offsets[0].as_py()
                for start, stop in pairwise(offsets):
                    yield values[start:stop]


class TokensDigest:
    """Digest of token ids in order: SHA-256 over each context's length and ids, as little-endian uint32."""

    def __init__(self) -> None:
        self._state = hashlib.sha256()
        self.num_contexts = 0
        self.num_tokens = 0

    def add(self, tokens: np.ndarray) -> None:
        """Append one context."""
        self._state.update(len(tokens).to_bytes(4, "little"))
        self._state.update(np.ascontiguousarray(tokens, "<u4").tobytes())
        self.num_contexts += 1
        self.num_tokens += len(tokens)

    def value(self) -> str:
        """Return the digest so far."""
        return "sha256:" + self._state.hexdigest()


def tokens_digest(contexts: Iterable[np.ndarray]) -> TokensDigest:
    """Return the digest, and the counts, of contexts in order. Parts, runs and budgets leave it alone."""
    state = TokensDigest()
    for tokens in contexts:
        state.add(tokens)
    return state


class Replay:
    """Checks a corpus that is read again against the contexts already stored."""

    def __init__(self, paths: Iterable[Path], *, first: int = 0, is_growing: bool = False) -> None:
        """`paths` hold the contexts from number `first` on.

        `is_growing`: the corpus may have more contexts than are stored, and go on where the last of them ended short.
        """
        self._contexts = iterate_contexts(paths)
        self._next, self._is_growing = first, is_growing
        self._stored = next(self._contexts, None)

    def check(self, tokens: np.ndarray) -> None:
        """Compare the next context.

        Raises: IdentityError when it differs.
        """
        stored, self._stored = self._stored, next(self._contexts, None)
        is_same = self._is_growing if stored is None else np.array_equal(stored, tokens)
        if not is_same and stored is not None and self._is_growing and self._stored is None:
            is_same = np.array_equal(stored, tokens[: len(stored)])
        if not is_same:
            raise IdentityError(
                f"context {self._next} of the corpus is not the one in the store; "
                "the corpus, its order or the tokenizer changed: use the former ones, or another folder"
            )
        self._next += 1
