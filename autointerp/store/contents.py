"""Checking what a store says against itself beyond digests, order and counts: statistics of latents, and the derived tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from autointerp.errors import AutointerpError, StoreError
from autointerp.store.embeddings import EmbeddingIndex, is_unfinished
from autointerp.store.latents import summarise
from autointerp.store.logits import LOGITS, has_logits, logits_file
from autointerp.store.neighbours import KINDS, neighbours_file
from autointerp.store.parquet import iterate_tables
from autointerp.store.reader import CoderReader, Store, open_store
from autointerp.store.statistics import read_statistics, statistics_file
from autointerp.store.verify import verify_store

_BLOCK = 1 << 12
_UNIT = 1e-2
"""How far a float16 unit vector's length may be from 1."""


def verify_contents(path: Path | str) -> list[str]:
    """Return one sentence per problem of a store and its tables; none when all is whole.

    As :func:`verify_store`, then the statistics in ``latents.parquet`` are computed anew and every derived table is read. What
    has the wrong digest already is not looked into.
    """
    problems = verify_store(path)
    if problems:
        return problems
    store = open_store(path)
    for name in store.coder_names:
        reader = store.coder(name)
        for check in (_latents(store, reader), _neighbours(store, reader), _statistics(store, reader), _logits(store, reader)):
            problems += _told(check)
    for folder in sorted(store.path.glob("embeddings/*/")):
        if not is_unfinished(folder):
            problems += _told(_embeddings(store, folder))
    return problems


def _told(problems: Iterator[str]) -> list[str]:
    found: list[str] = []
    try:
        for problem in problems:
            found.append(problem)
    except AutointerpError as error:
        found.append(str(error))
    return found


def _latents(store: Store, reader: CoderReader) -> Iterator[str]:
    columns = reader.latents
    for latent, positions, values in reader.sweep():
        found = summarise(np.zeros(len(values), np.int64), positions, values, num_latents=1, ctx_len=store.ctx_len)
        wrong = [name for name, value in found.floats.items() if not np.isclose(columns[name][latent], value[0], rtol=1e-5)]
        wrong += ["num_contexts"] * (int(columns["num_contexts"][latent]) != int(found.num_contexts[0]))
        wrong += ["minhash"] * (not np.array_equal(columns["minhash"][latent], found.minhash[0]))
        if wrong:
            yield (
                f"{reader.folder / 'latents.parquet'} has another {wrong[0]} of latent {latent} than its activations; "
                "restore both together, or build the store again"
            )
            return


def _neighbours(store: Store, reader: CoderReader) -> Iterator[str]:
    for kind in KINDS:
        path = store.path / neighbours_file(reader.name, kind)
        if not path.exists():
            continue
        table = reader.neighbours(kind)
        for latent in range(reader.width):
            neighbours, similarities = table.of(latent)
            in_order = (similarities[:-1] > similarities[1:]) | (
                (similarities[:-1] == similarities[1:]) & (neighbours[:-1] < neighbours[1:])
            )
            if len(neighbours) > table.k or not in_order.all() or latent in neighbours or (neighbours >= reader.width).any():
                yield f"{path} has neighbours of latent {latent} that are not in order, too many, or no latents; {_AGAIN}"
                break


_AGAIN = "remove it and compute it again with `autointerp tables`"


def _statistics(store: Store, reader: CoderReader) -> Iterator[str]:
    path = store.path / statistics_file(reader.name)
    if not path.exists():
        return
    table = read_statistics(store, reader.name)
    totals = np.array([sum(row or ()) for row in table["histogram"].to_pylist()], np.int64)
    if not np.array_equal(table["latent"].to_numpy(), np.arange(reader.width)) or not np.array_equal(
        totals, reader.latents["count"]
    ):
        yield f"{path} counts other activations than latents.parquet; {_AGAIN}"


def _logits(store: Store, reader: CoderReader) -> Iterator[str]:
    path = store.path / logits_file(reader.name)
    if not path.exists():
        return
    if not has_logits(store, reader.name):
        yield f"{path} was computed for another coder or corpus; {_AGAIN}"
        return
    latents = np.concatenate([table["latent"].to_numpy() for table in iterate_tables(path, schema=LOGITS)])
    if not np.array_equal(latents, np.arange(reader.width)):
        yield f"{path} does not hold each of the {reader.width} latents once and in order; {_AGAIN}"


def _embeddings(store: Store, folder: Path) -> Iterator[str]:
    try:
        index = EmbeddingIndex(folder, store_id=store.store_id)
    except StoreError as error:
        yield str(error)
        return
    for low in range(0, len(index), _BLOCK):
        length = np.linalg.norm(index.vectors(low, low + _BLOCK), axis=1)
        # Not <=, so that NaN counts as wrong.
        wrong = ~(np.abs(length - 1) < _UNIT)
        if wrong.any():
            yield f"{folder / 'vectors.npy'} has no unit vector for window {low + int(np.argmax(wrong))}; {_AGAIN}"
            return
