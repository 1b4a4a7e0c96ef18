"""Simulation against an independent reading of the same log-probabilities, and every pitfall of the method."""

import asyncio
import math
from dataclasses import replace

import numpy as np
import orjson
import pytest
from planted import ID, WORDS, explained, headline, planted, resources, run, windows

from autointerp import stats
from autointerp.digest import generator
from autointerp.errors import ConfigError, ReplyError
from autointerp.llm.fake import FakeEngine
from autointerp.records import Capabilities, PromptLogprobs, Reply, Text, TokenIds, TokenLogprob
from autointerp.scorers.simulation import Simulation, SimulationConfig, expected_level, read_lines

BOS = 7
SINGLE = ["unknown", "\t", "\n", *map(str, range(11))]


class Judge(FakeEngine):
    """A judge whose tokenizer knows a few words and else bytes, and puts BOS before texts.

    `levels(lines, i)` gives the alternatives at the placeholder of line i of the window, by text.
    """

    def __init__(self, levels, *, single=SINGLE, lead=(), change=lambda reply: reply, **options):
        super().__init__(self.answer, **options)
        self.levels, self.single, self.lead, self.change = levels, list(single), tuple(lead), change

    async def tokenize(self, text, /):
        if text in self.single:
            return (*(self.lead if text[0].isdigit() else ()), 1000 + self.single.index(text))
        return tuple(ord(char) if ord(char) < 1000 else 5000 + ord(char) for char in text)

    def text(self, token_id):
        if token_id in self.lead:
            return ""
        return (
            self.single[token_id - 1000] if 1000 <= token_id < 1100 else chr(token_id if token_id < 5000 else token_id - 5000)
        )

    def answer(self, request):
        if isinstance(request.prompt, Text):
            ids = [BOS, *(ord(char) for char in request.prompt.text)]
            tokens = [TokenLogprob(token="", token_id=i, logprob=None) for i in ids]
            return self.change(Reply(text="", finish="stop", prompt_tokens=tuple(tokens)))
        ids = request.prompt.ids
        assert ids[0] == BOS and request.max_tokens == 0
        texts = [self.text(token_id) for token_id in ids]
        # An oracle of its own: the window is whatever follows the last "Description: " line.
        whole = "".join(texts[1:])
        window = whole[whole.rindex("Description: ") :].split("\n")[1:-1]
        num_before = whole[: whole.rindex("Description: ")].count("\n") + 1
        tokens, line = [], 0
        for i, token_id in enumerate(ids):
            is_slot = i > 0 and texts[i - 1] == "\t" and line >= num_before
            top = tuple(self.levels([row.rpartition("\t")[0] for row in window], line - num_before)) if is_slot else ()
            tokens.append(TokenLogprob(token=texts[i], token_id=token_id, logprob=-1.0 if i else None, top=top))
            line += texts[i] == "\n"
        start = request.prompt_logprobs.start
        return self.change(Reply(text="", finish="stop", prompt_tokens=tuple(tokens[start:])))


def logs(**probs):
    return [(text.removeprefix("_"), math.log(p)) for text, p in probs.items()]


def knows(lines, i):
    """Expects ``path`` after ``os.`` to fire."""
    fires = i >= 2 and lines[i - 2 : i + 1] == ["os", ".", "path"]
    return logs(unknown=0.5, _8=0.25, _7=0.05) if fires else logs(unknown=0.5, _0=0.25, _1=0.05)


def opposite(lines, i):
    """Expects every token to fire but ``path`` after ``os.``."""
    return logs(_0=0.9) if i >= 2 and lines[i - 2 : i + 1] == ["os", ".", "path"] else logs(_6=0.9)


def hashed(lines, i):
    p = generator(i, *lines).dirichlet(np.ones(13))
    return [
        *zip(map(str, range(11)), np.log(p), strict=False),
        ("unknown", math.log(p[11])),
        ("1 ", math.log(p[12] / 2)),
        ("11", -3.0),
    ]


def simulation(**config):
    return Simulation(SimulationConfig(**config))


def scored(judge, *, latent=None, explanation=None, **config):
    latent = latent or planted()
    return run(simulation(**config).score(latent, explanation or explained("os.path"), resources(judge)))


def few(num=6, **changes):
    return replace(planted(num=num), **changes)


# Reading --------------------------------------------------------------------------------------------------------------


def test_a_planted_latent_is_simulated_by_its_explanation():
    result = scored(Judge(knows), latent=few())
    assert headline(result).value == pytest.approx(1.0)
    assert (headline(result).metric, headline(result).chance, headline(result).negatives) == ("correlation", 0.0, "random")
    first = result.verdicts[0]
    assert first.truths == tuple(map(float, few().positives.activations[0]))
    # (8 * 0.25 + 7 * 0.05) / 0.30 and 0.05 / 0.30.
    assert sorted({round(a, 6) for a in first.answers}) == [round(0.05 / 0.30, 6), round(2.35 / 0.30, 6)]
    assert (first.answer, first.probability, first.value) == (None, None, None)


def test_expected_levels_and_correlation_equal_an_independent_computation():
    latent = few()
    judge = Judge(hashed)
    result = scored(judge, latent=latent)
    expected, truths, documents = [], [], []
    for block in (latent.positives, latent.negatives):
        for row in range(len(block)):
            lines = [WORDS[t].replace("\n", "\\n").replace("<<", "< <").replace(">>", "> >") for t in block.tokens[row]]
            for i in range(len(lines)):
                mass = np.zeros(11)
                for text, logprob in hashed(lines, i):
                    if text.strip() in map(str, range(11)):
                        mass[int(text)] += np.exp(logprob)
                expected.append((mass @ np.arange(11)) / mass.sum())
                truths.append(block.activations[row, i])
                documents.append(block.documents[row])
    found = [answer for verdict in result.verdicts for answer in verdict.answers]
    assert found == pytest.approx(expected)
    assert headline(result).value == pytest.approx(np.corrcoef(expected, truths)[0, 1])
    assert headline(result).ci_low < headline(result).value < headline(result).ci_high
    assert headline(result).ci_method == "jackknife_document"


def test_the_correlation_is_over_all_tokens_and_not_a_mean_of_windows():
    result = scored(Judge(hashed), latent=few())
    each = [np.corrcoef(v.truths, v.answers)[0, 1] for v in result.verdicts if max(v.truths) > 0]
    assert abs(np.mean(each) - headline(result).value) > 1e-3
    pooled = np.corrcoef(
        np.concatenate([v.truths for v in result.verdicts]), np.concatenate([v.answers for v in result.verdicts])
    )
    assert headline(result).value == pytest.approx(pooled[0, 1])


def test_a_negative_slope_stays_negative():
    """A calibration on the scored data would turn -1 into 1."""

    score = headline(scored(Judge(opposite), latent=few()))
    assert score.value == pytest.approx(-1.0)


@pytest.mark.parametrize("slope", [1, -1])
def test_no_calibration_comes_between(slope):
    """A fit a = alpha + beta s on what is scored leaves a correlation as it is for beta > 0 and turns its sign for beta < 0."""

    def noisy(lines, i):
        level = 5 + slope * (3 if "path" in lines[i] else 0) + (len(lines[i]) % 3 - 1)
        return [(str(level), math.log(0.9))]

    result = scored(Judge(noisy), latent=few(20))
    predicted = np.concatenate([v.answers for v in result.verdicts])
    truths = np.concatenate([v.truths for v in result.verdicts])
    plain = np.corrcoef(predicted, truths)[0, 1]
    beta, alpha = np.polyfit(predicted, truths, 1)
    assert 0.2 < plain * slope < 0.95 and np.sign(beta) == slope
    fitted = np.corrcoef(alpha + beta * predicted, truths)[0, 1]
    assert fitted == pytest.approx(abs(plain))
    assert headline(result).value == pytest.approx(plain)


def test_constant_predictions_are_undefined_and_no_zero():
    result = scored(Judge(lambda lines, i: logs(_3=0.9)), latent=few())
    score = headline(result)
    assert (score.status, score.value, score.ci_low, score.num_scored) == ("undefined", None, None, 12)
    assert {v.status for v in result.verdicts} == {"ok"}


def test_rows_by_quantile_and_positives_alone_are_no_headlines():
    rows = scored(Judge(knows), latent=few(20)).scores
    assert [row.is_headline for row in rows].count(True) == 1
    alone = [row for row in rows if row.metric == "correlation" and row.negatives == "none"]
    assert [row.quantile for row in alone] == [None, *range(10)]
    assert all(row.value == pytest.approx(1.0) for row in alone)
    [share] = [row for row in rows if row.metric == "predicted_tokens"]
    assert (share.value, share.ci_low, share.ci_method) == (1.0, None, "none")


def test_what_predictions_explain_by_hand():
    latent = replace(few(3), max_activation=5.0)
    judge = Judge(lambda lines, i: logs(_6=0.9) if lines[i] == "path" else logs(_0=0.9))
    result = scored(judge, latent=latent)
    rows = {row.metric: row for row in result.scores if row.negatives == "random" and row.quantile is None}
    # Six windows with one decoy each, on which the judge says 6 as it does on the three that fire with 4: level 6 is 3.0.
    decoys = int((np.stack([latent.positives.tokens, latent.negatives.tokens]) == ID["path"]).sum()) - 3
    assert decoys == 6
    assert rows["explained_squares"].value == pytest.approx(1 - (3 * 1 + 6 * 9) / (3 * 16))
    assert rows["explained_absolute"].value == pytest.approx(1 - (3 * 1 + 6 * 3) / (3 * 4))
    for name in ("explained_squares", "explained_absolute", "calibrated_r2"):
        row = rows[name]
        assert (row.chance, row.is_headline, row.ci_method, row.ci_low, row.num_scored) == (0.0, False, "none", None, 6)
    predicted, truths = (np.concatenate([getattr(v, name) for v in result.verdicts]) for name in ("answers", "truths"))
    documents = np.repeat([v.document for v in result.verdicts], 16)
    assert rows["calibrated_r2"].value == pytest.approx(stats.cross_fitted_r2(predicted, truths, documents))
    assert 0 < rows["calibrated_r2"].value < headline(result).value ** 2


def test_who_predicts_silence_or_the_opposite_explains_nothing():
    rows = {row.metric: row for row in scored(Judge(lambda lines, i: logs(_0=1.0)), latent=few()).scores}
    assert (rows["explained_squares"].value, rows["explained_absolute"].value) == (0.0, 0.0)
    assert rows["calibrated_r2"].value == pytest.approx(0.0, abs=1e-12)
    against = {row.metric: row for row in scored(Judge(opposite), latent=few()).scores}
    assert against["correlation"].value < -0.99 and against["calibrated_r2"].value == pytest.approx(0.0, abs=1e-12)
    assert against["explained_squares"].value < 0


# Pitfalls -------------------------------------------------------------------------------------------------------------


def test_places_are_known_from_making_the_prompt():
    """Windows that hold the placeholder, tabs, line breaks, digits and nothing at all."""
    words = ["unknown", "\t", "\n", "10", "0", "", "unknown\t", "a\tb", "Description: ", "path"]

    class Odd:
        def pieces(self, ids):
            return [words[i] for i in ids]

        def is_special(self, ids):
            return np.zeros(len(ids), bool)

        def text(self, ids):
            return "".join(self.pieces(ids))

        def __len__(self):
            return len(words)

    tokens = np.arange(10, dtype=np.uint32)[None].repeat(6, 0)
    active = np.zeros((6, 10), np.float32)
    active[:, 9] = 2
    block = replace(
        windows(6, active=True, seed=1, width=16), tokens=tokens, activations=active, lengths=np.full(6, 10, np.int32)
    )
    judge = Judge(lambda lines, i: logs(_0=1.0), single=SINGLE)
    seen = []

    def levels(request):
        """Answers 9 at the last place and its number at every other, found by counting back from the end of the ids."""
        ids = request.prompt.ids
        slots = [i for i in range(1, len(ids)) if ids[i] == 1000 and ids[i - 1] == 1001][-10:]
        seen.append(slots)
        tokens = [TokenLogprob(token="", token_id=t, logprob=-1.0, top=()) for t in ids]
        for number, slot in enumerate(slots):
            tokens[slot] = replace(tokens[slot], top=((str(number), -0.1),))
        return Reply(text="", finish="stop", prompt_tokens=tuple(tokens[request.prompt_logprobs.start :]))

    original = judge.answer
    judge.script = lambda request: original(request) if isinstance(request.prompt, Text) else levels(request)
    latent = replace(few(), positives=block, negatives=replace(block, activations=active * 0, sources=("random",) * 6))
    result = run(simulation().score(latent, explained(), replace(resources(judge), vocabulary=Odd())))
    assert all(v.answers == pytest.approx(range(10)) for v in result.verdicts)
    assert all(request.prompt_logprobs.start == slots[0] for request, slots in zip(
        [r for r in judge.requests if isinstance(r.prompt, TokenIds)], seen, strict=True))  # fmt: skip


def test_bos_comes_first_and_is_asked_for_once():
    judge = Judge(knows)
    scored(judge, latent=few())
    texts = [request for request in judge.requests if isinstance(request.prompt, Text)]
    assert len(texts) == 1 and texts[0].prompt_logprobs == PromptLogprobs()
    assert len(judge.requests) == 13
    assert all(request.prompt.ids[0] == BOS for request in judge.requests if request is not texts[0])


def test_ten_in_two_tokens_is_never_counted_as_one():
    def ten(lines, i):
        return logs(_1=0.9) if "path" in lines[i] else logs(_0=0.9)

    judge = Judge(ten, single=SINGLE[:-1])
    scored(judge, latent=few())
    # Worked examples say 9 where they said 10, so that nothing teaches the judge to begin a 10.
    shown = "".join(judge.text(i) for i in judge.requests[-1].prompt.ids)
    assert "\t10\n" not in shown and "\t9\n" in shown
    scored(whole := Judge(ten), latent=few())
    shown = "".join(whole.text(i) for i in whole.requests[-1].prompt.ids)
    assert "\t10\n" in shown
    assert expected_level(TokenLogprob(token="", token_id=0, logprob=-1, top=(("10", -0.1),)), 9) is None


def test_a_token_that_begins_every_text_does_not_come_between_tab_and_level():
    judge = Judge(knows, lead=(42,))
    result = scored(judge, latent=few())
    assert headline(result).value == pytest.approx(1.0)
    assert 42 not in judge.requests[-1].prompt.ids


def test_a_judge_without_single_digits_is_refused():
    judge = Judge(knows, single=[text for text in SINGLE if text != "5"])

    async def tokenize(text, original=judge.tokenize):
        return (1, 2) if text == "5" else await original(text)

    judge.tokenize = tokenize
    with pytest.raises(ConfigError, match=r"writes digits as several tokens.*mode to 'list'"):
        scored(judge, latent=few())


def test_activations_are_compared_as_they_are_and_not_in_tenths():
    latent = few(20)
    strengths = np.linspace(0.03, 4, 20, dtype=np.float32)[:, None]
    scaled = replace(latent.positives, activations=(latent.positives.activations > 0) * strengths)
    result = scored(Judge(hashed), latent=replace(latent, positives=scaled))
    predicted = np.concatenate([v.answers for v in result.verdicts])
    raw = np.concatenate([*scaled.activations, *latent.negatives.activations])
    assert headline(result).value == pytest.approx(np.corrcoef(predicted, raw)[0, 1])
    assert abs(headline(result).value - np.corrcoef(predicted, np.ceil(10 * raw / 4))[0, 1]) > 1e-4


def test_no_level_among_the_alternatives_is_no_prediction():
    def half(lines, i):
        return logs(unknown=0.9, the=0.05) if i % 4 == 0 else knows(lines, i)

    result = scored(Judge(half), latent=few())
    assert all((answer is None) == (i % 4 == 0) for v in result.verdicts for i, answer in enumerate(v.answers))
    [share] = [row for row in result.scores if row.metric == "predicted_tokens"]
    assert share.value == 0.75
    assert headline(result).num_scored == 12
    result = scored(Judge(half), latent=few(), min_predicted=0.8)
    assert {v.status for v in result.verdicts} == {"unparseable"}
    assert (headline(result).status, headline(result).unscored) == ("unparseable", {"unparseable": 12})
    result = scored(Judge(lambda lines, i: ()), latent=few(), min_predicted=0)
    assert {(v.status, v.answers) for v in result.verdicts} == {("unparseable", None)}


@pytest.mark.parametrize(
    "change",
    [
        lambda reply: replace(reply, prompt_tokens=reply.prompt_tokens[:-1]),
        lambda reply: replace(reply, prompt_tokens=reply.prompt_tokens[1:]),
        lambda reply: replace(reply, prompt_tokens=()),
        lambda reply: replace(reply, prompt_tokens=tuple(replace(t, token_id=3) for t in reply.prompt_tokens)),
        lambda reply: replace(reply, prompt_tokens=tuple(replace(t, token_id=None) for t in reply.prompt_tokens)),
        lambda reply: replace(reply, prompt_tokens=tuple(replace(t, top=(("3", float("nan")),)) for t in reply.prompt_tokens)),
        lambda reply: replace(reply, prompt_tokens=tuple(replace(t, top=(("3", 2.0),)) for t in reply.prompt_tokens)),
    ],
    ids=["short", "shifted", "none", "other ids", "no ids", "nan", "no probability"],
)  # fmt: skip
def test_another_prompt_than_was_sent_is_never_read(change):
    judge = Judge(knows)
    judge.change = lambda reply: reply if reply.prompt_tokens[0].token_id == BOS else change(reply)
    result = scored(judge, latent=few())
    assert {(v.status, v.answers) for v in result.verdicts} == {("unparseable", None)}


def test_a_judge_that_hides_its_prompt_gives_no_reply():
    result = scored(Judge(knows, change=lambda reply: replace(reply, prompt_tokens=())), latent=few())
    assert {v.status for v in result.verdicts} == {"no_reply"}


def test_only_as_many_alternatives_are_asked_for_as_there_are():
    judge = Judge(knows, capabilities=Capabilities(top_logprobs=5))
    scored(judge, latent=few())
    assert {r.prompt_logprobs.top for r in judge.requests if isinstance(r.prompt, TokenIds)} == {5}


def test_logprob_strings_are_compared_whole():
    token = TokenLogprob(
        token="", token_id=0, logprob=-1, top=(("10", math.log(0.5)), ("1", math.log(0.25)), ("11", -1), ("1.", -1), ("", -1))
    )
    assert expected_level(token, 10) == pytest.approx((5 + 0.25) / 0.75)
    with pytest.raises(ReplyError):
        expected_level(replace(token, top=(("1", float("nan")),)), 10)


def test_worked_examples_hide_their_first_values_as_the_method_says():
    worked = [excerpt for _, excerpts in simulation()._worked for excerpt in excerpts]
    hidden = [
        [line.value for line in excerpt].index(next(line.value for line in excerpt if line.value != "unknown"))
        for excerpt in worked
    ]
    assert hidden == [10, 3, 5, 20, 0, 10]
    for excerpt in worked:
        values = [line.value for line in excerpt]
        assert "unknown" not in values[values.count("unknown") :]


def test_lines_are_read_strictly():
    assert [len(block) for block in read_lines("a\t1\n\tb\tunknown\n\nc\t10", "x")] == [2, 1]
    assert read_lines("\tb\tunknown", "x")[0][0].token == "\tb"
    for bad in ("a", "a\t11", "a\tx", "a 1"):
        with pytest.raises(ConfigError, match="is not a token, a tab"):
            read_lines(bad, "x")


def test_plan_counts_text_of_the_prompt_that_is_sent():
    judge = Judge(knows)
    scored(judge, latent=few())
    listed = simulation().requests(few(), explained("os.path"), resources())
    assert len(listed) == 12
    texts = {request.prompt.text for request in listed}
    assert texts == {"".join(judge.text(i) for i in r.prompt.ids[1:]) for r in judge.requests if isinstance(r.prompt, TokenIds)}


# The written variant --------------------------------------------------------------------------------------------------


def tokens_of(request):
    return orjson.loads(request.prompt.messages[-1][1].split("): ", 1)[1])


def writes(request):
    shown = tokens_of(request)
    return orjson.dumps([8 * (shown[max(i - 2, 0) : i + 1] == ["os", ".", "path"]) for i in range(len(shown))]).decode()


def test_written_levels_are_taken_as_they_stand_to_the_last_token():
    """OpenAI's reader never strips the last separator, so that its last token is always 0."""

    def counts(request):
        return orjson.dumps([i % 11 for i in range(len(tokens_of(request)))]).decode()

    result = scored(FakeEngine(counts), latent=few(), mode="list")
    assert {v.answers for v in result.verdicts} == {tuple(float(i % 11) for i in range(16))}
    zeros = scored(FakeEngine(lambda request: orjson.dumps([0] * 16).decode()), latent=few(), mode="list")
    # Equal predictions have no correlation; they are counted as scored, and the row says that it is undefined.
    assert (headline(zeros).status, headline(zeros).value, headline(zeros).num_scored) == ("undefined", None, 12)


def test_written_levels():
    engine = FakeEngine(writes)
    result = scored(engine, latent=few(), mode="list")
    assert headline(result).value == pytest.approx(1.0)
    assert {v.scorer for v in result.verdicts} == {"simulation_list"}
    assert len(engine.requests) == 12
    schema = orjson.loads(engine.requests[0].constraint.schema)
    assert schema["minItems"] == schema["maxItems"] == 16 and schema["items"]["maximum"] == 10
    assert not simulation(mode="list").needs.prompt_logprobs and simulation().needs.prompt_logprobs


@pytest.mark.parametrize(
    "text",
    ["[0, 11, 0]", "[0, -1, 0]", "[0, 1]", "[0, 1.5, 0]", "[0, null, 0]", "[0, true, 0]", '["0", 1, 2]', "[0, 1e999, 0]"],
)
def test_written_levels_out_of_form_are_no_zeros(text):
    latent = few()
    short = replace(latent.positives, lengths=np.full(6, 3, np.int32))
    result = scored(FakeEngine(lambda request: text), latent=replace(latent, positives=short, negatives=short), mode="list")
    assert {(v.status, v.answers) for v in result.verdicts} == {("unparseable", None)}


def test_alternatives_are_asked_for_at_the_slots_alone():
    """Those of other tokens would fill the reply log: 15 at each of five tokens a line."""
    judge = Judge(knows)
    scored(judge, latent=few())
    for request in judge.requests[1:]:
        asked = request.prompt_logprobs
        assert len(asked.at) == 16 and asked.at[0] == asked.start
        assert all(request.prompt.ids[i] == 1000 for i in asked.at)
        assert (asked.top_at(asked.at[3]), asked.top_at(asked.at[3] + 1)) == (15, 0)


def test_pieces_are_asked_for_once_though_windows_begin_together():
    judge = Judge(knows)
    asked = []

    async def tokenize(text, original=judge.tokenize):
        asked.append(text)
        await asyncio.sleep(0)
        return await original(text)

    judge.tokenize = tokenize
    scored(judge, latent=few())
    assert len(asked) == len(set(asked))
