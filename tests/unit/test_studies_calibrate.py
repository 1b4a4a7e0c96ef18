"""Which scorers a calibration runs, and what it says beforehand that they take."""

import asyncio
from types import SimpleNamespace

from autointerp.examples.selection import SelectionConfig
from autointerp.jobs.cost import Estimate
from autointerp.jobs.score import ScoreConfig
from autointerp.llm.settings import EngineConfig
from autointerp.records import Capabilities
from autointerp.stats import Interval
from autointerp.studies import calibrate, calibrate_cost
from autointerp.studies.calibrate import CalibrateConfig


def variants(*scorers, has_labels=True, **settings):
    config = CalibrateConfig(store="s", results="r", scorers=scorers, engine="openai:m", **settings)
    found = calibrate._variants(config, Capabilities(labels=has_labels))
    return [(variant.name, variant.options.get("mode"), variant.uses_engine, variant.only_true) for variant in found]


def test_an_engine_is_asked_for_probabilities_where_the_scorer_and_it_can():
    rule, answers, labels = (
        ("detection", None, False, False), ("detection", None, True, False), ("detection", "labels", True, True)
    )  # fmt: skip
    assert variants("detection") == [rule, answers, labels]
    assert variants("detection", has_labels=False) == [rule, answers]
    assert variants("detection", with_probabilities=False) == [rule, answers]
    assert variants("saebench") == [("saebench", None, False, False), ("saebench", None, True, False)]
    asked_so = variants("detection", options={"detection": {"mode": "labels"}})
    assert [variant[1:] for variant in asked_so if variant[2]] == [("labels", True, False)]
    # A prompt of one's own for lists of answers is none for labels.
    own = variants("detection", options={"detection": {"prompt": "score/detection"}})
    assert not any(variant[3] for variant in own)


def test_limits_are_those_of_the_whole_study():
    reports = [SimpleNamespace(num_sent=30, cost=0.5), SimpleNamespace(num_sent=80, cost=0.25)]
    options = EngineConfig(max_requests=100, max_cost=2.0)
    left = calibrate._what_is_left(options, reports)
    assert (left.max_requests, left.max_cost) == (0, 1.25)
    assert calibrate._what_is_left(EngineConfig(), reports) == EngineConfig()


def estimate(requests, *, left=10, cost=0.0, is_tokenized=True):
    def about(value, width=0.0):
        return Interval(value=value, low=value - width, high=value + width, method="t")

    return Estimate(
        stage="score", method="m", num_latents=left, num_sampled=5, requests=about(requests, 2.0),
        prompt_tokens=about(requests * 100), output_tokens=about(requests * 5), cost=about(cost), disk_bytes=1.0,
        is_tokenized=is_tokenized, is_output_bound=False,
    )  # fmt: skip


def test_prices_are_summed_over_stages_and_scorers(monkeypatch):
    asked = []

    async def estimate_score(scoring, source, scorers, engine, *, sample):
        asked.append((scoring.explainer, source, scorers[0].name, sample))
        # The scorer and its control.
        return [estimate(40, cost=0.5), estimate(4, left=3, is_tokenized=False)]

    monkeypatch.setattr(calibrate_cost, "estimate_score", estimate_score)
    monkeypatch.setattr(calibrate_cost, "StoreSource", lambda path, selection: (path.name, selection.seed))
    runs = [
        ScoreConfig(
            store="s", results="r", explainer=role, scorers=("detection", "saebench"), selection=SelectionConfig(seed=seed),
            options={"saebench": {"judge": "rule"}} if seed else {},
        )
        for role, seed in (("true", 0), ("wrong", 0), ("true", 1))
    ]  # fmt: skip
    found = asyncio.run(calibrate_cost.prices(runs, None, sample=7))
    assert [(price.scorer, price.requests.value, price.num_explanations) for price in found] == [
        ("detection", 132, 39), ("saebench", 88, 26)
    ]  # fmt: skip
    assert (found[0].requests.low, found[0].requests.high) == (120, 144) and not found[0].is_tokenized
    assert {source for _, source, _, _ in asked} == {("s", 0), ("s", 1)} and {one[-1] for one in asked} == {7}
    both = calibrate_cost.total(found)
    assert (both.requests.value, both.prompt_tokens.value, both.cost.value) == (220, 22000, 2.5)
    text = calibrate_cost.price_text(found)
    assert "132 (120 to 144)" in text and text.endswith(both.sentence())
    assert "65 explanations left: 220 (200 to 240) requests, about 22,000 prompt tokens, 1,100 output tokens, cost 2.50" in text


def test_without_prices_or_work():
    price = calibrate_cost._price("x", [estimate(40)])
    assert "cost unknown: set engine_options.prices" in price.sentence()
    assert calibrate_cost.total([]).sentence() == "the judge has nothing left to do"
