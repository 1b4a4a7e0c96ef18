"""The two stages over a real store, through the public functions, as a script or a notebook calls them."""

import asyncio
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from autointerp import explain, load_explanations, load_scores, load_verdicts, score
from autointerp.errors import ConfigError, IdentityError
from autointerp.examples.selection import SelectionConfig
from autointerp.jobs.cost import plan_explain, plan_pipeline, plan_score
from autointerp.jobs.explain import ExplainConfig
from autointerp.jobs.score import ScoreConfig
from autointerp.jobs.status import status
from autointerp.jobs.verify import verify
from autointerp.results.load import coverage, summary
from autointerp.store import CoderRecord, Document, Identity, StoreWriter, write_vocabulary

CTX_LEN, CONTEXTS, WORDS, WIDTH = 64, 300, 40, 24
SELECTION = SelectionConfig(window=16, num_positives=20, num_negatives=20)
RULE = {"detection": {"judge": "rule"}, "fuzzing": {"judge": "rule"}}


def build_store(path, *, seed=0, power=1):
    """Latent i fires on the i-th word, at strengths from 1 to 2^power; the last four never do."""
    random = np.random.default_rng(seed)
    identity = Identity(ctx_len=CTX_LEN, subject_digest="sha256:none", packing="documents")
    record = CoderRecord(digest=f"sha256:{seed}", width=WIDTH, hookpoints=("layers.0@out",), activation="topk", k=1)
    contexts = [random.integers(0, WORDS, CTX_LEN).astype(np.uint32) for _ in range(CONTEXTS)]
    with StoreWriter.create_or_resume(path, identity=identity, coders={"sae": record}, contexts_per_run=100) as writer:
        write_vocabulary(path / "tokenizer", [f" word{i}".encode() for i in range(WORDS)], [False] * WORDS)
        for start in range(0, CONTEXTS, 100):
            batch = contexts[start : start + 100]
            documents = [Document(document=i, source_row=i) for i in range(start, start + 100)]
            writer.add_contexts(batch, [[(d.document, 0)] for d in documents], documents=documents)
            tokens = np.concatenate(batch)
            fires = np.flatnonzero(tokens < WIDTH - 4)
            values = (1 + random.random(len(fires))).astype(np.float32) ** power
            writer.add_activations("sae", tokens[fires], start * CTX_LEN + fires, values)
            writer.close_run()
        writer.finish()
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("store") / "s")


@pytest.fixture(scope="module")
def results(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "r"
    config = ExplainConfig(
        store=store,
        results=path,
        latents="0-22",
        explainer="lexical",
        selection=SELECTION,
        controls=("shuffled",),
        shard_latents=8,
    )
    report = explain(config, progress=False)
    assert report.exit_code == 0, report.sentence()
    report = score(ScoreConfig(results=path, options=RULE, controls=("shuffled",)), progress=False)
    assert report.exit_code == 0, report.sentence()
    return path


def test_meaning(results):
    """A latent that is one word is found by its rule, and by no other latent's."""
    explanations = load_explanations(results).set_index("latent")
    assert explanations["status"].value_counts().to_dict() == {"ok": 20, "too_few_examples": 3}
    assert "word5" in explanations["text"][5]
    table = summary(results)
    headline = table[table["is_headline"]].set_index(["scorer", "control"])["median"]
    assert headline["detection", "none"] > 0.95 and headline["fuzzing", "none"] > 0.95
    assert abs(headline["detection", "shuffled"] - 0.5) < 0.1
    scores = load_scores(results)
    assert set(scores["selection_id"]) == set(explanations["selection_id"].unique()) or SELECTION.num_positives != 50
    assert load_verdicts(results)["answer"].notna().any()
    assert verify(results) == [] and status(results).is_complete


@pytest.mark.parametrize("explainer", ["single_token", "lookup"])
def test_explainers_of_the_token_alone(store, tmp_path, explainer):
    """Latents that are one word: the explainer names it, and its rule is judged as the lexical one is."""
    path = tmp_path / "r"
    config = ExplainConfig(store=store, results=path, latents="0-5,21", explainer=explainer, selection=SELECTION)
    assert explain(config, progress=False).exit_code == 0
    explanations = load_explanations(path).set_index("latent")
    assert explanations["status"].to_dict() == dict.fromkeys(range(6), "ok") | {21: "too_few_examples"}
    assert explanations["text"][5].startswith("the token `") and "word5`" in explanations["text"][5]
    assert score(ScoreConfig(results=path, options=RULE), progress=False).exit_code == 0
    headline = summary(path).query("is_headline").set_index("scorer")["median"]
    assert headline["detection"] > 0.95 and headline["fuzzing"] > 0.95
    assert verify(path) == []


def test_coverage(results):
    table = coverage(results)
    explained = table[table["method"].str.startswith("lexical")]
    assert explained["num_rows"].sum() == 23
    assert explained.set_index("decile")["too_few_examples"][-1] == 3


def test_coverage_is_by_source_of_negatives(store, tmp_path):
    """A latent that is one word has no silent window with that word: a score against random ones does not hide it."""
    path, selection = tmp_path / "r", SELECTION.model_copy(update={"negatives": ("random", "same_token")})
    config = ExplainConfig(store=store, results=path, latents="0-5,21", explainer="lexical", selection=selection)
    assert explain(config, progress=False).exit_code == 0
    rules = {**RULE, "simulation": {"judge": "rule"}, "saebench": {"judge": "rule"}}
    assert score(ScoreConfig(results=path, scorers=tuple(rules), options=rules), progress=False).exit_code == 0
    table = coverage(path).groupby(["method", "negatives"])[["num_rows", "ok", "too_few_examples"]].sum()
    assert table.index.get_level_values("negatives").value_counts().to_dict() == {"random": 4, "same_token": 3, "none": 1}
    for (method, source), row in table.iterrows():
        lost = 7 if source == "same_token" else 1
        assert row.to_dict() == {"num_rows": 7, "ok": 7 - lost, "too_few_examples": lost}, (method, source)
    scores = load_scores(path)
    reasons = scores[scores["is_headline"] & (scores["negatives"] == "same_token") & (scores["latent"] == 3)]["reason"]
    assert reasons.tolist() == ["same_token negatives: the latent has no such windows"] * 3
    assert summary(path).query("negatives == 'same_token'")["num_missing"].tolist() == [7, 7, 7]
    assert verify(path) == []


def test_plain_pandas(results):
    frame = pd.read_parquet(results / "scores")
    assert frame.groupby(["scorer", "metric"])["value"].median().notna().any()


def test_works_inside_a_running_loop(store, tmp_path):
    async def notebook():
        config = ExplainConfig(store=store, results=tmp_path / "r", latents="3", explainer="lexical", selection=SELECTION)
        return explain(config, progress=False)

    assert asyncio.run(notebook()).num_latents == 1


def test_more_examples_later(results):
    """Counts of scored examples may change afterwards; what was explained may not."""
    more = SELECTION.model_copy(update={"num_positives": 30})
    config = ScoreConfig(
        results=results, scorers=("detection",), options={"detection": {"judge": "rule"}}, latents="0", selection=more
    )
    assert score(config, progress=False).num_latents == 1
    other = SELECTION.model_copy(update={"seed": 5})
    with pytest.raises(IdentityError, match=r"made with selection\.seed = 0 and are to be scored with 5"):
        score(config.model_copy(update={"selection": other}), progress=False)


def test_another_store(results, tmp_path):
    other = build_store(tmp_path / "other", seed=1)
    with pytest.raises(IdentityError, match="belongs to another store: store_id is sha256:"):
        score(ScoreConfig(results=results, store=other, options=RULE), progress=False)


def test_sentences(store, results, tmp_path):
    config = ExplainConfig(store=store, results=tmp_path / "r", latents="0", selection=SELECTION)
    with pytest.raises(ConfigError, match=r"the explainer 'default' needs an LLM: give --engine"):
        explain(config, progress=False)
    assert not (tmp_path / "r").exists()
    with pytest.raises(ConfigError, match="there is no explainer 'lexicel'; did you mean 'lexical'"):
        explain(config.model_copy(update={"explainer": "lexicel"}), progress=False)
    with pytest.raises(ConfigError, match="has an unknown key 'max_clause'; did you mean 'max_clauses'"):
        explain(config.model_copy(update={"explainer": "lexical", "options": {"max_clause": 3}}), progress=False)
    with pytest.raises(ConfigError, match="options are given for 'detektion'"):
        score(ScoreConfig(results=results, options={"detektion": {}}), progress=False)


ENGINE = """
from autointerp.llm.fake import FakeEngine

class Engine(FakeEngine):
    def __init__(self, config):
        super().__init__(lambda request: "EXPLANATION: a word" if not request.labels else request.labels[0])
"""


def test_with_an_engine_of_ones_own(store, tmp_path):
    """In a process of its own, so that the module is found as users' modules are; a judge that always says the same."""
    (tmp_path / "mine.py").write_text(ENGINE)
    code = (
        "from autointerp.jobs.explain import *; from autointerp.jobs.score import *; from autointerp.results.load import *\n"
        f"s = SelectionConfig.parse({SELECTION.identity()!r})\n"
        f"c = ExplainConfig(store={str(store)!r}, results='r', latents='0-4', engine='mine:Engine', selection=s)\n"
        "print(explain(c, progress=False).sentence())\n"
        "print(load_explanations('r')['text'].tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "5 requests sent" in done.stdout and "a word" in done.stdout


def test_plans(store, results, tmp_path):
    config = ExplainConfig(store=store, results=tmp_path / "r", latents="all", explainer="lexical", selection=SELECTION)
    [estimate] = plan_explain(config, sample=5)
    assert (estimate.num_latents, estimate.requests.value) == (20, 0) and estimate.disk_bytes > 0
    estimates = plan_score(ScoreConfig(results=results, options=RULE))
    assert [estimate.num_latents for estimate in estimates] == [0, 0]


class Letters:
    """An embedder of one's own."""

    id = "letters"

    def embed(self, texts):
        counts = np.array([[1 + text.count(letter) for letter in "0123456789"] for text in texts], np.float32).reshape(-1, 10)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def test_a_plan_of_both_stages_leaves_out_what_is_done(store, tmp_path):
    config = ExplainConfig(store=store, results=tmp_path / "r", latents="0-5", explainer="lexical", selection=SELECTION)
    scoring = {"scorers": ("detection", "embedding"), "options": {"detection": {"judge": "rule"}}}
    scoring |= {"embedder": f"{__name__}:Letters", "controls": ("shuffled", "generic")}
    before = plan_pipeline(config, scoring)
    assert [estimate.num_latents for estimate in before] == [6] * 7
    assert [estimate.embedded_texts is not None for estimate in before] == [False] * 4 + [True] * 3
    explain(config.model_copy(update={"controls": ("shuffled",)}), progress=False)
    score(ScoreConfig.parse({**scoring, "results": tmp_path / "r"}), progress=False)
    assert [estimate.num_latents for estimate in plan_pipeline(config, scoring)] == [0] * 7
    more = plan_pipeline(config.model_copy(update={"latents": "0-7"}), scoring)
    assert [estimate.num_latents for estimate in more] == [2] * 7
