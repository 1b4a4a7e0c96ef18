"""Controls: what they put in place of an explanation, on which latents, who judges, and what they cost."""

import asyncio
from dataclasses import replace
from typing import Literal

import jobs_standins as standins
import numpy as np
import pandas as pd
import pytest
from planted import planted, resources

from autointerp.config import Config
from autointerp.explainers.lexical import Lexical
from autointerp.jobs.control_gaps import gaps
from autointerp.jobs.cost import estimate_explain, estimate_score
from autointerp.jobs.explain import ExplainConfig, explain_from, wanted_latents
from autointerp.jobs.latents import CoderStatistics, choose_latents, hash_order
from autointerp.jobs.methods import build_scorer
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
from autointerp.protocols import Needs
from autointerp.records import ScoreResult
from autointerp.reports.source import Source
from autointerp.reports.summary import overview
from autointerp.reports.terminal import summary_table
from autointerp.reports.write import write_report
from autointerp.results.folder import Method, ResultsFolder
from autointerp.results.load import load_scores
from autointerp.rules import Rule
from autointerp.scorers.detection import Detection, DetectionConfig
from autointerp.scorers.fuzzing import Fuzzing, FuzzingConfig


def test_a_sample_is_seeded_and_does_not_depend_on_the_plan():
    counts = np.where(np.arange(300) % 3 > 0, 5, 0)
    statistics = [
        CoderStatistics(coder=name, counts=counts * live, density=counts / 1e3) for name, live in (("a", 1), ("dead", 0))
    ]
    chosen = sampled(statistics, 40, seed=0)
    assert list(chosen) == ["a"] and len(chosen["a"]) == 40 and (chosen["a"] % 3 > 0).all()
    assert chosen["a"].tolist() == choose_latents("random:40", statistics[0], seed=0).tolist()
    assert set(sampled(statistics, 20, seed=0)["a"].tolist()) < set(chosen["a"].tolist())
    assert set(sampled(statistics, 40, seed=1)["a"].tolist()) != set(chosen["a"].tolist())
    assert len(sampled(statistics, 500, seed=0)["a"]) == 200
    assert sampled(statistics, None, seed=0) is None


def test_a_folder_grown_in_steps_has_the_same_controls(tmp_path):
    controls = {"controls": ("generic",), "control_latents": 8}
    for name, steps in (("whole", ["0-49"]), ("grown", ["20-29", "0-19", "10-49"])):
        for latents in steps:
            config = ExplainConfig(store="x", results=tmp_path / name, latents=latents, coders=("a",), shard_latents=10)
            asyncio.run(explain_from(config, standins.Source(), standins.Explainer(), standins.engine(), progress=False))
            run_score(tmp_path / name, standins.engine(), **controls)
    keys = ["coder", "latent", "scorer", "control", "metric", "quantile", "negatives"]
    whole, grown = (load_scores(tmp_path / name).sort_values(keys).reset_index(drop=True) for name in ("whole", "grown"))
    assert (whole["control"] == "generic").sum() > 0
    pd.testing.assert_frame_equal(whole, grown)


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
    config = ExplainConfig(store="x", results=tmp_path / "r", latents="0-49", coders=("a",), shard_latents=10)
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
    assert len(under["none"]) == 50 and len(under["generic"]) == len(under["lexical"]) == 8
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


class Strict(standins.Scorer):
    """Scores higher under other settings and for other engines, and can be judged by rule."""

    class Config(Config):
        judge: Literal["engine", "rule"] = "engine"
        strictness: float = 0.3

    def __init__(self, config):
        super().__init__(f"strict {config.strictness}")
        self.name, self.config, self.needs = "judging", config, Needs(engine=config.judge == "engine")

    def identity(self):
        return {"config": self.config.identity()}

    async def score(self, latent, explanation, resources, /, *, control=None):
        judge = resources.engine.id.model if self.needs.engine else "rule"
        asked = resources if self.needs.engine else replace(resources, engine=standins.engine())
        found = await super().score(latent, explanation, asked, control=control)
        shift = self.config.strictness + [*ENGINES, "rule"].index(judge) / 10
        scores = (replace(score, value=score.value + shift, judge=judge) for score in found.scores)
        return ScoreResult(verdicts=found.verdicts, scores=tuple(scores))


ENGINES = ["fake", "other"]


def test_each_setting_and_judge_has_its_own_controls(tmp_path):
    """Two settings and two judges of one scorer in one folder: the report's controls are those of each alone."""
    config = ExplainConfig(store="x", results=tmp_path / "r", latents="0-15", coders=("a",))
    asyncio.run(explain_from(config, standins.Source(), standins.Explainer(), standins.engine(), progress=False))
    for model in ENGINES:
        scorers = [Strict(Strict.Config(strictness=strictness)) for strictness in (0.3, 0.95)]
        config = ScoreConfig(results=tmp_path / "r", coders=("a",), controls=CONTROLS, control_latents=40)
        engine = standins.engine(model=model)
        asyncio.run(score_from(config, standins.Source(), scorers, engine, progress=False))
    methods = {method.id: method for method in ResultsFolder.open(tmp_path / "r").methods("score")}
    frame = load_scores(tmp_path / "r").set_index("latent")
    series = {key.scorer_id: by["a"].frame for key, by in overview(Source(tmp_path / "r")).series.items()}
    assert set(series) == {i for i, method in methods.items() if method.control is None} and len(series) == 4
    for base, found in series.items():
        for i, method in methods.items():
            is_alike = all(method.identity[name] == methods[base].identity[name] for name in ("settings", "judge"))
            if method.control in ("shuffled", "generic") and is_alike:
                values = frame[frame["scorer_id"] == i]["value"].dropna()
                assert len(values) > 5
                column = found["control" if method.control == "shuffled" else method.control]
                assert column.dropna().to_dict() == values.to_dict()
    # Who has the table alone finds the same by base_id.
    assert set(frame["base_id"]) == set(series)
    assert (frame.groupby(["base_id", "control"])["scorer_id"].nunique() == 1).all() and len(methods) == 16


def test_plan_prices_the_sample(explained_folder):
    config = ScoreConfig(results=explained_folder, coders=("a",), controls=("shuffled", "generic"), control_latents=8)
    judge = standins.engine()
    found = asyncio.run(estimate_score(config, standins.Source(), [standins.Scorer()], judge, sample=100))
    assert not judge.requests
    assert [estimate.num_latents for estimate in found] == [50, 50, 8]
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


def test_a_short_list_without_controls_is_told_of():
    statistics = CoderStatistics(coder="a", counts=np.where(np.arange(400) < 390, 5, 0), density=np.ones(400))
    order = hash_order(statistics, seed=0).tolist()
    short = np.array(sorted([*order[205:300], 395]))  # 95 live latents, the first of them at rank 205; one silent
    [sentence] = gaps(["generic", "lexical"], {"a": short}, [statistics], 200, seed=0)
    assert sentence == (
        "a has no controls generic and lexical: 0 of its 95 latents to score are among the 200 sampled; "
        "--set control_latents=300 runs them on 95, =all on all"
    )
    [sentence] = gaps(["generic"], {"a": np.array(order[195:205])}, [statistics], 200, seed=0)
    assert "a has few latents with the control generic: 5 of its 10 latents" in sentence
    assert "--set control_latents=205 runs it on 10" in sentence
    for whole in (order[:10], order[:300], order):
        assert gaps(["generic"], {"a": np.array(whole)}, [statistics], 200, seed=0) == ()
    assert gaps(["generic"], {"a": short}, [statistics], None, seed=0) == gaps([], {"a": short}, [statistics], 9, seed=0) == ()


def test_score_plan_and_report_tell_of_a_list_without_controls(tmp_path, caplog):
    order = hash_order(standins.Source().statistics("a"), seed=0).tolist()
    latents = tuple(latent for latent in order[20:30] if latent != 7)[:8]
    config = ExplainConfig(store="x", results=tmp_path / "r", latents=latents, coders=("a",))
    asyncio.run(explain_from(config, standins.Source(), standins.Explainer(), standins.engine(), progress=False))
    settings = {"controls": CONTROLS, "control_latents": 20}
    scoring = ScoreConfig(results=tmp_path / "r", coders=("a",), **settings)
    found = asyncio.run(estimate_score(scoring, standins.Source(), [standins.Scorer()], standins.engine(), sample=100))
    assert [len(estimate.notes) for estimate in found] == [0, 0, 1, 1]
    assert "note           a has no control generic: 0 of its 8 latents to score are among the 20" in found[2].text()
    report = run_score(tmp_path / "r", standins.engine(), **settings)
    expected = "a has no controls generic and lexical: 0 of its 8 latents to score are among the 20 sampled"
    assert len(report.notes) == 1 and expected in report.sentence() and expected in caplog.text
    assert expected + "; score again" in summary_table(tmp_path / "r")
    assert expected + "; score again" in write_report(tmp_path / "r").read_text()
    # What helps, and is then no longer told.
    report = run_score(tmp_path / "r", standins.engine(), controls=CONTROLS, control_latents="all")
    assert report.notes == () and (load_scores(tmp_path / "r")["control"] == "generic").sum() >= 8
    assert "sampled" not in summary_table(tmp_path / "r")
    assert "sampled;" not in write_report(tmp_path / "r").read_text()


def test_status_knows_the_largest_sample(explained_folder):
    def counted():
        [found] = [method for method in status(explained_folder).methods if "generic" in method.method]
        return found.num_finished, found.num_latents

    for num, expected in ((8, 8), (12, 12), (4, 12), ("all", 50), (4, 50)):
        run_score(explained_folder, standins.engine(), controls=("generic",), control_latents=num)
        assert counted() == (expected, expected)


class WithControl(standins.Source):
    """Coder b is a control of a; both have 300 live latents."""

    def __init__(self, **options):
        super().__init__(**options)
        self.control_of = {"b": "a"}

    def statistics(self, coder):
        counts = np.full(300, 5)
        return CoderStatistics(coder=coder, counts=counts, density=counts / 1e3)


def test_control_coders_get_a_sample(tmp_path):
    def wanted(latents, **changes):
        found = wanted_latents(ExplainConfig(store="x", results="r", latents=latents, **changes), source)
        return {coder: chosen.tolist() for coder, chosen in found.items()}

    source = WithControl()
    first = choose_latents("random:200", source.statistics("b"), seed=0).tolist()
    for spec, of_others in (("all", 300), ("density:0..1", 300), ("random:250", 250), ("random:150", 150)):
        found = wanted(spec)
        assert len(found["a"]) == of_others
        assert set(found["b"]) <= set(first) and len(found["b"]) == min(of_others, 200)
    assert wanted("0-249")["b"] == list(range(250))
    for num, expected in ((20, 20), (None, 300), ("all", 300)):
        assert len(wanted("all", control_coder_latents=num)["b"]) == expected


def test_the_plan_prices_the_sample_of_control_coders_and_says_so(tmp_path):
    config = ExplainConfig(store="x", results=tmp_path / "r", latents="all", control_coder_latents=10)
    engine = standins.engine()
    [planned] = asyncio.run(estimate_explain(config, WithControl(), standins.Explainer(), engine, sample=1000))
    assert planned.num_latents == 310
    report = asyncio.run(explain_from(config, WithControl(), standins.Explainer(), engine, progress=False))
    assert report.num_latents == 310 and len(engine.requests) == planned.requests.value
    [note] = planned.notes
    assert note.startswith("10 of the 300 latents of control coder b that --latents names") and note in planned.text()
    assert report.notes == planned.notes and note in report.sentence()
    [again] = asyncio.run(estimate_explain(config, WithControl(), standins.Explainer(), engine, sample=1000))
    assert again.num_latents == 0
