"""The table of tokens that each latent promotes and suppresses: its form, writing and reading. `subject.logits` computes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from autointerp.errors import IdentityError, StoreError
from autointerp.store.parquet import damage_told, parquet_file, parquet_sink, read_table
from autointerp.store.reader import Store

NUM_TOKENS = 50
"""Tokens kept on either side."""

LOGITS = pa.schema(
    [
        ("latent", pa.uint32()),
        ("promoted", pa.list_(pa.uint32())),
        ("promoted_logits", pa.list_(pa.float32())),
        ("suppressed", pa.list_(pa.uint32())),
        ("suppressed_logits", pa.list_(pa.float32())),
    ]
)
"""One row per latent: the tokens of the largest logits from the largest, and of the smallest from the smallest. Logits are
those of the direction alone after the final norm, less their mean over the vocabulary."""

_CODER_ID = b"autointerp.coder_id"


@dataclass(frozen=True, kw_only=True)
class TokenLogits:
    """Consecutive latents; arrays [latents, tokens], ids uint32 and logits float32."""

    promoted: np.ndarray
    promoted_logits: np.ndarray
    suppressed: np.ndarray
    suppressed_logits: np.ndarray


class Promoted:
    """The promoted tokens of each latent of a table, kept as columns: a row is made when it is asked for."""

    def __init__(self, table: pa.Table) -> None:
        column = table.column("promoted").combine_chunks()
        self._tokens, self._offsets = column.values.to_numpy(), column.offsets.to_numpy()

    def of(self, latent: int) -> tuple[int, ...]:
        """Return the ids of a latent's tokens, the most promoted first."""
        return tuple(self._tokens[self._offsets[latent] : self._offsets[latent + 1]].tolist())


def logits_file(coder: str) -> str:
    """Return where the logits of a coder lie in a store."""
    return f"coders/coder={coder}/logits.parquet"


def write_logits(store: Store, coder: str, blocks: Iterable[TokenLogits]) -> None:
    """Commit the table from blocks in order of latent.

    Raises: StoreError when they do not cover the latents.
    """
    reader = store.coder(coder)
    schema = LOGITS.with_metadata({_CODER_ID: reader.coder_id.encode()})
    path, first = store.path / logits_file(coder), 0
    with parquet_sink(path, schema, with_digest=False) as sink:
        for block in blocks:
            num, size = block.promoted.shape
            offsets = pa.array(np.arange(num + 1, dtype=np.int32) * size)
            columns = [pa.array(np.arange(first, first + num, dtype=np.uint32))]
            for name in LOGITS.names[1:]:
                columns.append(pa.ListArray.from_arrays(offsets, pa.array(getattr(block, name).reshape(-1))))
            sink.add(pa.Table.from_arrays(columns, schema=sink.schema))
            first += num
        if first != reader.width:
            raise StoreError(f"logits of {first} latents were computed for coder {coder!r}, whose width is {reader.width}")


def has_logits(store: Store, coder: str) -> bool:
    """Return whether the table is there and belongs to the coder."""
    path = store.path / logits_file(coder)
    if not path.exists():
        return False
    with damage_told(path), parquet_file(path, LOGITS) as file:
        return (file.schema_arrow.metadata or {}).get(_CODER_ID) == store.coder(coder).coder_id.encode()


def read_logits(store: Store, coder: str) -> pa.Table:
    """Return the table of a coder.

    Raises: StoreError when there is none, with the command that makes it; IdentityError when it is of another coder.
    """
    path = store.path / logits_file(coder)
    if not path.exists():
        raise StoreError(
            f"{path} does not exist; make it with `autointerp tables {store.path} --coder {coder} --subject MODEL`"
        )
    if not has_logits(store, coder):
        raise IdentityError(f"{path} was computed for another coder or corpus; remove it and compute it again")
    return read_table(path, schema=LOGITS)
