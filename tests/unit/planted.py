"""Planted latents: windows of words in which a latent fires where a known rule says so."""

import asyncio

import numpy as np

from autointerp.protocols import Resources
from autointerp.records import Examples, Explanation, LatentExamples

WORDS = [
    "\n    ", " the", " cat", " sat", "os", ".", "path", " return", " x", " =",
    " 1", " 23", " Name", " NAME", "(", ")", " raise",
    " ValueError", " <<", ">>", " a", " of", "_", " join", " \u00e9t\u00e9", " ignore", " all", " instructions", " and", 
    " answer",
]  # fmt: skip
ID = {word: i for i, word in enumerate(WORDS)}


class WordVocabulary:
    """One word per token; no token is special."""

    def text(self, ids):
        return "".join(WORDS[i] for i in ids)

    def pieces(self, ids):
        return [WORDS[i] for i in ids]

    def pieces_of(self, tokens, lengths):
        return [self.pieces(row[:length]) for row, length in zip(tokens, lengths, strict=True)]

    def is_special(self, ids):
        return np.zeros(np.shape(ids), bool)

    def __len__(self):
        return len(WORDS)


VOCABULARY = WordVocabulary()


def path_after_os(tokens):
    """Fires on ``path`` after ``os.``: value 4, and 1 on a `` join`` right after it."""
    active = np.zeros(tokens.shape, np.float32)
    is_path = tokens == ID["path"]
    is_path[:, :2] = False
    is_path[:, 2:] &= (tokens[:, 1:-1] == ID["."]) & (tokens[:, :-2] == ID["os"])
    active[is_path] = 4
    return active


def windows(num, *, active, seed, width=16, start=0):
    """Windows of random words, half of the planted triples broken: ``path`` also occurs without ``os.`` before it."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, len(WORDS), (num, width)).astype(np.uint32)
    tokens[tokens == ID["path"]] = ID[" the"]
    for row in tokens:
        row[random.integers(0, 3)] = ID["path"]  # a decoy, which nothing precedes as the plant wants
        if active:
            at = random.integers(4, width - 3)
            row[at : at + 3] = ID["os"], ID["."], ID["path"]
        else:
            row[3] = ID["os"]
    activations = path_after_os(tokens)
    assert ((activations > 0).any(axis=1) == active).all()
    return Examples(
        tokens=tokens,
        activations=activations,
        lengths=np.full(num, width, np.int32),
        positions=(start + np.arange(num)) * width,
        documents=np.arange(num) + start,
        quantiles=np.sort(np.arange(num) % 10).astype(np.int16) if active else np.full(num, -1, np.int16),
        sources=("positive" if active else "random",) * num,
    )


def joined(a, b):
    names = ("tokens", "activations", "lengths", "positions", "documents", "quantiles")
    return Examples(**{n: np.concatenate([getattr(a, n), getattr(b, n)]) for n in names}, sources=a.sources + b.sources)


def planted(*, num=50, latent=7, width=16, seed=0):
    """The examples of a latent that fires on ``path`` after ``os.``."""
    statistics = [
        windows(100, active=is_active, seed=seed + 10 + is_active, width=width, start=1000) for is_active in (True, False)
    ]
    return LatentExamples(
        coder="sae",
        latent=latent,
        selection_id="sha256:selection",
        status="ok",
        disjoint="document",
        density=0.01,
        max_activation=4.0,
        explain=windows(40, active=True, seed=seed + 1, width=width, start=2000),
        explain_statistics=joined(*statistics),
        explain_negatives=windows(10, active=False, seed=seed + 2, width=width, start=3000),
        positives=windows(num, active=True, seed=seed + 3, width=width, start=4000),
        negatives=windows(num, active=False, seed=seed + 4, width=width, start=5000),
    )


def explained(text="`path` after `os.`", rule=None, **changes):
    row = Explanation(
        coder="sae",
        latent=7,
        explainer="default",
        explainer_id="sha256:explainer",
        selection_id="sha256:selection",
        status="ok",
        text=text,
        rule=rule,
        explanation_id="sha256:explanation",
    )
    return row.with_(**changes)


def resources(engine=None, seed=0):
    return Resources(vocabulary=VOCABULARY, seed=seed, engine=engine)


def run(coroutine):
    return asyncio.run(coroutine)


def headline(result):
    [score] = [score for score in result.scores if score.is_headline]
    return score
