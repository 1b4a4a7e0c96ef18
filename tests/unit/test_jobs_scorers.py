"""The score stage with scorers that need an embedder or no explanation, and with all scorers at once."""

import asyncio
import dataclasses
import json

import jobs_standins as standins
import numpy as np
import pytest

from autointerp.errors import ConfigError
from autointerp.examples.selection import SelectionConfig
from autointerp.jobs.cost import estimate_score
from autointerp.jobs.explain import ExplainConfig, explain_from
from autointerp.jobs.methods import build_scorer, check_needs
from autointerp.jobs.score import ScoreConfig, build_scorers, score_from, usable
from autointerp.jobs.verify import verify
from autointerp.llm.fake import FakeEngine
from autointerp.protocols import Embedder, Resources
from autointerp.records import Capabilities
from autointerp.reports.index import coverage_rows
from autointerp.reports.source import Source as Reports
from autointerp.reports.summary import overview
from autointerp.results.folder import ResultsFolder
from autointerp.results.load import load_scores, load_verdicts, summary
from autointerp.scorers import REGISTRY
from autointerp.scorers.detection import Detection


class Lengths:
    """Embeds a text by its length and a hash: unit vectors in the plane."""

    id = "lengths"

    def __init__(self):
        self.num = 0

    def embed(self, texts):
        self.num += len(texts)
        angles = np.array([len(text) % 7 / 4 for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


@pytest.fixture
def results(tmp_path):
    explain(tmp_path / "r", standins.Explainer())
    return tmp_path / "r"


def explain(path, explainer):
    config = ExplainConfig(store="x", results=path, latents="5-9", coders=("a",), controls=("shuffled",))
    asyncio.run(explain_from(config, standins.Source(), explainer, standins.engine(), progress=False))


def score(results, *scorers, engine=None, explainer=None, **options):
    config = ScoreConfig(results=results, controls=("shuffled",), explainer=explainer)
    built = [build_scorer(name, {}) if isinstance(name, str) else name for name in scorers]
    return asyncio.run(score_from(config, standins.Source(), built, engine, progress=False, **options))


def test_a_latent_is_scored_without_an_explanation_under_a_folder_of_its_own(results):
    judge = FakeEngine(lambda request: "2")
    report = score(results, "intruder", engine=judge)
    assert report.exit_code == 0
    folder = ResultsFolder.open(results)
    plain, control = sorted(folder.methods("score"), key=lambda m: m.control or "")
    assert plain.explainer == control.explainer == "latent"
    assert sorted(p.name for p in (results / "scores").iterdir()) == ["latent"]
    assert {p.name for p in (results / "verdicts" / "latent").iterdir()} == {plain.label, control.label}
    scores, verdicts = load_scores(results), load_verdicts(results)
    assert set(scores.explainer) == {"latent"} and set(scores.explanation_id) == {""}
    assert set(scores.loc[scores.is_headline & scores.control.isna(), "latent"]) == {5, 6, 7, 8, 9}
    assert scores.loc[scores.latent == 7, "status"].eq("too_few_examples").all()
    # Latent 50's partner is not planned: the control is the latent's own windows and needs none.
    assert set(verdicts.loc[verdicts.control == "shuffled", "latent"]) == {5, 6, 8, 9}
    assert verify(results) == []


def test_what_needs_no_explanation_is_done_once_for_all_explainers(results):
    explain(results, standins.Explainer(version=2))
    labels = [m.label for m in ResultsFolder.open(results).methods("explain")]
    first = FakeEngine(lambda request: "2")
    score(results, "intruder", engine=first, explainer=labels[0])
    second = FakeEngine(lambda request: "2")
    report = score(results, "intruder", engine=second, explainer=labels[1])
    assert first.requests and not second.requests and report.exit_code == 0


def test_it_needs_no_explanation_that_worked(results):
    class Mute(standins.Explainer):
        name = "mute"

        async def explain(self, latent, resources, /):
            return [row.with_(status="unparseable", text=None) for row in await super().explain(latent, resources)]

    other = results.with_name("mute")
    explain(other, Mute())
    score(other, "intruder", engine=FakeEngine(lambda request: "1"))
    scores = load_scores(other)
    assert (scores.loc[scores.is_headline & (scores.latent != 7), "status"] == "ok").all()


def test_embedders_are_named_as_judges_and_part_of_the_identity(results):
    embedder = Lengths()
    assert isinstance(embedder, Embedder)
    report = score(results, "embedding", "example_embedding", embedder=embedder)
    assert report.exit_code == 0 and report.num_sent == 0 and embedder.num
    scores = load_scores(results)
    assert set(scores.judge) == {"lengths"} and set(scores.scorer) == {"embedding", "example_embedding"}
    assert set(scores.loc[scores.scorer == "embedding", "explainer"]) == {"asking"}
    verdicts = load_verdicts(results)
    assert verdicts.value.notna().all() and verdicts.probability.isna().all()
    other = Lengths()
    other.id = "other"
    score(results, "embedding", embedder=other)
    assert len({m.id for m in ResultsFolder.open(results).methods("score")}) == 6
    assert verify(results) == []


def test_rows_do_not_depend_on_how_often_or_with_what_it_is_run(results, tmp_path):
    other = tmp_path / "again"
    explain(other, standins.Explainer())
    judge = FakeEngine(lambda request: "2", max_delay_s=0.002)
    score(results, "intruder", "embedding", engine=judge, embedder=Lengths())
    score(other, "embedding", embedder=Lengths())
    score(other, "intruder", engine=FakeEngine(lambda request: "2"))
    keys = ["scorer", "latent", "control", "negatives", "metric", "quantile"]
    one, two = (load_scores(path).sort_values(keys, ignore_index=True) for path in (results, other))
    assert one.equals(two)


def test_all_runs_what_can_be_run_and_lists_the_rest():
    config = ScoreConfig(results="x", scorers=("all",))
    scorers = build_scorers(config)
    assert len(scorers) == len(REGISTRY)
    found, left_out = usable(config.model_copy(update={"embedder": "e"}), scorers, None)
    assert {scorer.name for scorer in found} == {"embedding", "example_embedding"}
    assert len(left_out) == len(REGISTRY) - 2
    assert all("needs an LLM: give --engine" in sentence for sentence in left_out)
    found, left_out = usable(config, scorers, Capabilities(prompt_logprobs=False))
    assert {sentence.split()[0] for sentence in left_out} == {"simulation", "surprisal", "embedding", "example_embedding"}
    assert any("needs log-probabilities of the prompt" in sentence for sentence in left_out)
    found, left_out = usable(config.model_copy(update={"embedder": "e"}), scorers, Capabilities())
    assert len(found) == len(REGISTRY) and left_out == ()
    with pytest.raises(ConfigError, match="no scorer can be run: detection needs an LLM"):
        usable(config, scorers, None)
    by_rule = ScoreConfig(results="x", scorers=("all",), options={"detection": {"judge": "rule"}})
    found, _ = usable(by_rule, build_scorers(by_rule), None)
    assert [type(scorer) for scorer in found] == [Detection]
    # What is named by itself is never dropped.
    named = ScoreConfig(results="x", scorers=("simulation",))
    assert usable(named, build_scorers(named), None)[1] == ()


def test_what_is_missing_is_named_before_work_starts(results):
    with pytest.raises(ConfigError, match="the scorer 'embedding' needs an embedder: give --embedder"):
        score(results, "embedding")
    judge = FakeEngine(lambda request: "", capabilities=Capabilities(prompt_logprobs=False))
    with pytest.raises(ConfigError, match="'simulation' needs log-probabilities of the prompt, which fake:fake does not give"):
        score(results, "simulation", engine=judge)
    blind = FakeEngine(lambda request: "", capabilities=Capabilities(token_ids=False))
    with pytest.raises(ConfigError, match="'surprisal' needs log-probabilities of the prompt"):
        score(results, "surprisal", engine=blind)
    assert not judge.requests and not blind.requests
    asyncio.run(check_needs("scorer", "x", Detection().needs, judge))


@pytest.mark.parametrize("name", REGISTRY)
def test_the_plan_of_every_scorer_is_what_it_sends(name, results):
    from test_scorers_hostile import bos

    from autointerp.records import Text

    def script(request):
        return bos(request) if isinstance(request.prompt, Text) else "nothing"

    engine, embedder = FakeEngine(script), Lengths()
    config = ScoreConfig(results=results)
    scorer = build_scorer(name, {})
    [estimate] = asyncio.run(estimate_score(config, standins.Source(), [scorer], engine, sample=100))
    assert not engine.requests
    asyncio.run(score_from(config, standins.Source(), [scorer], engine, embedder=embedder, progress=False))
    first = [r for r in engine.requests if not isinstance(r.prompt, Text) and not _is_reminder(scorer, r)]
    assert estimate.requests.value == len(first)
    if scorer.needs.engine and name != "saebench":  # the stand-ins have too few windows for that one
        assert estimate.prompt_tokens.value > 100 and first
    else:
        assert estimate.requests.value == estimate.prompt_tokens.value == 0


def _is_reminder(scorer, request):
    prompt = getattr(scorer, "_prompt", None)
    return hasattr(request.prompt, "messages") and len(request.prompt.messages) > 2 + 2 * len(prompt.file.turns)


class TwoSources(standins.Source):
    """Of latents 5 to 9: 5 and 8 have same-token windows, 6 and 9 have none; 7 has too few examples, as ever."""

    def __init__(self):
        super().__init__(selection=SelectionConfig(negatives=("random", "same_token")))

    def select(self, coder, latent):
        found = super().select(coder, latent)
        more = dataclasses.replace(found.negatives, sources=("same_token",) * len(found.negatives))
        negatives = found.negatives.joined(more) if latent in (5, 8) else found.negatives
        return dataclasses.replace(found, negatives=negatives, negative_sources=self.selection.negative_sources)


class Hushed(standins.Explainer):
    """Has nothing to say about latent 9."""

    async def explain(self, latent, resources, /):
        rows = await super().explain(latent, resources)
        return [row.with_(status="unparseable", text=None) if latent.latent == 9 else row for row in rows]


@pytest.mark.parametrize("name", ["detection", "fuzzing", "embedding", "intruder", "simulation_list", "saebench"])
def test_every_latent_has_a_row_for_every_source_of_negatives(tmp_path, name):
    source, path = TwoSources(), tmp_path / "r"
    config = ExplainConfig(store="x", results=path, latents="5-9", coders=("a",))
    asyncio.run(explain_from(config, source, Hushed(), standins.engine(), progress=False))
    scorer = build_scorer(name.removesuffix("_list"), {"mode": "list"} if name.endswith("list") else {})
    judge = FakeEngine(lambda request: "1" if name == "intruder" else "none" if name == "saebench" else _yes(request))
    asyncio.run(score_from(ScoreConfig(results=path), source, [scorer], judge, embedder=Lengths(), progress=False))
    scores = load_scores(path)
    heads = scores[scores.is_headline].set_index(["negatives", "latent"])["status"]
    # Intruder needs no explanation; SAEBench takes 10 windows of the first source, and no latent has so many.
    ninth = "ok" if name == "intruder" else "unparseable"
    random = {5: "ok", 6: "ok", 7: "too_few_examples", 8: "ok", 9: ninth}
    if name == "saebench":
        assert heads["random"].to_dict() == {i: s if s != "ok" else "not_applicable" for i, s in random.items()}
        assert set(scores.negatives) == {"random"}
        return
    assert heads["random"].to_dict() == random
    ninth = "too_few_examples" if name == "intruder" else "unparseable"
    assert heads["same_token"].to_dict() == {**random, 6: "too_few_examples", 9: ninth}
    reason = scores[scores.is_headline & (scores.latent == 6) & (scores.negatives == "same_token")].reason
    assert reason.tolist() == ["same_token negatives: the latent has no such windows"]
    by_source = summary(path).query("is_headline").set_index("negatives")
    assert by_source.num_latents.to_dict() == {"random": 3 + (name == "intruder"), "same_token": 2}
    assert (by_source.num_latents + by_source.num_missing).to_dict() == {"random": 5, "same_token": 5}
    rows = {row["stage"]: row for row in coverage_rows(overview(Reports(path))) if row["stage"].startswith("scored")}
    assert len(rows) == 2 and all("not scored yet" not in dict(row["without"]) for row in rows.values())


def _yes(request):
    schema = json.loads(request.constraint.schema)
    return json.dumps([i % 2 for i in range(schema["minItems"])])


def test_a_scorer_with_negatives_of_its_own_has_rows_of_these_alone(tmp_path):
    source, path = TwoSources(), tmp_path / "r"
    config = ExplainConfig(store="x", results=path, latents="5-9", coders=("a",))
    asyncio.run(explain_from(config, source, Hushed(), standins.engine(), progress=False))
    active = build_scorer("fuzzing", {"variant": "active"})
    asyncio.run(score_from(ScoreConfig(results=path), source, [active], FakeEngine(_yes), progress=False))
    scores = load_scores(path)
    assert set(scores[scores.is_headline].negatives) == {"shuffled_highlight"}
    assert scores[scores.is_headline].latent.tolist() == [5, 6, 7, 8, 9]


def left(results, *scorers, **options):
    config = ScoreConfig(results=results, controls=("shuffled",))
    built = [build_scorer(name, {}) for name in scorers]
    return asyncio.run(estimate_score(config, standins.Source(), built, None, sample=100, **options))


def test_the_plan_knows_finished_scorers_with_an_embedder(results):
    names = ["embedding", "example_embedding"]
    assert [estimate.num_latents for estimate in left(results, *names, embedder=Lengths())] == [5, 5, 5, 5]
    score(results, *names, embedder=Lengths())
    assert [estimate.num_latents for estimate in left(results, *names, embedder=Lengths())] == [0, 0, 0, 0]


class Counted(Lengths):
    def __init__(self):
        super().__init__()
        self.characters = 0

    def embed(self, texts):
        self.characters += sum(map(len, texts))
        return super().embed(texts)


@pytest.mark.parametrize("name", ["embedding", "example_embedding"])
def test_the_plan_counts_the_texts_that_are_embedded(name, results):
    embedder = Counted()
    [plain, control] = left(results, name, embedder=embedder)
    assert embedder.num == 0
    score(results, name, embedder=embedder)
    planned = [estimate.embedded_texts.value for estimate in (plain, control)]
    assert sum(planned) == embedder.num > 0 and planned[0] > 4 * 8
    tokens = sum(estimate.embedded_tokens.value for estimate in (plain, control))
    assert tokens == pytest.approx(embedder.characters / 4)
    assert f"texts to embed {planned[0]:,.0f}" in plain.text() and "4 characters a token" in plain.text()


def test_the_plan_leaves_no_vectors_behind(results):
    """A scorer remembers vectors by the embedder's name."""
    [one, two] = [build_scorer("embedding", {}) for _ in range(2)]
    config = ScoreConfig(results=results)
    asyncio.run(estimate_score(config, standins.Source(), [one], None, embedder=Lengths()))
    embedders = [Lengths(), Lengths()]
    for scorer, embedder in zip((one, two), embedders, strict=True):
        latent = standins.Source().select("a", 5)
        resources = Resources(vocabulary=standins.Vocabulary(), seed=0, embedder=embedder)
        asyncio.run(scorer.score(latent, latent_explanation(latent), resources))
    assert embedders[0].num == embedders[1].num > 0


def latent_explanation(latent):
    [row] = asyncio.run(standins.Rules().explain(latent, None))
    return row
