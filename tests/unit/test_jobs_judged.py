"""Explainers that judge candidates, through the stages: rows, ids, what is scored, resuming, two engines, the plan."""

import asyncio
from dataclasses import replace

import jobs_standins as standins
import pandas as pd
import pytest
from judged import CHAIN, engine, is_judging, judged, texts_of, validated
from planted import VOCABULARY

from autointerp.errors import ConfigError, Transient
from autointerp.examples.selection import SelectionConfig, selection_id
from autointerp.jobs.cost import estimate_explain
from autointerp.jobs.explain import ExplainConfig, explain_from, opened
from autointerp.jobs.methods import build_explainer
from autointerp.jobs.score import ScoreConfig, score_from
from autointerp.jobs.verify import verify
from autointerp.llm.fake import FakeEngine
from autointerp.llm.settings import EngineConfig
from autointerp.records import Capabilities
from autointerp.reports.pages import latent_page
from autointerp.results.load import load_explanations, load_scores, load_verdicts
from autointerp.scorers.detection import Detection

METHODS = ["best_of:4", "refine:3"]


class Source(standins.Source):
    """The planted latent under many numbers; latent 7 has too few examples."""

    def __init__(self):
        super().__init__(coders=("a",), selection=SelectionConfig(window=16))
        self.vocabulary = VOCABULARY

    def select(self, coder, latent, *, num_validate=0):
        if latent == 7:
            return super().select(coder, latent)
        found = validated(num=20, seed=100 * (latent - 6), coder=coder, latent=latent)
        found = replace(found, selection_id=selection_id(self.store_id, self.coder_ids[coder], self.selection))
        return found if num_validate else without_validate_pool(found)


def without_validate_pool(latent):
    nothing = latent.validate_positives.take([])
    return replace(latent, validate_positives=nothing, validate_negatives=nothing)


def write(request):
    return f"EXPLANATION: {CHAIN[request.sample]}"


class Folder:
    def __init__(self, path, method, judge=None):
        self.path, self.method, self.judge, self.engine = path, method, judge, engine(write)

    def explain(self, latents="6-8", *, script=None, **settings):
        if script is not None:
            self.engine.script = script
        config = ExplainConfig(store="x", results=self.path, latents=latents, shard_latents=1, **settings)
        explainer = build_explainer(self.method, {})
        coroutine = explain_from(config, Source(), explainer, self.engine, judge=self.judge, progress=False)
        return asyncio.run(coroutine)

    def score(self):
        self.scored = engine(write)
        config = ScoreConfig(results=self.path, scorers=("detection",))
        return asyncio.run(score_from(config, Source(), [Detection()], self.scored, progress=False))


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def folder(tmp_path, method):
    return Folder(tmp_path / "r", method)


def test_rows_ids_and_what_is_scored(folder, method):
    report = folder.explain()
    assert report.exit_code == 0, report.sentence()
    table = load_explanations(folder.path)
    rows = table[table["latent"] == 6].set_index("sample")
    assert rows["status"].to_dict() == {0: "not_applicable", 1: "not_applicable", 2: "not_applicable", 3: "ok"}
    assert rows["text"].isna().to_dict() == {0: True, 1: True, 2: True, 3: False}
    assert rows["candidate"].dropna().to_dict() == dict(enumerate(CHAIN[:3]))
    assert rows["validate_score"].idxmax() == 3 and rows["reason"].notna().sum() == 3
    parents = {0: [], 1: [], 2: [], 3: []} if method.startswith("best") else {0: [], 1: [0], 2: [0], 3: [2]}
    ids = rows["explanation_id"]
    assert ids.is_unique
    assert {k: list(found) for k, found in rows["parent_ids"].items()} == {k: [ids[p] for p in parents[k]] for k in parents}
    assert table[table["latent"] == 7]["status"].tolist() == ["too_few_examples"]
    assert verify(folder.path) == []

    assert folder.score().exit_code == 0
    winners = table[table["status"] == "ok"]
    assert len(winners) == 2
    scores = load_scores(folder.path).query("is_headline")
    assert set(scores["explanation_id"]) == set(winners["explanation_id"]) | set(table[table["latent"] == 7]["explanation_id"])
    assert scores["status"].tolist() == ["ok", "too_few_examples", "ok"]
    assert set(load_verdicts(folder.path)["explanation_id"]) == set(winners["explanation_id"])
    assert {texts_of(request)[0] for request in folder.scored.requests} == {CHAIN[3]}
    assert len(folder.scored.requests) == 2 * 100 / 5


@pytest.mark.parametrize("limit", [1, 30, 60])
def test_stopped_anywhere_and_run_again_it_asks_the_same_and_writes_the_same(folder, tmp_path, method, limit):
    whole = Folder(tmp_path / "whole", method)
    whole.explain()
    report = folder.explain(engine_options=EngineConfig(max_requests=limit), concurrency=3)
    assert report.stop.kind == "budget" and len(folder.engine.requests) == limit
    assert folder.explain().exit_code == 0
    assert len(folder.engine.requests) == len(whole.engine.requests)
    assert set(folder.engine.requests) == set(whole.engine.requests)
    pd.testing.assert_frame_equal(load_explanations(folder.path), load_explanations(whole.path))


def test_a_missing_answer_of_the_judge_leaves_the_latent_for_another_run(folder, tmp_path, method):
    failed = []

    def failing(request):
        if is_judging(request) and texts_of(request)[0] == CHAIN[2] and len(failed) < 2:
            failed.append(request)
            return Transient("timeout")
        return judged(request) if is_judging(request) else write(request)

    report = folder.explain(script=failing)
    assert report.exit_code == 3 and set(load_explanations(folder.path)["status"]) & {"no_reply"}
    assert folder.explain(script=engine(write).script).exit_code == 0
    whole = Folder(tmp_path / "whole", method)
    whole.explain()
    pd.testing.assert_frame_equal(load_explanations(folder.path), load_explanations(whole.path))


def test_another_engine_judges_through_the_same_log_and_limits(tmp_path, method):
    judge = FakeEngine(judged, model="judge")
    folder = Folder(tmp_path / "r", method, judge)
    stopped = folder.explain(engine_options=EngineConfig(max_requests=20), concurrency=2)
    assert stopped.num_sent == len(folder.engine.requests) + len(judge.requests) == 20
    folder.explain()
    whole = Folder(tmp_path / "whole", method)
    whole.explain()
    assert len(folder.engine.requests) + len(judge.requests) == len(whole.engine.requests)
    assert all(map(is_judging, judge.requests)) and not any(map(is_judging, folder.engine.requests))
    mine, theirs = load_explanations(folder.path), load_explanations(whole.path)
    assert mine["text"].equals(theirs["text"]) and set(mine["judge"].dropna()) == {"judge"}
    # Who judged is part of what the explanations are.
    assert not set(mine["explainer_id"]) & set(theirs["explainer_id"])
    assert verify(folder.path) == []


def test_the_plan_says_what_is_sent(folder, method):
    config = ExplainConfig(store="x", results=folder.path, latents="6-8")
    [found] = asyncio.run(estimate_explain(config, Source(), build_explainer(method, {}), engine(write), sample=10))
    folder.explain()
    sent = len(folder.engine.requests)
    if method.startswith("refine"):
        # The second revision was not kept, so that mistakes were not looked for again.
        assert found.requests.value == 2 * (1 + 8 + 3 * 17) and sent == 2 * (1 + 8 + 3 * 17 - 8)
        assert "requests       120 (120 to 120) at most" in found.text()
    else:
        assert found.requests.value == sent == 2 * (4 + 4 * 8) and "at most" not in found.text().splitlines()[1]


def test_what_a_judge_cannot_do_is_said_before_anything_is_sent(folder):
    explainer = build_explainer("best_of", {"scorer_options": {"mode": "labels"}})
    config = ExplainConfig(store="x", results=folder.path, latents="6-8")
    plain = FakeEngine(write, model="plain", capabilities=Capabilities(labels=False))
    able = FakeEngine(write, model="able")
    for engines in ((plain, None), (able, plain)):
        with pytest.raises(ConfigError, match="label probabilities, which fake:plain does not give"):
            asyncio.run(explain_from(config, Source(), explainer, engines[0], judge=engines[1], progress=False))
    assert not plain.requests and not able.requests and not folder.path.exists()


def test_a_judge_that_nobody_needs_is_refused():
    async def enter(name):
        config = ExplainConfig(store="x", results="y", engine="openai:a@http://b", judge="openai:c@http://d", explainer=name)
        async with opened(config, build_explainer(name, {})):
            pass

    with pytest.raises(ConfigError, match="the explainer 'default' has nothing judged; leave out judge"):
        asyncio.run(enter("default"))


def test_the_reason_for_a_row_without_a_result_is_in_the_tables(tmp_path):
    """A rule is asked of explanations that carry none, and of a latent that has no explanation."""
    folder = Folder(tmp_path / "r", "best_of:2")
    folder.explain(script=lambda request: judged(request) if is_judging(request) else "EXPLANATION: nothing")
    config = ScoreConfig(results=folder.path)
    by_rule = Detection(Detection.Config(judge="rule"))
    asyncio.run(score_from(config, Source(), [by_rule], None, progress=False))
    found = load_scores(folder.path).set_index("latent")
    assert found["status"].to_dict() == {6: "not_applicable", 7: "too_few_examples", 8: "not_applicable"}
    assert found["reason"][6] == "the explanation carries no rule to judge by" and pd.isna(found["reason"][7])


def test_pages_show_what_stands_and_why_there_is_nothing():
    row = {"coder": "a", "latent": 1, "explainer": "best_of", "explainer_id": "sha256:00", "explanation_id": "x", "model": "m"}
    row |= {"prompt_id": None, "text": None, "selection_id": "s", "density": 0.1, "status": "not_applicable", "sample": 0}
    tables = {name: [] for name in ("scores", "verdicts", "examples")}
    loser = row | {"reason": "not chosen"}
    winner = row | {"sample": 1, "status": "ok", "text": "the word", "reason": None}
    [shown] = latent_page("a", 1, {"explanations": [loser, winner], **tables}).explanations
    assert shown["text"] == "the word"
    [shown] = latent_page("a", 1, {"explanations": [loser], **tables}).explanations
    assert shown["why"] == "not chosen"
