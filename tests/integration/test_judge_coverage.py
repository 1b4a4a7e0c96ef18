"""A short run of the study behind docs/judge_coverage.md: intervals hold the score that a judge of known errors implies."""

import re

import pandas as pd
import pytest
from scipy.stats import binom

from autointerp.scorers import REGISTRY
from benchmarks import judge_coverage as study
from benchmarks.known_judge import IMPLIED, Errors

RATE = 0.2
RARE = 1e-4
"""Chance of failing a scorer whose intervals cover what they should."""


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    kinds = (Errors(0.0), Errors(RATE), study.BY_DOCUMENT)
    return study.coverage(folder, seeds=16, kinds=kinds, variants={}, together=False, num_tokens=131_072, latents=(6, 38))


def headlines(frame, errors):
    return frame[frame["is_headline"] & (frame["errors"] == errors.label)]


def fewest(num, coverage):
    """The fewest of `num` independent intervals that hold the truth, but for once in 1 / RARE runs."""
    return binom.ppf(RARE, num, coverage)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_judge_without_errors_is_at_the_bound_and_every_interval_holds_it(frame):
    exact = headlines(frame, Errors(0.0))
    assert set(exact["label"]) == set(REGISTRY) and (exact["implied"] == 1).all()
    assert exact["value"].to_numpy() == pytest.approx(1, abs=1e-9)
    assert exact.groupby("label")["held"].all().all(), exact[~exact["held"]][["label", "latent", "seed", "ci_low", "ci_high"]]
    # Not by being empty of content: the lower limit says how little so few windows can promise.
    assert ((exact["ci_low"] > 0.2) & (exact["ci_low"] < 0.99)).all()


@pytest.mark.slow
def test_scores_are_what_the_errors_imply(frame):
    for label, rows in headlines(frame, Errors(RATE)).groupby("label"):
        # 16 seeds; saebench has 14 answers each, the correlation a few documents that carry it.
        error = rows["value"].std() / len(rows) ** 0.5
        assert abs((rows["value"] - rows["implied"]).mean()) < 4.5 * error, label
        assert error < 0.05, label
        assert rows["implied"].between(0.77, 0.81).all()


@pytest.mark.slow
def test_every_scorer_covers_the_implied_score(frame):
    noisy = headlines(frame, Errors(RATE))
    assert set(noisy["label"]) == set(REGISTRY)
    held = noisy.groupby("label")["held"].agg(["sum", "size"])
    assert (held["size"] == 16).all()
    low = held[held["sum"] < fewest(16, study.LOW)]
    assert low.empty, f"below {study.LOW} by more than chance: {low}"
    assert noisy["held"].sum() >= fewest(len(noisy), study.BAND[0])
    width = (noisy["ci_high"] - noisy["ci_low"]).groupby(noisy["label"]).mean()
    assert (width < 0.5).all() and (width > 0.1).all()


@pytest.mark.slow
def test_every_scorer_covers_the_implied_score_of_errors_that_come_together_in_documents(frame):
    together = headlines(frame, study.BY_DOCUMENT)
    assert set(together["label"]) == set(REGISTRY)
    held = together.groupby("label")["held"].sum()
    assert (held >= fewest(16, study.LOW)).all(), held
    # Errors of one seed are not shared between scorers, so these are many intervals, if not independent ones.
    assert together["held"].mean() >= 0.88
    # Wider than for errors of the same rate that do not come together.
    alone = headlines(frame, Errors(RATE))
    assert (together["ci_high"] - together["ci_low"]).mean() > 1.1 * (alone["ci_high"] - alone["ci_low"]).mean()


def test_a_scorer_without_an_implied_score_is_named(monkeypatch):
    assert [scorer.name for scorer in study.all_scorers()] == list(REGISTRY) == list(IMPLIED)
    monkeypatch.setitem(REGISTRY, "novel", "autointerp.scorers.detection:Detection")
    with pytest.raises(AssertionError, match="no implied score is known for novel"):
        study.all_scorers()


def test_the_committed_table_has_every_scorer_within_the_bounds():
    """Made by ``python -m benchmarks.judge_coverage --write``."""
    text = study.DOC.read_text(encoding="utf-8")
    table = text.partition("## Headline of every scorer")[2].partition("## ")[0]
    found = {
        (cells[0], float(cells[2])): (float(cells[5]), int(cells[8]))
        for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"(?m)^\|.*\|$", table)[2:])
    }
    assert {name for name, _ in found} == set(REGISTRY), "run it again for scorers that it lacks"
    for name in REGISTRY:
        for rate in study.RATES:
            coverage, num = found[name, rate]
            assert coverage >= (study.LOW if rate else 1) and num >= 200, (name, rate)
    for rate in study.RATES[1:]:
        mean = sum(found[name, rate][0] for name in REGISTRY) / len(REGISTRY)
        assert study.BAND[0] <= mean <= study.BAND[1]


def rows_of(**changes):
    """Headlines of two scorers whose intervals cover enough, at each rate; `changes` to the first row above 0."""
    rows = [
        {"label": label, "errors": f"{rate:g}", "rate": rate, "is_headline": True, "is_main": True}
        | {"coverage": 0.95 if rate else 1.0, "high": 0.97}
        for label in ("detection", "saebench")
        for rate in study.RATES
    ]
    rows[1] |= changes
    return pd.DataFrame(rows)


def test_bounds_are_read_from_headlines():
    assert study.failures(rows_of()) == []
    assert study.failures(rows_of(coverage=0.91)) == []
    [low, both] = study.failures(rows_of(coverage=0.85))
    assert "detection at error rate 0.05: coverage 0.850 is below 0.9" in low and "all scorers" in both
    high = study.failures(rows_of().replace({"coverage": {0.95: 0.99}}))
    assert len(high) == 2 and all("coverage 0.990 is outside 0.92 to 0.98" in sentence for sentence in high)
    bound = rows_of()
    bound.loc[0, "coverage"] = 0.99
    assert study.failures(bound) == [
        "detection at error rate 0: coverage 0.990 of intervals at the bound, where every one must hold"
    ]
    # Few intervals say little: only what they exclude is a failure.
    extra = {"is_main": False, "errors": "0.2, 50% together"}
    assert study.failures(rows_of(coverage=0.85, high=0.91, **extra)) == []
    assert len(study.failures(rows_of(coverage=0.80, high=0.88, **extra))) == 1
    assert study.failures(rows_of(coverage=0.5, high=0.6, label="saebench", **extra)) == []
