"""A short run of the study behind docs/judge_coverage.md: intervals hold the score that a judge of known errors implies."""

import pytest

from benchmarks import judge_coverage as study

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    kinds = (study.Errors(0.0), study.Errors(0.2))
    return study.coverage(tmp_path_factory.mktemp("judge"), seeds=10, kinds=kinds, variants={}, num_tokens=131_072)


def test_a_judge_without_errors_scores_one(frame):
    exact = frame[frame["rate"] == 0]
    assert {"detection", "fuzzing"} <= set(exact["scorer"])
    assert (exact["value"] == 1).all() and (exact["coverage"] == 1).all()


def test_scores_are_what_the_errors_imply(frame):
    noisy = frame[frame["rate"] == 0.2]
    # 40 latents and seeds of 100 answers: the standard error of the mean is below 0.01.
    assert (noisy["value"] - 0.8).abs().max() < 0.035
    headline = noisy[noisy["is_headline"]]
    assert (headline["coverage"] >= 0.85).all(), "below by four standard errors of 40 intervals that cover 0.95"
    assert (headline["width"] < 0.25).all() and (headline["width"] > 0.1).all()


def test_bounds_are_read_from_headlines(frame):
    low = frame.assign(coverage=0.8)
    assert any("below 0.9" in sentence for sentence in study.failures(low))
    assert any("outside 0.92" in sentence for sentence in study.failures(low))
    assert study.failures(frame.assign(coverage=0.95)) == []
