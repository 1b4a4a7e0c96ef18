"""Invariant 3 on the bundled demo: no position and no text is in two pools of a latent, whatever counts and scorers are used.

`AUTOINTERP_DISJOINT=all` checks every latent of both coders (a few minutes); else 150 of each.
"""

import os
import re

import numpy as np
import pytest

from autointerp.demo.run import cache_settings
from autointerp.examples.selection import SelectionConfig, Selector
from autointerp.jobs.cache import CacheConfig, cache
from autointerp.store import open_store

EVERYTHING = os.environ.get("AUTOINTERP_DISJOINT") == "all"
NUM_TOKENS = 262_144 if EVERYTHING else 65_536


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = cache(CacheConfig.parse(cache_settings(tmp_path_factory.mktemp("disjoint") / "store", NUM_TOKENS)))
    return open_store(path)


def normal_text(vocabulary):
    """A naive normaliser: runs of whitespace tokens and runs of digit tokens count as one token each."""
    kinds = {}

    def kind(token):
        if token not in kinds:
            text = vocabulary.text(np.array([token]))
            kinds[token] = "_" if text.strip() == "" else "0" if re.fullmatch(r"[0-9]+", text) else str(token)
        return kinds[token]

    def normalise(tokens):
        words = [kind(int(token)) for token in tokens]
        return tuple(word for i, word in enumerate(words) if i == 0 or word not in "_0" or word != words[i - 1])

    return normalise


def seen(blocks, normalise):
    positions, texts = set(), set()
    for block in blocks:
        for tokens, length, start in zip(block.tokens, block.lengths, block.positions, strict=True):
            positions.update(range(int(start), int(start) + int(length)))
            texts.add(normalise(tokens[:length]))
    return positions, texts


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("centred", [False, True])
def test_pools_are_disjoint_for_every_latent(store, centred):
    normalise = normal_text(store.vocabulary)
    first = Selector(store, SelectionConfig(centred=centred))
    later = Selector(
        store,
        SelectionConfig(
            centred=centred, num_explain=10, explain_sampling="top", num_positives=90, num_negatives=70, negatives=("random", "same_token")
        ),
    )  # fmt: skip
    checked = 0
    for name in store.coder_names:
        width = store.coder(name).width
        latents = range(width) if EVERYTHING else range(0, width, width // 150)
        for latent in latents:
            one, other = first.select(name, latent), later.select(name, latent)
            assert one.status == other.status and one.disjoint == other.disjoint
            if one.status != "ok":
                continue
            explained = [block for x in (one, other) for block in (x.explain, x.explain_statistics, x.explain_negatives)]
            scored = [block for x in (one, other) for block in (x.positives, x.negatives)]
            positions, texts = seen(explained, normalise)
            other_positions, other_texts = seen(scored, normalise)
            assert not positions & other_positions, (name, latent)
            assert not texts & other_texts, (name, latent)
            checked += 1
    assert checked > 200
    print(f"{checked} latents checked, centred={centred}")
