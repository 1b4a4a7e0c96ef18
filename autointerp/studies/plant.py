"""Writes a store of planted latents over real text: one coder per level of noise, all with the same latents.

The text is the standard library, tokenised by the bundled model's tokenizer; no model is run. The store is written by the
store's own writer, so every command works on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from autointerp.demo import bundled
from autointerp.digest import digest, generator, seed_of
from autointerp.errors import ConfigError
from autointerp.protocols import Vocabulary
from autointerp.store import CoderRecord, Identity, StoreVocabulary, StoreWriter, write_vocabulary
from autointerp.store.layout import MANIFEST, TOKENIZER
from autointerp.studies.planted import PlantedLatent, planted_latents, to_values
from autointerp.subject.corpus import Context, Corpus, CorpusConfig
from autointerp.subject.vocabulary import token_bytes

CTX_LEN = 256
EXACT = "exact"
"""The coder without noise."""
_VERSION = 1
"""Part of the coders' digest: raise it when the same rules come to fire otherwise."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What is wrong with the firings of a coder."""

    kind: Literal["moved", "missed"]
    """``moved``: to random positions; ``missed``: the latent stays silent where its rule holds."""
    share: float
    """Of the firings, 0..1."""

    @property
    def coder(self) -> str:
        """Name of the coder."""
        return f"{self.kind}-{round(100 * self.share):02d}" if self.share else EXACT


LEVELS: tuple[Noise, ...] = (
    *(Noise(kind="moved", share=share) for share in (0.0, 0.1, 0.2, 0.3, 0.45, 0.6)),
    *(Noise(kind="missed", share=share) for share in (0.3, 0.6)),
)


def plant_store(
    out: Path | str, *, num_tokens: int = 524_288, levels: Sequence[Noise] = LEVELS, seed: int = 0, source: str = "stdlib"
) -> Path:
    """Write a planted store to `out`, or leave a finished one alone; return its path.

    `source` is any corpus that `cache` reads. Raises: IdentityError when another store lies there; ConfigError when two levels
    are the same.
    """
    path = Path(out).expanduser()
    names = [level.coder for level in levels]
    if len(set(names)) < len(names) or EXACT not in names:
        raise ConfigError(f"the levels of noise are {', '.join(names)}; expected each once, and one of share 0")
    # Takes seconds to import, and a store that is there is read without it.
    from autointerp.subject.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(bundled("model"))
    pieces, is_special = token_bytes(tokenizer)
    latents = planted_latents(StoreVocabulary(pieces, is_special))
    records = {level.coder: _record(latents, level, seed) for level in levels}
    corpus = CorpusConfig(source=source, num_tokens=num_tokens, ctx_len=CTX_LEN)
    with StoreWriter.create_or_resume(
        path,
        identity=Identity(
            ctx_len=CTX_LEN, subject_digest=digest({"tokenizer": [p.hex() for p in pieces]}), packing=corpus.packing
        ),
        coders=records,
        l0=dict.fromkeys(records, 4.0),
        provenance={
            "subject": "none: latents were planted",
            "corpus": corpus.identity(),
            "planted": {
                "latents": to_values(latents),
                "coders": {level.coder: {"kind": level.kind, "share": level.share} for level in levels},
            },
        },
    ) as writer:
        if writer.is_finished:
            return path
        if not (path / MANIFEST).exists():
            tokenizer.save_pretrained(path / TOKENIZER)
            write_vocabulary(path / TOKENIZER, pieces, is_special)
        if not writer.has_all_runs:
            contexts = list(Corpus(corpus, tokenizer, num_embeddings=len(tokenizer)).contexts())
            _write(writer, contexts, latents, levels, StoreVocabulary(pieces, is_special), seed)
        writer.finish()
    return path


def _record(latents: Sequence[PlantedLatent], level: Noise, seed: int) -> CoderRecord:
    made_from = {
        "version": _VERSION,
        "latents": to_values(latents),
        "kind": level.kind if level.share else EXACT,
        "share": level.share,
        "seed": seed,
    }
    return CoderRecord(
        digest=digest(made_from), width=len(latents), hookpoints=("planted@out",), activation="planted", format="planted"
    )


def _write(
    writer: StoreWriter,
    contexts: Sequence[Context],
    latents: Sequence[PlantedLatent],
    levels: Sequence[Noise],
    vocabulary: Vocabulary,
    seed: int,
) -> None:
    truth = Truth.of(contexts, latents, vocabulary, seed)
    fired = {level.coder: truth.firings(level) for level in levels if level.coder in writer.coder_names}
    while writer.next_context < len(contexts):
        batch = contexts[writer.next_context : writer.next_context + writer.room]
        first = writer.add_contexts(
            [context.tokens for context in batch],
            [context.segments for context in batch],
            documents=[document for context in batch for document in context.documents],
        )
        if not writer.is_committed:
            for name, firings in fired.items():
                rows = firings.between(first * CTX_LEN, (first + len(batch)) * CTX_LEN)
                writer.add_activations(name, firings.latents[rows], firings.positions[rows], firings.values[rows])
        if not writer.room:
            writer.close_run()
    writer.close_run()


@dataclass(frozen=True, kw_only=True)
class Firings:
    """All activations of one coder, in order of position."""

    latents: np.ndarray
    """uint32 [n]"""
    positions: np.ndarray
    """int64 [n]"""
    values: np.ndarray
    """float32 [n], 1..10."""

    def between(self, low: int, high: int) -> slice:
        """Return the rows at positions `low` to below `high`."""
        return slice(*np.searchsorted(self.positions, [low, high]).tolist())


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Where each latent would fire without noise."""

    places: np.ndarray
    """int64 [T], position of each token, document by document."""
    active: list[np.ndarray]
    """Of each latent: indices into `places`, ascending."""
    seeds: list[int]

    @staticmethod
    def of(contexts: Sequence[Context], latents: Sequence[PlantedLatent], vocabulary: Vocabulary, seed: int) -> Truth:
        """Return what the rules say of whole documents; noise is drawn once, so that it is the same at every level."""
        documents = _documents(contexts)
        starts = np.cumsum([0, *(len(ids) for _, ids in documents)])
        active, seeds = [], [seed_of("planted", seed, latent.name) for latent in latents]
        for latent, own in zip(latents, seeds, strict=True):
            if latent.rule is None:
                active.append(np.flatnonzero(generator("noise", own).random(int(starts[-1])) < latent.rate))
                continue
            found = [
                start + np.flatnonzero(latent.rule.predict(ids[None], np.array([len(ids)]), vocabulary)[0])
                for start, (_, ids) in zip(starts[:-1].tolist(), documents, strict=True)
            ]
            active.append(np.concatenate(found))
        return Truth(places=np.concatenate([places for places, _ in documents]), active=active, seeds=seeds)

    def firings(self, level: Noise) -> Firings:
        """Return the activations at one level of noise. What a share of noise hits, a larger share hits too."""
        positions: list[np.ndarray] = []
        values: list[np.ndarray] = []
        for at, own in zip(self.active, self.seeds, strict=True):
            random = generator("firings", own)
            strengths = random.uniform(1, 10, len(self.places)).astype(np.float32)
            hit = random.random(len(at)) < level.share
            kept = at[~hit]
            if level.kind == "moved":
                drawn = random.integers(0, len(self.places), 2 * len(at) + 64)
                silent = drawn[~np.isin(drawn, at)]
                first = np.sort(np.unique(silent, return_index=True)[1])
                kept = np.union1d(kept, silent[first[: int(hit.sum())]])
            positions.append(self.places[kept])
            values.append(strengths[kept])
        joined = np.concatenate(positions)
        numbers = np.repeat(np.arange(len(positions), dtype=np.uint32), [len(rows) for rows in positions])
        order = np.argsort(joined, kind="stable")
        return Firings(latents=numbers[order], positions=joined[order], values=np.concatenate(values)[order])


def _documents(contexts: Sequence[Context]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (positions, token ids) of each document, put together where it spans contexts."""
    parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for number, context in enumerate(contexts):
        starts = [start for _, start in context.segments]
        for (document, start), stop in zip(context.segments, [*starts[1:], len(context.tokens)], strict=True):
            places = number * CTX_LEN + np.arange(start, stop, dtype=np.int64)
            parts.setdefault(document, []).append((places, context.tokens[start:stop]))
    return [(np.concatenate([p for p, _ in rows]), np.concatenate([t for _, t in rows])) for rows in parts.values()]
