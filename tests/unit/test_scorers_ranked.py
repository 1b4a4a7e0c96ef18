"""Scorers that rank windows by a number: embedding, example embedding, surprisal."""

import math
from dataclasses import replace

import numpy as np
import pytest
from planted import ID, VOCABULARY, WORDS, explained, headline, joined, planted, resources, run, windows

from autointerp import stats
from autointerp.digest import generator
from autointerp.errors import ReplyError
from autointerp.llm.fake import FakeEngine
from autointerp.records import Reply, Text, TokenLogprob
from autointerp.scorers.embedding import Embedding, EmbeddingConfig
from autointerp.scorers.example_embedding import ExampleEmbedding
from autointerp.scorers.highlights import dealt_anew, own_masks, shown_masks
from autointerp.scorers.metrics import ranked_scores
from autointerp.scorers.surprisal import Surprisal, SurprisalConfig
from autointerp.scorers.vectors import Vectors


class Bags:
    """Embeds a text as the square roots of its counts of some words: unit vectors, and texts of equal words are near."""

    id = "bags"

    def __init__(self, words=("os.path", "os.<<path", "cat", "(", "raise")):
        self.words, self.texts = words, []

    def embed(self, texts):
        self.texts.append(list(texts))
        counts = np.array([[1e-3, *(text.count(word) for word in self.words)] for text in texts], np.float32)
        return (np.sqrt(counts) / np.sqrt(counts.sum(axis=1, keepdims=True))).astype(np.float32)


def scored(scorer, embedder, *, latent=None, text="os.path", **options):
    given = replace(resources(), embedder=embedder)
    return run(scorer.score(latent or planted(), explained(text), given, **options))


# Embedding --------------------------------------------------------------------------------------------------------


def test_embedding_ranks_windows_by_their_cosine_with_the_explanation():
    latent, embedder = planted(num=20), Bags()
    result = scored(Embedding(), embedder, latent=latent)
    query, *rest = Bags().embed(["os.path", *(VOCABULARY.text(t) for t in joined(latent.positives, latent.negatives).tokens)])
    expected = [float(np.dot(query, vector)) for vector in rest]
    assert [v.value for v in result.verdicts] == pytest.approx(expected, abs=1e-6)
    slow = np.mean([(p > n) + (p == n) / 2 for p in expected[:20] for n in expected[20:]])
    score = headline(result)
    assert (score.metric, score.judge, score.chance, score.negatives) == ("auroc", "bags", 0.5, "random")
    assert score.value == pytest.approx(slow)
    assert score.value > 0.95
    assert {(v.answer, v.probability, v.status) for v in result.verdicts} == {(None, None, "ok")}
    assert len(embedder.texts) == 1


def test_another_explanation_ranks_otherwise_and_the_instruction_is_part_of_the_query():
    assert headline(scored(Embedding(), Bags(), text="a cat")).value < 0.6
    embedder = Bags()
    scorer = Embedding(EmbeddingConfig(instruction="Find: "))
    scored(scorer, embedder)
    assert embedder.texts[0][0] == "Find: os.path"
    assert scorer.identity() != Embedding().identity()


@pytest.mark.parametrize(
    ("vectors", "sentence"),
    [
        (np.ones((1, 3)), "shape"),
        (np.full((2, 3), np.nan), "lengths nan"),
        (np.ones((2, 3)), "expected 1"),
        (np.ones(2), "shape"),
    ],
)
def test_what_is_no_unit_vector_is_refused(vectors, sentence):
    class Broken:
        id = "broken"

        def embed(self, texts):
            return vectors

    with pytest.raises(ReplyError, match=sentence):
        run(Vectors().of(Broken(), ["a", "b"]))


def test_equal_and_recent_texts_are_embedded_once(monkeypatch):
    embedder, memory = Bags(), Vectors()
    vectors = run(memory.of(embedder, ["cat", "(", "cat"]))
    assert embedder.texts == [["cat", "("]] and (vectors[0] == vectors[2]).all()
    again = run(memory.of(embedder, ["(", "raise"]))
    assert embedder.texts == [["cat", "("], ["raise"]] and (again[0] == vectors[1]).all()
    monkeypatch.setattr("autointerp.scorers.vectors._MAX_KNOWN", 1)
    run(memory.of(embedder, ["raise"]))
    run(memory.of(embedder, ["cat"]))
    assert embedder.texts[2:] == [["cat"]]  # the oldest was forgotten


def test_the_control_embeds_only_what_is_new():
    embedder, latent = Bags(), planted(num=20)
    scorer = Embedding()
    scored(scorer, embedder, latent=latent)
    scored(scorer, embedder, latent=latent, text="a cat", control="shuffled")
    assert embedder.texts[1] == ["a cat"]


def test_windows_of_one_document_widen_the_interval():
    result = scored(Embedding(), Bags(), latent=planted(num=40), text="( raise os.path")
    one = [replace(v, document=v.document // 10, value=v.value + v.document // 10) for v in result.verdicts]
    scores = [ranked_scores(rows, latent=planted(num=1), explanation=explained(), judge="x") for rows in (result.verdicts, one)]
    alone, shared = (next(s for s in rows if s.is_headline) for rows in scores)
    assert (alone.ci_method, shared.ci_method) == ("newcombe_auroc", "newcombe_auroc_clustered")
    assert shared.ci_high - shared.ci_low > alone.ci_high - alone.ci_low


def test_auroc_by_quantile_is_against_all_negatives_of_a_source():
    rows = [(0.9, 0), (0.2, 1), (0.5, None), (0.1, None)]
    base = scored(Embedding(), Bags(), latent=planted(num=2)).verdicts
    verdicts = [
        replace(v, value=value, quantile=-1 if q is None else q, truth=q is not None)
        for v, (value, q) in zip(base, rows, strict=True)
    ]
    scores = ranked_scores(verdicts, latent=planted(num=2), explanation=explained(), judge="x")
    aurocs = [s for s in scores if s.metric == "auroc"]
    assert {(s.quantile, s.value) for s in aurocs} == {(None, 0.75), (0, 1.0), (1, 0.5)}
    assert [s.is_headline for s in aurocs] == [True, False, False]
    assert aurocs[0].ci_low == pytest.approx(stats.auroc_newcombe(0.75, 2, 2).low)
    # Ranked + - + -: (1 + 2/3) / 2; by chance 2 of 4.
    [precision] = [s for s in scores if s.metric == "average_precision"]
    assert (precision.value, precision.chance) == (pytest.approx((1 + 2 / 3) / 2), 0.5)
    assert (precision.is_headline, precision.negatives, precision.ci_method) == (False, "random", "wilson_average_precision")


# Example embedding ------------------------------------------------------------------------------------------------


def test_example_embedding_compares_with_explained_windows_of_the_same_quantile():
    latent = planted(num=20)
    assert not ExampleEmbedding.needs.explanation
    result = scored(ExampleEmbedding(), Bags(), latent=latent)
    assert headline(result).value > 0.95
    # By hand, for one query: highlighted text, exemplars of its quantile out of the explain pool.
    embedder = Bags()
    scored(ExampleEmbedding(), embedder, latent=latent)
    [texts] = embedder.texts
    assert sum("<<path>>" in text for text in texts) >= 20
    delta = {v.example_idx: v.value for v in result.verdicts}
    statistics = latent.explain_statistics
    active = statistics.take(np.flatnonzero(statistics.quantiles == 0))
    assert len(active) == 10  # as many as are drawn, so the draw is all of them
    query = _marked(latent.positives, 0)
    [q, *near] = Bags().embed([query, *(_marked(active, i) for i in range(10))])
    silent = [text for text in texts if "os.path" not in text and "os.<<path" not in text]
    [q, *far] = Bags().embed([query, *silent])
    lowest, highest = (f(float(np.dot(v, q)) for v in far) for f in (min, max))
    mean = np.mean([float(np.dot(v, q)) for v in near])
    assert mean - highest <= delta[0] + 1e-6 and delta[0] - 1e-6 <= mean - lowest


def _marked(block, row):
    from autointerp.examples.render import highlight

    return highlight(VOCABULARY, block.tokens[row], own_masks(block, 0.3)[row])


def test_example_embedding_is_at_chance_under_its_control_and_not_applicable_without_exemplars():
    values = [
        headline(scored(ExampleEmbedding(), Bags(), latent=planted(latent=i), control="shuffled")).value for i in range(6)
    ]
    assert abs(np.mean(values) - 0.5) < 0.1
    bare = planted(num=20)
    bare = replace(bare, explain_negatives=bare.explain_negatives.take([]))
    result = scored(ExampleEmbedding(), Bags(), latent=bare)
    assert (result.verdicts, headline(result).status) == ((), "not_applicable")


def test_marks_tell_nothing_and_a_control_deals_the_same_windows_anew():
    latent = planted()
    random = np.random.default_rng(0)
    positive, negative = shown_masks(latent, 0.3, random)
    assert (positive == own_masks(latent.positives, 0.3)).all()
    assert sorted(map(tuple, positive)) == sorted(map(tuple, negative))
    dealt = dealt_anew(latent, random)
    before, after = (joined(x.positives, x.negatives) for x in (latent, dealt))
    assert sorted(before.positions) == sorted(after.positions)
    assert (dealt.positives.quantiles == latent.positives.quantiles).all()
    share = (np.abs(dealt.positives.activations).max(axis=1) > 0).mean()
    assert 0.3 < share < 0.7


# Surprisal --------------------------------------------------------------------------------------------------------


class BaseModel(FakeEngine):
    """Finds a text likelier, token by token, the more of the description's words it holds. One token per character; BOS first."""

    def __init__(self, logprob, **options):
        super().__init__(self.answer, **options)
        self.logprob = logprob

    async def tokenize(self, text, /):
        return tuple(map(ord, text))

    def answer(self, request):
        if isinstance(request.prompt, Text):
            tokens = [TokenLogprob(token=c, token_id=ord(c), logprob=None) for c in "\x01" + request.prompt.text]
            return Reply(text="", finish="stop", prompt_tokens=tuple(tokens))
        ids = request.prompt.ids
        assert ids[0] == 1 and request.max_tokens == 0
        start = request.prompt_logprobs.start
        before, window = ("".join(map(chr, ids[1:start])), "".join(map(chr, ids[start:])))
        description = before.rpartition("Description: ")[2].strip("\n")
        tokens = [
            TokenLogprob(token=c, token_id=ord(c), logprob=self.logprob(description, window, i)) for i, c in enumerate(window)
        ]
        return Reply(text="", finish="stop", prompt_tokens=tuple(tokens))


def likes(description, window, i):
    noise = generator(window, i).random()
    return -1.0 - noise + (0.3 if i == 0 and description in window else 0.0)


def test_surprisal_is_the_difference_of_log_probabilities_over_all_tokens_of_the_window():
    latent, engine = planted(num=10), BaseModel(likes)
    scorer = Surprisal()
    result = run(scorer.score(latent, explained("os.path"), resources(engine)))
    assert headline(result).value == 1.0 and headline(result).chance == 0.5
    for verdict, tokens in zip(result.verdicts, joined(latent.positives, latent.negatives).tokens, strict=True):
        window = VOCABULARY.text(tokens)
        expected = sum(likes("os.path", window, i) - likes(SurprisalConfig().generic, window, i) for i in range(len(window)))
        assert verdict.value == pytest.approx(expected)
        assert verdict.value == pytest.approx(0.3 * verdict.truth)  # the first token counts, too
    assert len(engine.requests) == 41
    shown = {"".join(map(chr, r.prompt.ids[1:])) for r in engine.requests if not isinstance(r.prompt, Text)}
    assert shown == {request.prompt.text for request in scorer.requests(latent, explained("os.path"), resources())}
    assert all("\n\nDescription: " in text for text in shown)


def test_surprisal_of_the_generic_description_is_zero_for_all():
    result = run(Surprisal().score(planted(num=10), explained(SurprisalConfig().generic), resources(BaseModel(likes))))
    assert {v.value for v in result.verdicts} == {0.0}
    assert headline(result).value == 0.5


@pytest.mark.parametrize("bad", [None, float("nan"), 3.0], ids=str)
def test_a_token_without_log_probability_leaves_its_window_unscored(bad):
    def sometimes(description, window, i):
        return bad if i == 3 and "cat" in window else likes(description, window, i)

    latent = planted(num=10)
    result = run(Surprisal().score(latent, explained("os.path"), resources(BaseModel(sometimes))))
    for verdict, tokens in zip(result.verdicts, joined(latent.positives, latent.negatives).tokens, strict=True):
        lost = ID[" cat"] in tokens
        assert (verdict.status, verdict.value is None) == (("unparseable", True) if lost else ("ok", False))
    assert headline(result).num_scored + sum(headline(result).unscored.values()) == 20
    assert math.isfinite(headline(result).value) and 0 < headline(result).unscored["unparseable"] < 20


def test_windows_are_data_to_a_base_model_too():
    words = [w for w in WORDS if "\n" in w]
    assert words
    block = windows(10, active=False, seed=0, start=100)
    tokens = block.tokens.copy()
    tokens[:, :2] = ID["\n    "]
    latent = replace(planted(num=10), negatives=replace(block, tokens=tokens))
    result = run(Surprisal().score(latent, explained("x\n\nDescription: os.path"), resources(BaseModel(likes))))
    assert len(result.verdicts) == 20
