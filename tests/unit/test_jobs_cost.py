"""What a run would take, before anything is spent."""

import asyncio

import jobs_standins as standins
import pytest

from autointerp.errors import ConfigError
from autointerp.jobs.cost import estimate_explain, estimate_score
from autointerp.jobs.explain import ExplainConfig, explain_from
from autointerp.jobs.score import ScoreConfig, score_from
from autointerp.llm.settings import EngineConfig, Prices

OPTIONS = EngineConfig(prices=Prices(input=1000.0, output=2000.0))


@pytest.fixture
def config(tmp_path):
    return ExplainConfig(store="x", results=tmp_path / "r", latents="0-39", coders=("a",), engine_options=OPTIONS)


def explain_estimate(config, sample=32, **options):
    engine = standins.engine()
    found = asyncio.run(estimate_explain(config, standins.Source(), standins.Explainer(), engine, sample=sample, **options))
    assert not engine.requests
    return found[0]


def test_explain(config):
    whole, part = explain_estimate(config, sample=100), explain_estimate(config, sample=10)
    assert not config.results.exists()
    assert (whole.num_latents, whole.num_sampled, part.num_sampled) == (40, 40, 10)
    assert whole.requests.value == whole.requests.low == 39  # latent 7 has too few examples
    assert part.prompt_tokens.low <= whole.prompt_tokens.value <= part.prompt_tokens.high
    assert whole.output_tokens.value == 39 * 20 and whole.is_output_bound
    expected = (whole.prompt_tokens.value * 1000 + whole.output_tokens.value * 2000) / 1e6
    assert whole.cost.value == pytest.approx(expected)
    assert whole.disk_bytes > 1000
    assert "requests       39 (39 to 39)" in whole.text() and "cost" in whole.text()


def test_only_what_is_left_counts(config):
    engine = standins.engine()
    half = config.model_copy(update={"latents": "0-19"})
    asyncio.run(explain_from(half, standins.Source(), standins.Explainer(), engine, progress=False))
    found = explain_estimate(config, sample=100)
    assert (found.num_latents, found.requests.value) == (20, 20)
    assert not found.is_output_bound and found.output_tokens.value < 20 * 20
    partners = explain_estimate(config.model_copy(update={"controls": ("shuffled",)}), sample=100)
    assert partners.num_latents == 21


def test_score(config):
    source, engine = standins.Source(), standins.engine()
    with_partners = config.model_copy(update={"controls": ("shuffled",)})
    asyncio.run(explain_from(with_partners, source, standins.Explainer(), engine, progress=False))
    scoring = ScoreConfig(results=config.results, controls=("shuffled",), engine_options=OPTIONS)
    judge = standins.engine()
    found = asyncio.run(estimate_score(scoring, source, [standins.Scorer()], judge, sample=100))
    assert not judge.requests
    # Latent 6 has no control: its partner, 7, has too few examples to be explained.
    assert [estimate.requests.value for estimate in found] == [78, 76]
    asyncio.run(score_from(scoring, source, [standins.Scorer()], judge, progress=False))
    assert len(judge.requests) == 78 + 76


def test_sentences(config):
    with pytest.raises(ConfigError, match="has no plan yet and no latents are named"):
        explain_estimate(config.model_copy(update={"latents": None}))

    class Silent(standins.Rules):
        name = "silent"

    with pytest.raises(ConfigError, match="'silent' cannot say what it would ask"):
        asyncio.run(estimate_explain(config, standins.Source(), Silent(), None))
