"""Builds the tables that lie beside a coder's ``latents.parquet``, each committed whole or not at all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from autointerp.errors import InputError
from autointerp.records import NeighbourKind
from autointerp.store.cooccurrence import cooccurring
from autointerp.store.cosine import nearest_by_cosine
from autointerp.store.neighbours import DEFAULT_K, neighbours_file, write_neighbours
from autointerp.store.reader import Store

Advance = Callable[[int], None]
"""Called with the number of latents that are done."""


def build_cooccurrence(store: Store, coder: str, *, k: int = DEFAULT_K, advance: Advance | None = None) -> None:
    """Compute the neighbours of every latent by co-firing."""
    reader = store.coder(coder)
    blocks = cooccurring(reader, k=k, num_positions=store.num_positions)
    write_neighbours(
        store.path / neighbours_file(coder, "cooccurrence"), blocks, coder_id=reader.coder_id, k=k, advance=advance
    )


def build_cosine(
    store: Store, coder: str, kind: NeighbourKind, rows_LD: np.ndarray, *, k: int = DEFAULT_K, advance: Advance | None = None
) -> None:
    """Compute the neighbours of every latent by the cosine of its decoder or encoder row.

    Raises: InputError when there are more or fewer rows than latents.
    """
    reader = store.coder(coder)
    if len(rows_LD) != reader.width:
        raise InputError(f"coder {coder!r} has {reader.width} latents and {len(rows_LD)} rows of weights were given")
    blocks = nearest_by_cosine(rows_LD, k=k)
    write_neighbours(store.path / neighbours_file(coder, kind), blocks, coder_id=reader.coder_id, k=k, advance=advance)
