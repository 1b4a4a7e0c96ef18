"""Explain and score 200 latents with a real vLLM, over HTTP and in process. Run by ``make test-vllm``.

The bundled model serves as the LLM: it answers at random, and in form only where it is held to one.
"""

import json

import pytest

from autointerp.demo import bundled
from autointerp.demo.run import cache_settings
from autointerp.jobs.cache import CacheConfig, cache
from autointerp.jobs.explain import ExplainConfig, explain
from autointerp.jobs.score import ScoreConfig, score
from autointerp.records import UNSCORED
from autointerp.results.load import load_explanations, load_scores, load_verdicts
from autointerp.stats import mean_t
from tests.integration.vllm_server import SETTINGS, serving, successes

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500), pytest.mark.filterwarnings("ignore")]

NUM_LATENTS = 200
FEW = {"num_explain": 6, "num_positives": 10, "num_negatives": 10}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline") / "store"
    return cache(CacheConfig.parse(cache_settings(path, 131_072, coders=("sae",))))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("pipeline-server") / "log"
    with serving(bundled("model"), log, name="bundled", context=8192) as url:
        yield url


def check(results, report, *, num_asked):
    """Every example is judged or has a reason, and headline scores say so."""
    verdicts, scores = load_verdicts(results), load_scores(results)
    assert len(verdicts) == num_asked
    assert verdicts.answer.notna().eq(verdicts.status == "ok").all()
    counts = verdicts.status.value_counts().to_dict()
    assert {name: number for name, number in report.unscored.items() if number} == {
        k: v for k, v in counts.items() if k != "ok"
    }
    headline = scores[scores.is_headline & (scores.status == "ok")]
    asked = headline.num_scored + headline[[f"num_{reason}" for reason in UNSCORED]].sum(axis=1)
    assert (asked == 20).all()
    return verdicts, headline


def score_with(engine, results, mode, options):
    # A model of code hardly thinks of answering: which label it likes better is read all the same.
    detection = {"mode": mode, "min_label_mass": 0}
    config = {
        "results": str(results),
        "explainer": "lexical",
        "engine": engine,
        "scorers": ["detection"],
        "engine_options": options,
    }
    return score(ScoreConfig.parse({**config, "options": {"detection": detection}}))


@pytest.mark.parametrize("way", ["http", "process"])
def test_200_latents(way, request, store, tmp_path, monkeypatch):
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    url = request.getfixturevalue("server") if way == "http" else None
    engine = f"openai:bundled@{url}/v1" if url else f"vllm:{bundled('model')}"
    options = {} if url else {"engine_args": {"enforce_eager": True, "max_model_len": 8192}}
    latents = f"random:{NUM_LATENTS}"
    shared = {"store": str(store), "latents": latents, "selection": FEW}
    written = tmp_path / "lexical"
    assert explain(ExplainConfig.parse({**shared, "results": str(written), "explainer": "lexical"})).exit_code == 0
    num_ok = int((load_explanations(written).status == "ok").sum())
    assert num_ok > 0.9 * NUM_LATENTS

    before = successes(url) if url else 0
    labels = score_with(engine, written, "labels", options)
    if url:
        assert successes(url) - before == labels.num_sent - labels.num_failed
        before = successes(url)
    assert labels.num_sent == 20 * num_ok and labels.num_failed == 0
    _, headline = check(written, labels, num_asked=20 * num_ok)
    aurocs = headline[headline.metric == "auroc"].value.dropna().to_numpy(float)
    interval = mean_t(aurocs)
    figures = {"way": way, "latents": len(aurocs), "mean_auroc": interval.value, "low": interval.low, "high": interval.high}
    figures["requests"] = labels.num_sent
    assert interval.low <= 0.5 <= interval.high, figures

    if url:
        listed = tmp_path / "listed"
        assert explain(ExplainConfig.parse({**shared, "results": str(listed), "explainer": "lexical"})).exit_code == 0
        before = successes(url)
        lists = score_with(engine, listed, "list", options)
        assert successes(url) - before == lists.num_sent - lists.num_failed
        verdicts, _ = check(listed, lists, num_asked=20 * num_ok)
        figures["list_unparseable"] = int((verdicts.status == "unparseable").sum())
        assert figures["list_unparseable"] == 0  # held to the form, even a model that answers at random keeps to it

        before = successes(url)
        wild = explain(ExplainConfig.parse({**shared, "results": str(tmp_path / "wild"), "engine": engine}))
        rows = load_explanations(tmp_path / "wild")
        assert successes(url) - before == wild.num_sent - wild.num_failed == rows.num_attempts.sum()
        assert rows.text.notna().eq(rows.status == "ok").all()
        figures["explanations"] = rows.status.value_counts().to_dict()
    print(json.dumps(figures))
