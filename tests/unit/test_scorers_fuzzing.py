from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from planted import explained, planted, resources, run, windows

from autointerp.examples.render import above
from autointerp.llm.fake import FakeEngine
from autointerp.records import Examples
from autointerp.scorers.fuzzing import Fuzzing, FuzzingConfig


def items(latent, *, seed=0, **config):
    found = Fuzzing(FuzzingConfig(**config)).items(latent, seed)
    return [item for item in found if item.truth], [item for item in found if not item.truth]


def noisy(num=50, width=16, seed=0, share=0.15):
    """Positives with runs of every length, strengths from weak to strong, anywhere in the window."""
    random = np.random.default_rng(seed)
    block = windows(num, active=True, seed=seed, width=width)
    activations = np.where(random.random((num, width)) < share, random.random((num, width)) * 5, 0).astype(np.float32)
    activations[:, 0] = np.where(activations.any(axis=1), activations[:, 0], 1)
    return replace(planted(num=num, width=width), positives=replace(block, activations=activations))


def runs(mask):
    return sorted(len(run) for run in "".join("x" if m else " " for m in mask).split())


def test_positives_highlight_what_is_above_the_threshold():
    latent = noisy()
    positives, _ = items(latent)
    expected = above(latent.positives.activations, latent.positives.lengths, ratio=0.3)
    assert all((item.mask == expected[item.example_idx]).all() for item in positives)
    positives, _ = items(latent, threshold=0.9)
    assert sum(item.mask.sum() for item in positives) < expected.sum()


def test_negatives_have_the_positives_counts_runs_and_places():
    positives, negatives = items(noisy())
    for what in (lambda m: m.sum(), lambda m: tuple(runs(m)), lambda m: tuple(np.flatnonzero(m))):
        assert Counter(what(i.mask) for i in positives) == Counter(what(i.mask) for i in negatives)
    # Drawn freshly for each: not one pattern over and over, and no column that is always marked.
    assert len({tuple(np.flatnonzero(i.mask)) for i in negatives}) > 20
    assert np.mean([i.mask for i in negatives], axis=0).max() < 0.5


def test_patterns_are_drawn_per_latent_and_seed():
    def masks(**changes):
        seed = changes.pop("seed", 0)
        return [item.mask.tolist() for item in items(replace(noisy(), **changes), seed=seed)[1]]

    assert masks() == masks()
    assert masks(latent=8) != masks()
    assert masks(seed=1) != masks()


def test_every_negative_has_a_highlight_whatever_its_source_and_length():
    latent = noisy()
    block = windows(12, active=False, seed=5, start=9000)
    lengths = np.array([1, 2, 3, 16] * 3, np.int32)
    mixed = replace(
        block,
        lengths=lengths,
        sources=("random", "neighbour_decoder") * 6,
        activations=(np.arange(12)[:, None] % 2 * np.ones((1, 16))).astype(np.float32),
    )
    _, negatives = items(replace(latent, negatives=mixed))
    assert len(negatives) == 12
    for item in negatives:
        assert item.is_asked
        assert 0 < item.mask.sum() <= item.length
        assert len(item.mask) == item.length
        # A window that is active for another latent is not highlighted as a whole.
        assert item.length < 4 or not item.mask.all()


def test_active_variant_highlights_inactive_tokens_of_the_same_texts():
    latent = noisy()
    positives, negatives = items(latent, variant="active")
    for positive, negative in zip(positives, negatives, strict=True):
        assert negative.position == positive.position
        assert negative.source == "shuffled_highlight"
        assert negative.mask.sum() == positive.mask.sum()
        assert not (latent.positives.activations[positive.example_idx][negative.mask] != 0).any()
    assert [item.example_idx for item in negatives] == list(range(50, 100))


def test_two_versions_of_a_text_never_share_a_prompt():
    for num in (3, 5, 50):
        latent = replace(noisy(num=num), negatives=Examples.empty(16))
        scorer = Fuzzing(FuzzingConfig(variant="active"))
        result = run(scorer.score(latent, explained(), resources(FakeEngine(lambda request: "[1,1,1,1,1]"))))
        seen = Counter((v.prompt_idx, v.position) for v in result.verdicts)
        assert set(seen.values()) == {1}
        assert len(result.verdicts) == 2 * num


def test_a_window_without_inactive_tokens_has_no_negative():
    latent = noisy(num=10)
    activations = latent.positives.activations.copy()
    activations[4] = 1
    latent = replace(latent, positives=replace(latent.positives, activations=activations))
    scorer = Fuzzing(FuzzingConfig(variant="active"))
    engine = FakeEngine(lambda request: "[1,1,1,1,1]")
    result = run(scorer.score(latent, explained(), resources(engine)))
    dropped = [v for v in result.verdicts if v.status == "not_applicable"]
    assert [(v.example_idx, v.truth, v.answer) for v in dropped] == [(14, False, None)]
    first = [request.prompt.messages[-1][1] for request in engine.requests if len(request.prompt.messages) == 8]
    asked = sum(message.count("\nText ") for message in first)
    assert asked == 19
    # Nothing was put in its place.
    assert len(result.verdicts) == 20


def test_names_tell_the_variants_apart():
    assert Fuzzing(FuzzingConfig()).name == "fuzzing"
    assert Fuzzing(FuzzingConfig(variant="active")).name == "fuzzing_active"


@pytest.mark.parametrize("variant", ["default", "active"])
def test_the_threshold_is_the_configured_one(variant):
    weak = items(noisy(), variant=variant, threshold=0.0)[0]
    assert all((item.mask == (noisy().positives.activations[item.example_idx] > 0)).all() for item in weak)
