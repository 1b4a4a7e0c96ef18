"""Controls: what they put in place of an explanation, on which latents, who judges, and what they cost."""

import asyncio

import jobs_standins as standins
import pytest
from planted import planted, resources

from autointerp.explainers.lexical import Lexical
from autointerp.jobs.cost import estimate_score
from autointerp.jobs.explain import ExplainConfig, explain_from
from autointerp.jobs.methods import build_scorer
from autointerp.jobs.plan import extend_plan
from autointerp.jobs.score import ScoreConfig, score_from
from autointerp.jobs.score_controls import (
    CONTROLS,
    GENERIC,
    GENERIC_RULE,
    by_rule,
    control_scorer,
    controls_for,
    own_explanations,
    sampled,
)
from autointerp.jobs.status import status
from autointerp.results.folder import Method, ResultsFolder
from autointerp.results.load import load_scores
from autointerp.rules import Rule
from autointerp.scorers.detection import Detection, DetectionConfig
from autointerp.scorers.fuzzing import Fuzzing, FuzzingConfig


def plan_of(path, latents, coder="a"):
    folder = ResultsFolder.create(path, store_id="store-1", provenance={"store": "x"})
    return extend_plan(folder, {coder: latents})


def test_a_sample_is_seeded_and_never_gains_from_growth(tmp_path):
    small, large = plan_of(tmp_path / "s", range(100)), plan_of(tmp_path / "l", range(300))
    one, two = (set(sampled(plan, 40, seed=0)["a"].tolist()) for plan in (small, large))
    assert len(one) == len(two) == 40 and two & set(range(100)) <= one
    assert set(sampled(small, 40, seed=1)["a"].tolist()) != one
    assert sampled(small, 500, seed=0)["a"].tolist() == list(range(100))
    assert sampled(small, None, seed=0) is None
    assert set(sampled(small, 20, seed=0)["a"].tolist()) <= one


def test_generic_says_the_same_of_every_latent_and_yes_to_everything():
    [row] = asyncio.run(own_explanations("generic", planted(), resources()))
    assert row.text == GENERIC and row.status == "ok" and row.explanation_id
    windows = planted().negatives
    assert Rule.from_json(row.rule).predict(windows.tokens, windows.lengths, resources().vocabulary).any(axis=1).all()
    scores = asyncio.run(Detection(DetectionConfig(judge="rule")).score(planted(), row, resources()))
    assert next(score.value for score in scores.scores if score.is_headline) == 0.5
    assert GENERIC_RULE.to_json() == row.rule


def test_lexical_learns_from_the_explain_pool_alone():
    latent = planted()
    [row] = asyncio.run(own_explanations("lexical", latent, resources()))
    [expected] = asyncio.run(Lexical().explain(latent, resources()))
    assert (row.rule, row.text) == (expected.rule, expected.text) and row.explanation_id


def test_who_judges_under_a_control():
    asked = Fuzzing(FuzzingConfig(variant="active", threshold=0.5))
    floor = control_scorer(asked, "lexical")
    assert not floor.needs.engine and (floor.config.variant, floor.config.threshold) == ("active", 0.5)
    assert control_scorer(asked, "generic") is asked and control_scorer(asked, None) is asked
    assert by_rule(standins.Scorer()) is None and isinstance(control_scorer(standins.Scorer(), "lexical"), standins.Scorer)
    lexical = Method(stage="explain", name="lexical", identity={}, model="none")
    default = Method(stage="explain", name="default", identity={}, model="m")
    assert controls_for(CONTROLS, lexical, asked) == ["shuffled", "generic"]
    assert controls_for(CONTROLS, default, asked) == list(CONTROLS)
    assert controls_for(CONTROLS, default, build_scorer("intruder", {})) == ["shuffled"]


@pytest.fixture
def explained_folder(tmp_path):
    config = ExplainConfig(store="x", results=tmp_path / "r", latents="0-39", coders=("a",), shard_latents=10)
    asyncio.run(explain_from(config, standins.Source(), standins.Explainer(), standins.engine(), progress=False))
    return config.results


def run_score(results, engine, **changes):
    config = ScoreConfig(results=results, coders=("a",), **changes)
    return asyncio.run(score_from(config, standins.Source(), [standins.Scorer()], engine, progress=False))


def test_sampled_controls_are_run_on_the_sample_and_resume(explained_folder):
    engine = standins.engine()
    report = run_score(explained_folder, engine, controls=("generic", "lexical"), control_latents=8)
    assert report.exit_code == 0
    frame = load_scores(explained_folder)
    under = {name: set(rows["latent"]) for name, rows in frame.fillna({"control": "none"}).groupby("control")}
    assert len(under["none"]) == 40 and len(under["generic"]) == len(under["lexical"]) == 8
    assert under["generic"] == under["lexical"]
    shown = [request.prompt.messages[0][1] for request in engine.requests]
    num_generic = sum(GENERIC in text for text in shown)
    assert num_generic == 2 * len(under["generic"] - {7})  # latent 7 has too few examples
    found = {method.method.rpartition("-")[0]: method for method in status(explained_folder).methods if method.stage == "score"}
    assert found["judging-generic"].num_latents == 8 and found["judging-generic"].num_left == 0
    assert status(explained_folder).is_complete
    again = standins.engine()
    assert run_score(explained_folder, again, controls=("generic", "lexical"), control_latents=8).num_latents == 0
    assert not again.requests
    run_score(explained_folder, again, controls=("generic", "lexical"), control_latents=12)
    frame = load_scores(explained_folder)
    assert frame[frame["control"] == "generic"]["latent"].nunique() == 12
    assert sum(GENERIC in request.prompt.messages[0][1] for request in again.requests) <= 8


def test_plan_prices_the_sample(explained_folder):
    config = ScoreConfig(results=explained_folder, coders=("a",), controls=("shuffled", "generic"), control_latents=8)
    judge = standins.engine()
    found = asyncio.run(estimate_score(config, standins.Source(), [standins.Scorer()], judge, sample=100))
    assert not judge.requests
    assert [estimate.num_latents for estimate in found] == [40, 40, 8]
    asyncio.run(
        score_from(
            config.model_copy(update={"controls": ("generic",)}), standins.Source(), [standins.Scorer()], judge, progress=False
        )
    )
    sent = sum(GENERIC in request.prompt.messages[0][1] for request in judge.requests)
    assert found[2].requests.value == sent > 0


def test_a_latent_without_a_lexical_rule_has_a_row(explained_folder):
    class Silent(standins.Source):
        def select(self, coder, latent):
            found = super().select(coder, latent)
            found.explain_statistics.activations[:] = 0
            return found

    config = ScoreConfig(results=explained_folder, coders=("a",), controls=("lexical",), control_latents=5)
    asyncio.run(score_from(config, Silent(), [standins.Scorer()], standins.engine(), progress=False))
    frame = load_scores(explained_folder)
    statuses = frame[frame["control"] == "lexical"]["status"]
    assert len(statuses) == 5 and set(statuses) <= {"not_applicable", "too_few_examples"}


def test_explanation_ids_differ_between_latents():
    ids = {asyncio.run(own_explanations("generic", planted(latent=i), resources()))[0].explanation_id for i in (1, 2)}
    assert len(ids) == 2
