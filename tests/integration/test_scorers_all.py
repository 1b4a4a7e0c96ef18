"""All scorers at once over the bundled model, from the command line to the report."""

import numpy as np
import pytest

from autointerp.cli.main import main
from autointerp.demo import bundled
from autointerp.demo.run import cache_settings
from autointerp.jobs.cache import CacheConfig, cache
from autointerp.jobs.verify import verify
from autointerp.records import UNSCORED
from autointerp.results.load import load_scores, load_verdicts, summary
from autointerp.scorers import REGISTRY

NUM = 20
FEW = ("--set", f"selection.num_positives={NUM}", "--set", f"selection.num_negatives={NUM}")
EMBEDDER = "tests.integration.test_scorers_all:Letters"


class Letters:
    """Embeds a text by how often it has each letter."""

    id = "letters"

    def embed(self, texts):
        counts = np.array([[1e-3, *(text.lower().count(chr(97 + i)) for i in range(26))] for text in texts], np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    store = tmp_path_factory.mktemp("all") / "store"
    cache(CacheConfig.parse(cache_settings(store, 65_536, coders=("sae",))))
    path = store.with_name("results")
    with pytest.raises(SystemExit):
        arguments = ("explain", store, "--out", path, "--explainer", "lexical", "--latents", "random:1", "--no-control")
        main([str(a) for a in arguments])
    return path


def call(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code, *capsys.readouterr()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_scorer_runs_and_every_row_says_what_it_stands_on(results, capsys):
    engine = f"hf:{bundled('model')}"
    code, out, err = call(
        capsys, "score", results, "--scorer", "all", "--engine", engine, "--embedder", EMBEDDER, "--no-control", *FEW
    )
    assert code in (0, 3), err
    assert "left out" not in out + err
    assert verify(results) == []
    scores, verdicts = load_scores(results), load_verdicts(results)
    assert set(scores.scorer) == set(REGISTRY)
    ok = scores[scores.status == "ok"]
    assert ok.value.notna().all()
    assert (ok[ok.is_headline].ci_method != "none").all() and ok[ok.is_headline].chance.notna().all()
    assert (ok.ci_low.isna() | (ok.ci_low <= ok.value)).all() and (ok.ci_high.isna() | (ok.value <= ok.ci_high)).all()
    chance = scores[scores.is_headline].groupby("scorer").chance.first().to_dict()
    assert chance["simulation"] == 0 and chance["intruder"] == 0.2 and chance["saebench"] == pytest.approx(10 / 14)
    assert set(scores.loc[scores.scorer.isin(["intruder", "example_embedding"]), "explainer"]) == {"latent"}
    assert set(scores.loc[scores.scorer.str.startswith("delphi"), "disjoint"]) == {"none"}
    assert set(scores.loc[~scores.scorer.str.startswith("delphi"), "disjoint"]) <= {"document", "context"}
    said = verdicts[["answer", "probability", "value"]].notna().any(axis=1) | verdicts["answers"].notna()
    assert said.eq(verdicts.status == "ok").all()
    asked = scores[scores.is_headline & (scores.scorer == "simulation")]
    assert (asked.num_scored + asked[[f"num_{reason}" for reason in UNSCORED]].sum(axis=1) == 2 * NUM).all()
    assert set(summary(results).scorer) == set(REGISTRY)
    # Run again: nothing is left to do.
    before = load_scores(results)
    code, out, _ = call(
        capsys, "score", results, "--scorer", "all", "--engine", engine, "--embedder", EMBEDDER, "--no-control", *FEW
    )
    assert code == 0 and "0 latents" in out
    assert load_scores(results).equals(before)
    code, out, err = call(capsys, "report", results)
    assert code == 0, err
    latent = int(scores.latent.iloc[0])
    code, out, err = call(capsys, "show", results, f"sae/{latent}")
    assert code == 0 and "simulation" in out and "pools overlap" in out and "intruder" in out, err


@pytest.mark.slow
def test_without_an_engine_the_rest_is_listed(results, capsys):
    code, out, _ = call(
        capsys, "score", results, "--scorer", "all", "--judge", "rule", "--embedder", EMBEDDER, *FEW, "--no-control"
    )
    assert code == 0
    assert "left out: surprisal needs an LLM: give --engine" in out and "intruder needs an LLM" in out
    code, out, err = call(capsys, "score", results, "--scorer", "embedding")
    assert code == 2 and "needs an embedder: give --embedder" in err
    code, _, err = call(capsys, "score", results, "--scorer", "embedding", "--embedder", "no.such.module:Class")
    assert code == 2 and "no.such.module" in err and "Traceback" not in err
