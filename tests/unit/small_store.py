"""A small store on disk with given activations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from autointerp.files import write_sealed
from autointerp.store import CoderRecord, Document, Identity, Store, StoreWriter, open_store, write_vocabulary

NUM_TOKENS = 40


def small_store(
    path: Path,
    fires: np.ndarray,
    *,
    ctx_len: int = 16,
    tokens: np.ndarray | None = None,
    row_group_rows: int = 100,
    part_rows: int = 400,
    dropped: int = 3,
    **record: object,
) -> Store:
    """Return a store of one coder; `fires` float [latents, contexts * ctx_len]; the last context lacks `dropped` tokens."""
    width, num_positions = fires.shape
    num_contexts = num_positions // ctx_len
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, NUM_TOKENS, num_positions) if tokens is None else tokens
    fires = fires.copy()
    fires[:, num_positions - dropped :] = 0
    identity = Identity(ctx_len=ctx_len, subject_digest="sha256:s", packing="fill")
    settings = {"digest": "sha256:c", "hookpoints": ("h@out",), "activation": "relu", "width": width} | record
    with StoreWriter.create_or_resume(
        path,
        identity=identity,
        coders={"sae": CoderRecord(**settings)},
        contexts_per_run=7,
        row_group_rows=row_group_rows,
        part_rows=part_rows,
    ) as writer:
        write_vocabulary(path / "tokenizer", [b" w%d" % i for i in range(NUM_TOKENS)], [False] * NUM_TOKENS)
        for context in range(num_contexts):
            low, high = context * ctx_len, (context + 1) * ctx_len
            stop = high - (dropped if context == num_contexts - 1 else 0)
            writer.add_contexts(
                [tokens[low:stop]], [[(context, 0)]], documents=[Document(document=context, source_row=context)]
            )
            latents, offsets = np.nonzero(fires[:, low:high])
            writer.add_activations("sae", latents, low + offsets, fires[latents, low + offsets])
            if not writer.room:
                writer.close_run()
        writer.finish()
    return open_store(path)


def rewrite_manifest(path: Path, *changes: tuple[str, str]) -> None:
    """Replace text in a store's manifest and seal it again, as somebody would who means it."""
    text = (path / "manifest.json").read_text()
    for old, new in changes:
        text = text.replace(old, new)
    write_sealed(path / "manifest.json", {key: value for key, value in json.loads(text).items() if key != "seal"})


def random_fires(seed: int, *, width: int = 30, num_positions: int = 480, rate: float = 0.1) -> np.ndarray:
    """Return float [width, num_positions]: latents of many rates, a dead one, one that always fires, and copies."""
    rng = np.random.default_rng(seed)
    rates = np.linspace(0, 2 * rate, width)[:, None]
    fires = (rng.random((width, num_positions)) < rates) * (rng.integers(1, 200, (width, num_positions)) / 16)
    fires[1] = 0
    fires[2] = 1
    fires[7] = fires[11] = fires[20]
    return fires
