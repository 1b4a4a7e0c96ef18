"""Explainers that choose, refine and show logits, over a real store and a server on HTTP, through the public functions."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from autointerp import explain, load_explanations, load_scores, score
from autointerp.cli.explain import command as explain_command
from autointerp.cli.plan import command as plan_command
from autointerp.errors import StoreError
from autointerp.examples.selection import SelectionConfig, Selector
from autointerp.jobs.cost import plan_explain
from autointerp.jobs.explain import ExplainConfig
from autointerp.jobs.score import ScoreConfig
from autointerp.jobs.status import status
from autointerp.jobs.verify import verify
from autointerp.llm.settings import EngineConfig
from autointerp.reports import report
from autointerp.results.load import coverage, summary
from autointerp.store import open_store
from autointerp.store.logits import TokenLogits, write_logits
from tests.integration.test_jobs_store import WIDTH, build_store
from tests.killing import scripted_server

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

SELECTION = SelectionConfig(window=16, num_positives=20, num_negatives=20)
LATENTS = "2-6,21"  # 21 never fires


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("store") / "s")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with scripted_server(tmp_path_factory.mktemp("server"), answer="tests.answers:reader", context_tokens=32_000) as found:
        yield found


def config(store, path, url, explainer, **settings):
    values = {"store": store, "results": path, "latents": LATENTS, "selection": SELECTION, "shard_latents": 3}
    return ExplainConfig(**values, explainer=explainer, engine=f"openai:scripted@{url}", **settings)


def is_judging(body):
    return body["messages"][-1]["content"].startswith("Description: ")


def windows(bodies):
    """The texts that a judge was asked about."""
    lines = [line for body in bodies for line in body["messages"][-1]["content"].splitlines()]
    return {line.partition(": ")[2] for line in lines if line.startswith("Text ")}


@pytest.mark.parametrize(("explainer", "samples"), [("best_of:3", [0, 1, 2]), ("refine:2", [0, 1])])
def test_the_right_word_is_chosen_on_windows_that_are_never_scored(store, server, tmp_path, explainer, samples):
    url, requests = server
    path, before = tmp_path / "r", requests.count()
    [planned] = plan_explain(config(store, path, url, explainer), sample=50)
    assert requests.count() == before
    done = explain(config(store, path, url, explainer), progress=False)
    assert done.exit_code == 0, done.sentence()
    sent = requests()[before:]
    assert len(sent) == done.num_sent <= planned.requests.value
    assert explainer.startswith("refine") or len(sent) == planned.requests.value
    table = load_explanations(path)
    for latent in range(2, 7):
        rows = table[table["latent"] == latent].set_index("sample")
        assert rows.index.tolist() == samples
        [winner] = rows[rows["status"] == "ok"].itertuples()
        assert winner.text == f"The word word{latent}." and winner.validate_score == 1.0
        if explainer.startswith("refine"):
            assert winner.Index == 1 and winner.parent_ids.tolist() == [rows["explanation_id"][0]]
        others = rows[rows["status"] != "ok"]
        assert "Everything." in others["candidate"].tolist() and (others["validate_score"] == 0.5).all()
    assert table[table["latent"] == 21]["status"].tolist() == ["too_few_examples"]

    judged = windows(body for body in sent if is_judging(body))
    again = requests.count()
    assert explain(config(store, path, url, explainer), progress=False).num_sent == 0 and requests.count() == again
    scored = score(ScoreConfig(results=path, scorers=("detection",), engine=f"openai:scripted@{url}"), progress=False)
    assert scored.exit_code == 0
    # Texts of the judge's windows of one latent may be another's: of one latent they never are.
    for latent in range(2, 7):
        chosen = Selector(open_store(store), SELECTION).select("sae", latent, num_validate=20)
        mine = {int(d) for block in (chosen.validate_positives, chosen.validate_negatives) for d in block.documents}
        assert not mine & {int(d) for block in (chosen.positives, chosen.negatives) for d in block.documents}
    assert len(judged) > 100
    headline = summary(path).query("is_headline")
    assert headline["median"].tolist() == [1.0] and headline["num_latents"].tolist() == [5]
    assert len(load_scores(path).query("is_headline")) == 6
    assert verify(path) == [] and status(path).is_complete
    found = coverage(path)
    assert found[found["decile"] >= 0].groupby("method")["ok"].sum().tolist() == [5, 5]
    page = report(path)
    assert page.exists()


def test_another_judge_and_a_budget_over_both(store, server, tmp_path):
    url, requests = server
    path, before = tmp_path / "r", requests.count()
    two = {"judge": f"openai:scripted@{url}", "engine_options": EngineConfig(max_requests=25)}
    assert explain(config(store, path, url, "best_of:3", **two), progress=False).stop.kind == "budget"
    assert requests.count() - before == 25
    two.pop("engine_options")
    assert explain(config(store, path, url, "best_of:3", **two), progress=False).exit_code == 0
    assert set(load_explanations(path)["judge"].dropna()) == {"scripted"}
    methods = [json.loads(file.read_text()) for file in path.glob("runs/*.json")]
    assert all(run["config"]["judge"].startswith("openai:scripted@") for run in methods)


def test_promoted_tokens_come_from_the_stores_table(server, tmp_path):
    url, requests = server
    store = build_store(tmp_path / "s")
    before = requests.count()
    with pytest.raises(StoreError, match=r"make it with `autointerp tables .* --coder sae --subject MODEL`"):
        explain(config(store, tmp_path / "r", url, "activations_logits"), progress=False)
    with pytest.raises(StoreError, match=r"--subject MODEL"):
        plan_explain(config(store, tmp_path / "r", url, "activations_logits"))
    assert requests.count() == before and not (tmp_path / "r").exists()
    tokens = (np.arange(WIDTH)[:, None] + np.arange(1, 12)[None, :]).astype(np.uint32) % 40
    logits = np.ones(tokens.shape, np.float32)
    block = TokenLogits(promoted=tokens, promoted_logits=logits, suppressed=tokens, suppressed_logits=-logits)
    write_logits(open_store(store), "sae", [block])
    assert explain(config(store, tmp_path / "r", url, "activations_logits"), progress=False).exit_code == 0
    table = load_explanations(tmp_path / "r").set_index("latent")
    assert table["text"].dropna().to_dict() == {i: f"say word{i + 1}" for i in range(2, 7)}
    last = requests()[-1]["messages"][-1]["content"]
    assert last.count("Excerpt ") == 10 and last.splitlines()[2].count('" word') == 10


def test_the_command_line(store, server, tmp_path):
    url, _ = server
    arguments = [str(store), "--out", str(tmp_path / "r"), "--latents", "3", "--explainer", "best_of:2", "--no-control"]
    arguments += ["--engine", f"openai:scripted@{url}"]
    planned = CliRunner().invoke(plan_command, arguments, catch_exceptions=False).output
    assert "explain best_of-" in planned
    done = CliRunner().invoke(explain_command, [*arguments, "--set", "options.num_validate=10"])
    assert done.exit_code == 0 and "1 latents" in done.output and "1 ok" in done.output
    refused = CliRunner().invoke(explain_command, [*arguments, "--set", "options.num_samples=3"])
    assert refused.exit_code != 0 and "contradict each other" in str(refused.exception)


def test_a_hostile_server_never_makes_a_choice(store, tmp_path):
    trouble = {"ok": 40, "500": 4, "drop": 2, "prose": 8, "short_list": 4, "html": 1, "endless_thinking": 2}
    quick = EngineConfig(backoff_s=0.01, backoff_cap_s=0.05, max_attempts=3)
    path = tmp_path / "r"
    with scripted_server(tmp_path, behaviours=trouble, answer="tests.answers:reader") as (url, requests):
        done = explain(config(store, path, url, "best_of:3", engine_options=quick), progress=False)
        assert requests.count() > done.num_sent  # some were tried again
        table = load_explanations(path)
        assert table["text"].notna().eq(table["status"] == "ok").all()
        assert set(table["latent"]) == {2, 3, 4, 5, 6, 21} and table["sample"].max() <= 2
        assert table[table["status"] == "ok"]["latent"].is_unique
        assert verify(path) == []
    said = {"Everything.", "Nothing.", *(f"The word word{i}." for i in range(2, 7))}
    assert set(table["text"].dropna()) | set(table["candidate"].dropna()) <= said
    with scripted_server(tmp_path, answer="tests.answers:reader") as (url, _):
        explain(config(store, path, url, "best_of:3", engine_options=quick), progress=False)
    assert "no_reply" not in set(load_explanations(path)["status"])
