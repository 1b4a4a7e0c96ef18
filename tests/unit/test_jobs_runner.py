"""Explain and score over shards: what is written, what is redone, and how a run ends."""

import asyncio
import dataclasses
import shutil

import jobs_standins as standins
import pandas as pd
import pytest

from autointerp.errors import ConfigError, EngineStopped, IdentityError, Interrupted, ResourceError, Transient
from autointerp.examples.selection import SelectionConfig
from autointerp.jobs.explain import ExplainConfig, explain_from
from autointerp.jobs.score import ScoreConfig, score_from
from autointerp.jobs.signals import StopFlag
from autointerp.jobs.status import status
from autointerp.jobs.verify import verify
from autointerp.llm.settings import EngineConfig, Prices
from autointerp.records import Capabilities
from autointerp.results.load import load_explanations, load_failures, load_scores, load_verdicts

TABLES = (load_explanations, load_verdicts, load_scores)


class Folder:
    """One results folder and short ways to run stages on it."""

    def __init__(self, path):
        self.path = path

    def explain(self, latents, *, engine=None, explainer=None, source=None, stop=None, progress=False, **settings):
        settings = {"coders": ("a",), "shard_latents": 8, "threads": 1, "grace_s": 1.0} | settings
        config = ExplainConfig(store="x", results=self.path, latents=latents, **settings)
        engine = engine or standins.engine()
        explainer = explainer or standins.Explainer()
        self.engine = engine if explainer.needs.engine else None
        run = explain_from(config, source or standins.Source(), explainer, self.engine, stop=stop, progress=progress)
        return asyncio.run(run)

    def score(self, *, engine=None, scorers=None, source=None, **settings):
        settings = {"threads": 1, "grace_s": 1.0} | settings
        config = ScoreConfig(results=self.path, **settings)
        self.engine = engine or standins.engine()
        run = score_from(config, source or standins.Source(), scorers or [standins.Scorer()], self.engine, progress=False)
        return asyncio.run(run)

    def tables(self):
        return [load(self.path) for load in TABLES]

    def markers(self, stage="explain"):
        return sorted((self.path / "state" / stage).rglob("shard-*.json"))


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "results")


@pytest.fixture
def other(tmp_path):
    return Folder(tmp_path / "other")


def assert_same(one, two):
    for left, right in zip(one.tables(), two.tables(), strict=True):
        pd.testing.assert_frame_equal(left, right)


def prompts(engine):
    return [request.prompt.messages[0][1] for request in engine.requests]


def test_every_planned_latent_has_a_row(folder):
    report = folder.explain("0-9,55")
    assert (report.num_latents, report.exit_code) == (11, 0)
    rows = load_explanations(folder.path).set_index("latent")
    assert rows["status"].value_counts().to_dict() == {"ok": 9, "too_few_examples": 2}
    assert rows.loc[[7, 55], "text"].isna().all()
    assert rows["explanation_id"].is_unique
    assert folder.score().exit_code == 0
    scores = load_scores(folder.path).set_index("latent")
    assert scores.loc[[7, 55], "status"].tolist() == ["too_few_examples"] * 2
    assert scores["value"].notna().sum() == 9
    assert len(load_verdicts(folder.path)) == 9 * 8
    assert verify(folder.path) == []


def test_a_second_run_sends_nothing(folder):
    folder.explain("0-9")
    assert folder.explain("0-9").num_sent == 0 and not folder.engine.requests
    folder.score()
    assert folder.score().num_latents == 0 and not folder.engine.requests


def test_grown_in_steps_or_at_once(folder, other):
    sent = []
    for latents in ("0-7", "5-9,20", "3-22"):
        folder.explain(latents, controls=("shuffled",), shard_latents=8)
        sent += prompts(folder.engine)
        folder.score(controls=("shuffled",))
        sent += prompts(folder.engine)
    other.explain("0-22", controls=("shuffled",), shard_latents=9)
    expected = prompts(other.engine)
    other.score(controls=("shuffled",))
    expected += prompts(other.engine)
    assert_same(folder, other)
    assert sorted(sent) == sorted(expected)
    assert len(sent) == len(set(sent))
    assert verify(folder.path) == verify(other.path) == []


def test_windows_are_written_once_for_two_explainers(folder):
    folder.explain("0-5")
    before = {path: path.stat().st_mtime_ns for path in (folder.path / "examples").rglob("*.parquet")}
    folder.explain("0-5", explainer=standins.Explainer(version=2))
    assert before == {path: path.stat().st_mtime_ns for path in (folder.path / "examples").rglob("*.parquet")}
    windows = pd.read_parquet(folder.path / "examples")
    assert len(windows) == 6 * 16
    assert ("".join(windows["pieces"][0]), len(windows["activations"][0])) == (windows["text"][0], standins.WINDOW)


def test_only_what_is_asked_for_is_paid(folder):
    """A second explainer over part of a shard leaves it partial, and done once the rest is asked for."""
    folder.explain("0-7")
    report = folder.explain("2-3", explainer=standins.Explainer(version=2))
    assert len(folder.engine.requests) == 2
    assert (report.exit_code, report.num_partial) == (0, 0)
    folder.explain("0-7", explainer=standins.Explainer(version=2))
    assert len(folder.engine.requests) == 8 - 2 - 1  # latent 7 has too few examples
    assert verify(folder.path) == []


def test_only_failed_items_are_redone(folder, other):
    failing = {"a 2 ", "a 5 "}

    def script(request):
        text = request.prompt.messages[0][1]
        return Transient("the connection dropped") if any(mark in text for mark in failing) else standins.script(request)

    report = folder.explain("0-9", engine=standins.FakeEngine(script), shard_latents=4)
    assert report.exit_code == 3 and report.num_partial == 2
    assert "2 no_reply" in report.sentence() and "Transient" in report.failures
    rows = load_explanations(folder.path).set_index("latent")
    assert rows["status"][[2, 5]].tolist() == ["no_reply"] * 2 and len(rows) == 10
    assert load_failures(folder.path)["error"].tolist() == ["Transient: the connection dropped"] * 2
    assert verify(folder.path) == []
    failing.clear()
    folder.explain("0-9", engine=standins.FakeEngine(script))
    assert len(folder.engine.requests) == 2
    assert not (folder.path / "failures" / "explain").exists() or load_failures(folder.path).empty
    other.explain("0-9")
    assert_same(folder, other)


def test_a_lost_verdict_is_asked_for_again(folder, other):
    folder.explain("0-5")
    calls = []

    def script(request):
        calls.append(request)
        return Transient("overloaded") if len(calls) == 4 else standins.script(request)

    report = folder.score(engine=standins.FakeEngine(script))
    assert report.exit_code == 3 and report.unscored == {"no_reply": 4}
    assert load_scores(folder.path)["num_no_reply"].sum() == 4
    assert status(folder.path).methods[1].unscored == {"no_reply": 4}
    again = folder.score()
    assert (again.exit_code, len(folder.engine.requests), again.num_logged) == (0, 1, 1)
    other.explain("0-5")
    other.score()
    assert_same(folder, other)


def test_a_kill_between_two_tables_of_a_shard(folder, other):
    """New verdicts beside old scores: neither a stale score nor a second request comes of it."""
    calls = []

    def script(request):
        calls.append(request)
        return Transient("overloaded") if len(calls) == 4 else standins.script(request)

    folder.explain("0-5")
    folder.score(engine=standins.FakeEngine(script))
    other.explain("0-5")
    other.score()
    for whole in (other.path / "verdicts").rglob("*.parquet"):
        shutil.copy(whole, folder.path / whole.relative_to(other.path))
    assert "its digest differs" in verify(folder.path)[0]
    assert folder.score(latents="0").num_latents == 6
    assert len(folder.engine.requests) == 1
    assert_same(folder, other)
    assert verify(folder.path) == []


def test_a_latent_that_raises_is_a_row_and_the_run_goes_on(folder, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "very-secret-key")

    class Broken(standins.Explainer):
        async def explain(self, latent, resources, /):
            if latent.latent == 3:
                raise ZeroDivisionError("very-secret-key and sk-abcdefghijk")
            return await super().explain(latent, resources)

    report = folder.explain("0-5", explainer=Broken())
    assert report.exit_code == 3 and report.failures == {"ZeroDivisionError": 1}
    assert load_explanations(folder.path).set_index("latent")["status"][3] == "no_reply"
    assert load_failures(folder.path)["error"].tolist() == ["ZeroDivisionError: [redacted] and sk-[redacted]"]


def test_examples_that_cannot_be_read_are_a_row(folder):
    class Damaged(standins.Source):
        def select(self, coder, latent):
            if latent == 1:
                raise KeyError("no such group")
            return super().select(coder, latent)

    assert folder.explain("0-3", source=Damaged()).failures == {"KeyError": 1}


def test_the_latents_of_a_shard_are_announced_before_the_first_is_read(folder):
    class Listening(standins.Source):
        def select(self, coder, latent):
            assert (coder, latent) in self.expected
            return super().select(coder, latent)

    source = Listening()
    folder.explain("0-9", source=source, shard_latents=4)
    assert source.num_selected == len(source.expected) == len(set(source.expected)) == 10


def test_a_full_disk_stops_the_run(folder):
    class Full(standins.Source):
        def select(self, coder, latent):
            if latent == 5:
                raise ResourceError("cannot write: the disk is full")
            return super().select(coder, latent)

    with pytest.raises(ResourceError, match="the disk is full"):
        folder.explain("0-9", source=Full(), shard_latents=4, concurrency=1)
    assert verify(folder.path) == []
    folder.explain("0-9")
    assert len(load_explanations(folder.path)) == 10


@pytest.mark.parametrize("limits", [{"max_requests": 5}, {"max_cost": 0.0006, "prices": Prices(input=1.0, output=10.0)}])
def test_budget(folder, other, limits):
    report = folder.explain("0-19", engine_options=EngineConfig(**limits), concurrency=2)
    assert report.exit_code == 3 and report.stop.kind == "budget"
    assert "finished work is kept" in report.sentence()
    sent = len(folder.engine.requests)
    assert 2 <= sent <= (5 if "max_requests" in limits else 18)
    assert report.cost <= limits.get("max_cost", 0)
    assert len(load_explanations(folder.path)) >= sent
    assert verify(folder.path) == []
    folder.explain("0-19")
    assert len(folder.engine.requests) == 19 - sent
    other.explain("0-19")
    assert_same(folder, other)


def test_a_server_that_is_gone_stops_the_run(folder, other):
    calls = []

    def script(request):
        calls.append(request)
        return EngineStopped("the key was refused") if len(calls) > 6 else standins.script(request)

    with pytest.raises(EngineStopped, match="the key was refused"):
        folder.explain("0-19", engine=standins.FakeEngine(script), concurrency=2)
    rows = load_explanations(folder.path)
    assert 6 <= len(rows) <= 8 and set(rows["status"]) <= {"ok", "too_few_examples"}
    folder.explain("0-19")
    assert len(folder.engine.requests) == 19 - 6
    other.explain("0-19")
    assert_same(folder, other)


def test_a_signal_commits_what_is_whole(folder, other):
    flag = StopFlag()

    def script(request):
        if " 9 " in request.prompt.messages[0][1]:
            flag.request("SIGTERM")
        return standins.script(request)

    with pytest.raises(Interrupted, match=r"SIGTERM; finished work is committed"):
        folder.explain("0-19", engine=standins.FakeEngine(script, max_delay_s=0.01), stop=flag, concurrency=3)
    sent = len(folder.engine.requests)
    assert 3 <= sent < 19
    assert len(load_explanations(folder.path)) >= sent
    assert verify(folder.path) == []
    folder.explain("0-19")
    assert len(folder.engine.requests) == 19 - sent
    other.explain("0-19")
    assert_same(folder, other)


def test_cancelling_commits_what_is_whole(folder):
    async def run():
        config = ExplainConfig(store="x", results=folder.path, latents="0-19", coders=("a",), shard_latents=4, concurrency=2)
        engine = standins.engine(max_delay_s=0.05)
        task = asyncio.create_task(explain_from(config, standins.Source(), standins.Explainer(), engine, progress=False))
        while len(engine.requests) < 8:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return len(engine.requests)

    sent = asyncio.run(run())
    assert len(load_explanations(folder.path)) >= sent - 2
    folder.explain("0-19")
    assert len(folder.engine.requests) == 19 - sent


def test_bounds(folder):
    """Concurrency is kept, and examples are built only a little ahead of the engine."""
    source, ahead = standins.Source(), []

    class Watched(standins.FakeEngine):
        async def complete(self, request, /):
            ahead.append(source.num_selected - len(self.requests))
            return await super().complete(request)

    folder.explain("0-49", engine=Watched(standins.script, max_delay_s=0.002), source=source, concurrency=3, shard_latents=50)
    assert folder.engine.max_in_flight == 3
    assert max(ahead) <= 3 + 2 + 1 + 1


def test_another_store_is_refused(folder):
    folder.explain("0-2")
    with pytest.raises(IdentityError, match="store_id is store-1 there and store-2 now"):
        folder.explain("0-2", source=standins.Source(store_id="store-2"))
    changed = standins.Source()
    changed.coder_ids = {"a": "other", "b": "coder-b"}
    with pytest.raises(IdentityError, match="coder named 'a': coder_id is coder-a there and other now"):
        folder.explain("0-2", source=changed)


def test_what_a_method_reads_names_it(folder):
    folder.explain("0-2")
    folder.explain("0-2", explainer=standins.Explainer(version=2))
    folder.explain("0-2", source=standins.Source(selection=SelectionConfig(num_explain=10)))
    # What only scorers see makes no other explainer.
    folder.explain("0-2", source=standins.Source(selection=SelectionConfig(num_positives=10)))
    assert len(list((folder.path / "explanations").iterdir())) == 3
    with pytest.raises(ConfigError, match="has several explainers and the choice is open: name one of asking-"):
        folder.score()


def test_controls_have_rows_of_their_own(folder):
    folder.explain("0-5", controls=("shuffled",))
    folder.score(controls=("shuffled",))
    explanations = load_explanations(folder.path).set_index("latent")["explanation_id"]
    scores = load_scores(folder.path)
    control = scores[scores["control"] == "shuffled"].set_index("latent")
    own = scores[scores["control"].isna()].set_index("latent")
    assert control["explanation_id"][2] == explanations[3] and own["explanation_id"][2] == explanations[2]
    assert 6 in explanations.index and 6 not in own.index  # the partner of 5 is explained, not scored
    before = len(folder.engine.requests)
    assert before == len(set(prompts(folder.engine))) == 2 * 2 * 6


def test_a_control_without_an_explained_partner(folder):
    folder.explain("0-6", controls=("shuffled",))  # the partner of 6 is 7, which has too few examples
    folder.score(controls=("shuffled",))
    scores = load_scores(folder.path).set_index(["latent", scores_control(folder)])
    assert scores["status"][6, "shuffled"] == "not_applicable"


def scores_control(folder):
    return load_scores(folder.path)["control"].fillna("none").to_numpy()


def test_scoring_waits_for_explanations(folder):
    folder.explain("0-3")
    report = folder.score(controls=("shuffled",))
    assert report.exit_code == 3 and report.num_waiting == 1  # 4, the partner of 3, is not explained
    assert "1 latents wait for explanations" in report.sentence()
    folder.explain(None, controls=("shuffled",))
    assert folder.score(controls=("shuffled",)).exit_code == 0
    with pytest.raises(ConfigError, match="none of these latents in its plan"):
        folder.score(latents="40")


def test_what_is_needed_is_said_before_work(folder):
    with pytest.raises(ConfigError, match="the explainer 'asking' needs an LLM: give --engine"):
        asyncio.run(
            explain_from(
                ExplainConfig(store="x", results=folder.path, latents="1"), standins.Source(), standins.Explainer(), None
            )
        )
    scorer = standins.Scorer()
    scorer.needs = dataclasses.replace(scorer.needs, labels=True)
    folder.explain("1")
    with pytest.raises(ConfigError, match="needs label probabilities, which fake:fake does not give"):
        folder.score(scorers=[scorer], engine=standins.engine(capabilities=Capabilities(labels=False)))
    with pytest.raises(ConfigError, match="has no coder 'c'"):
        folder.explain("1", coders=("c",))
    with pytest.raises(ConfigError, match="has no plan yet and no latents are named"):
        Folder(folder.path.parent / "empty").explain(None)


def test_an_explainer_without_an_engine(folder):
    report = folder.explain("0-9", explainer=standins.Rules(), threads=2)
    assert (report.num_latents, report.num_sent, report.exit_code) == (10, 0, 0)
    assert not (folder.path / "replies").exists()


def test_folder_is_readable_during_a_run(folder):
    seen = []

    def look(done, total):
        if list((folder.path / "explanations").rglob("shard-*.parquet")):
            seen.append((len(pd.read_parquet(folder.path / "explanations")), len(load_explanations(folder.path))))

    folder.explain("0-19", engine=standins.engine(max_delay_s=0.04), progress=look, concurrency=1, shard_latents=4)
    assert seen and all(0 < one <= two <= 20 for one, two in seen)


def test_progress_counts_every_latent(folder):
    calls = []
    folder.explain("0-9", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (10, 10)
    folder.explain("0-9", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (10, 10)
