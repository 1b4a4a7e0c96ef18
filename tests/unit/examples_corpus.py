"""A store held in memory, with the attributes that selection reads of a real one, and small corpora to fill it with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class ByteVocabulary:
    """A vocabulary given as one byte string per token."""

    def __init__(self, tokens: list[bytes], special: tuple[int, ...] = ()) -> None:
        self._tokens = tokens
        self._special = special

    def __len__(self) -> int:
        return len(self._tokens)

    def text(self, ids: np.ndarray) -> str:
        return b"".join(self._tokens[i] for i in ids).decode("utf-8", errors="replace")

    def pieces(self, ids: np.ndarray) -> list[str]:
        pieces, pending = [], b""
        for k, i in enumerate(ids):
            pending += self._tokens[i]
            try:
                piece, pending = pending.decode(), b""
            except UnicodeDecodeError as error:
                is_cut = error.end == len(pending) and error.reason == "unexpected end of data" and k + 1 < len(ids)
                stop = error.start if is_cut else len(pending)
                piece, pending = pending[:stop].decode("utf-8", errors="replace"), pending[stop:]
            pieces.append(piece)
        return pieces

    def pieces_of(self, tokens, lengths):
        return [self.pieces(row[:length]) for row, length in zip(tokens, lengths, strict=True)]

    def is_special(self, ids: np.ndarray) -> np.ndarray:
        return np.isin(ids, self._special)


@dataclass
class MemorySegments:
    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray


class MemoryCoder:
    def __init__(self, name: str, latents: list[dict[int, float]], num_tokens: int) -> None:
        self.name = name
        self.coder_id = f"coder:{name}"
        self.width = len(latents)
        self._latents = [sorted(latent.items()) for latent in latents]
        count = np.array([len(latent) for latent in latents], np.int64)
        self.latents = {"count": count, "density": count / max(1, num_tokens)}

    def activations(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        pairs = self._latents[latent]
        return np.array([p for p, _ in pairs], np.int64), np.array([v for _, v in pairs], np.float32)


class MemoryStore:
    """Documents follow one another in contexts, or each begins a context of its own; a long one goes on in the next context."""

    def __init__(
        self,
        documents: list[list[int]],
        *,
        ctx_len: int = 64,
        vocabulary: ByteVocabulary | None = None,
        is_packed: bool = True,
    ) -> None:
        self.ctx_len = ctx_len
        self.num_tokens = sum(len(document) for document in documents)
        self.store_id = "store:memory"
        flat: list[int] = []
        segments = []
        for document, tokens in enumerate(documents):
            position = len(flat)
            flat += tokens
            while position < len(flat):
                end = min(len(flat), (position // ctx_len + 1) * ctx_len)
                segments.append((document, position, end))
                position = end
            if not is_packed:
                flat += [0] * (-len(flat) % ctx_len)
        self.tokens = np.zeros(-(-len(flat) // ctx_len) * ctx_len, np.uint32)
        self.tokens[: len(flat)] = flat
        table = np.array(segments, np.int64).reshape(-1, 3)
        self.segments = MemorySegments(table[:, 0], table[:, 1], table[:, 2])
        self.vocabulary = vocabulary or ByteVocabulary([f"w{chr(97 + i % 26)}{chr(97 + i // 26)}".encode() for i in range(600)])
        self._coders: dict[str, MemoryCoder] = {}

    @property
    def coder_names(self) -> list[str]:
        return list(self._coders)

    def add(self, name: str, latents: list[dict[int, float]]) -> MemoryStore:
        self._coders[name] = MemoryCoder(name, latents, self.num_tokens)
        return self

    def derived(self, name, compute):
        return compute()

    def coder(self, name: str) -> MemoryCoder:
        return self._coders[name]


def random_store(
    *, seed: int, num_documents: int = 60, tokens: int = 200, ctx_len: int = 128, rate: float = 0.02, copies: float = 0.0
) -> MemoryStore:
    """Return a store of random documents of odd sizes, a share `copies` of them repeating an earlier one; one latent."""
    rng = np.random.default_rng(seed)
    documents: list[list[int]] = []
    for _ in range(num_documents):
        if documents and rng.random() < copies:
            documents.append(documents[rng.integers(len(documents))])
        else:
            documents.append(rng.integers(0, 500, rng.integers(1, 2 * tokens)).tolist())
    store = MemoryStore(documents, ctx_len=ctx_len)
    fires = np.flatnonzero(rng.random(store.num_tokens) < rate)
    return store.add("sae", [{int(p): float(v) for p, v in zip(fires, rng.exponential(size=len(fires)), strict=True)}])
