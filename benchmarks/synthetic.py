"""Stores with made-up activations over made-up or real tokens, written through the store's own writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from autointerp.store.corpus import Document
from autointerp.store.manifest import CoderRecord, Identity
from autointerp.store.vocab import write_vocabulary
from autointerp.store.writer import StoreWriter

CTX_LEN, L0 = 256, 32
DOCUMENT_CONTEXTS = 4


def zipf_tokens(vocabulary: int, seed: int = 0) -> Callable[[int], np.ndarray]:
    """Return a function that gives the next n token ids, i.i.d. Zipf."""
    weights = 1 / np.arange(1, vocabulary + 1)
    edges = np.cumsum(weights / weights.sum())
    random = np.random.default_rng(seed)
    return lambda n: np.minimum(np.searchsorted(edges, random.random(n)), vocabulary - 1).astype(np.uint32)


def latents_by_rate(width: int) -> np.ndarray:
    """Return 4M latents to draw from: each as often as it fires, which is log-normal over latents as with trained coders."""
    random = np.random.default_rng(1)
    rates = np.minimum(random.lognormal(0, 1.2, width), 200)
    return np.searchsorted(np.cumsum(rates / rates.sum()), random.random(1 << 22)).clip(max=width - 1).astype(np.uint32)


def build(
    path: Path,
    *,
    num_tokens: int,
    width: int,
    next_tokens: Callable[[int], np.ndarray],
    vocabulary: tuple[list[bytes], list[bool]],
    memory_budget_bytes: int = 1 << 28,
) -> None:
    """Write a finished store of `num_tokens` tokens with `L0` activations each, values gamma distributed, documents of 1024."""
    record = CoderRecord(digest=f"made:{width}", width=width, hookpoints=("model.layers.1@out",), activation="topk", k=L0)
    random, by_rate = np.random.default_rng(2), latents_by_rate(width)
    sizes = random.gamma(2.0, 1.0, 1 << 20).astype(np.float32) + np.float32(0.01)
    contexts, group = num_tokens // CTX_LEN, 64
    identity = Identity(ctx_len=CTX_LEN, subject_digest="made:up", packing="concat", token_filter="none", bos_token_id=None)
    with StoreWriter.create_or_resume(
        path, identity=identity, coders={"sae": record}, memory_budget_bytes=memory_budget_bytes
    ) as writer:
        write_vocabulary(path / "tokenizer", *vocabulary)
        written = 0
        while written < contexts:
            count = min(group, writer.room, contexts - written)
            numbers = range(written, written + count)
            first = writer.add_contexts(
                list(next_tokens(count * CTX_LEN).reshape(count, CTX_LEN)),
                [[(number // DOCUMENT_CONTEXTS, 0)] for number in numbers],
                documents=[Document(document=n, source_row=n) for n in sorted({n // DOCUMENT_CONTEXTS for n in numbers})],
            )
            latents = np.sort(by_rate[random.integers(0, len(by_rate), (count * CTX_LEN, L0))], axis=1)
            # Fewer than L0 where a latent was drawn twice.
            is_first = np.ones(latents.shape, bool)
            is_first[:, 1:] = latents[:, 1:] != latents[:, :-1]
            positions = first * CTX_LEN + np.flatnonzero(is_first) // L0
            values = sizes[random.integers(0, len(sizes), len(positions))]
            writer.add_activations("sae", latents[is_first], positions, values)
            written += count
            if writer.room == 0:
                writer.close_run()
        writer.finish()


def word_vocabulary(size: int) -> tuple[list[bytes], list[bool]]:
    """Return the bytes of made-up words, each with a space before it."""
    return [f" w{index}".encode() for index in range(size)], [False] * size
