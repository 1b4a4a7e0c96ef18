"""Best of n: draws of one explainer, judged on the validate pool alone; nothing is chosen without a reason that is written down."""

from dataclasses import replace

import pytest
from judged import by_hand, engine, is_judging, is_reminder, judged, key, texts_of, validated
from planted import VOCABULARY, resources, run, windows

from autointerp.errors import ConfigError, Transient
from autointerp.explainers.best_of import BestOf, BestOfConfig
from autointerp.jobs.methods import build_explainer
from autointerp.llm.fake import FakeEngine
from autointerp.protocols import Resources
from autointerp.records import Examples, Reply
from autointerp.scorers.detection import Detection

DRAWS = ["the word path", "os.path, or a cat", "path after os.", "path after os.", "nothing"]


def draw(request, draws=DRAWS):
    return f"EXPLANATION: {draws[request.sample]}"


def explained(latent=None, fake=None, config=None, judge=None):
    fake = fake or engine(draw)
    explainer = BestOf(BestOfConfig(**(config or {})))
    given = Resources(vocabulary=VOCABULARY, seed=0, engine=fake, judge=judge)
    return run(explainer.explain(latent or validated(), given)), fake


def test_the_best_stands_and_the_others_are_kept_beside():
    latent = validated()
    rows, _ = explained(latent)
    assert [row.sample for row in rows] == [0, 1, 2, 3, 4]
    assert [row.status for row in rows] == ["not_applicable", "not_applicable", "ok", "not_applicable", "not_applicable"]
    # Samples 2 and 3 say the same: the lower one stands.
    assert [row.text for row in rows] == [None, None, "path after os.", None, None]
    assert [row.candidate for row in rows] == [DRAWS[0], DRAWS[1], None, DRAWS[3], DRAWS[4]]
    assert [row.validate_score for row in rows] == pytest.approx([by_hand(text, latent) for text in DRAWS])
    assert by_hand(DRAWS[2], latent) == 1.0 > by_hand(DRAWS[1], latent) > 0.5 == by_hand(DRAWS[0], latent)
    assert {row.judge for row in rows} == {"fake"}
    assert rows[0].reason == "not chosen: 0.500 on the validate pool, sample 2 has 1.000"
    assert rows[2].reason is None


def test_ties_go_to_the_lowest_draw_whatever_is_said():
    fake = engine(lambda request: draw(request, ["nothing", "the word path", "nothing", "the word path", "nothing"]))
    rows, _ = explained(fake=fake)
    assert [row.status == "ok" for row in rows] == [True, False, False, False, False]


def test_draws_are_one_prompt_with_other_numbers():
    _, fake = explained()
    written = [request for request in fake.requests if not is_judging(request)]
    assert sorted(request.sample for request in written) == [0, 1, 2, 3, 4]
    assert {request.temperature for request in written} == {1.0}
    assert {replace(request, sample=0) for request in written} == {written[0]}


@pytest.mark.parametrize("scorer", ["detection", "delphi_detection"])
def test_each_text_is_judged_once_on_the_validate_pool_alone(scorer):
    """Also by a scorer that asks about windows that were shown, where it gets any."""
    latent = validated()
    _, fake = explained(latent, config={"scorer": scorer})
    asked = [texts_of(request) for request in fake.requests if is_judging(request)]
    assert len(asked) == 4 * (20 + 20) / 5  # four different texts
    sides = (latent.validate_positives, latent.validate_negatives)
    known = {key(VOCABULARY.text(row)) for side in sides for row in side.tokens}
    assert {key(text) for _, texts in asked for text in texts} == known and len(known) == 40


def test_the_score_pool_is_never_read():
    nothing = Examples.empty(16)
    assert explained(validated(positives=nothing, negatives=nothing))[1].requests == explained()[1].requests


def test_writers_do_not_see_the_validate_pool():
    other = replace(
        validated(),
        validate_positives=windows(20, active=True, seed=77, start=8000),
        validate_negatives=windows(20, active=False, seed=78, start=8500),
    )
    written = [[r for r in explained(latent)[1].requests if not is_judging(r)] for latent in (validated(), other)]
    assert written[0] == written[1]


@pytest.mark.parametrize("sides", [(9, 20), (20, 9), (0, 0)])
def test_with_a_small_validate_pool_the_first_draw_stands_and_says_so(sides):
    latent = validated()
    latent = replace(
        latent,
        validate_positives=latent.validate_positives.take(range(sides[0])),
        validate_negatives=latent.validate_negatives.take(range(sides[1])),
    )
    [row], fake = explained(latent)
    assert (row.status, row.text, row.sample, row.validate_score) == ("ok", DRAWS[0], 0, None)
    assert row.reason.startswith(
        f"not judged: the validate pool has {sides[0]} activating and {sides[1]} silent windows, 10 of"
    )
    assert len(fake.requests) == 1
    explainer = BestOf()
    assert explainer.requests(latent, resources()) == fake.requests
    rows, _ = explained(latent, config={"min_validate": 9, "num_samples": 3})
    assert len(rows) == (3 if min(sides) == 9 else 1)


def test_a_reply_that_cannot_be_read_is_no_candidate():
    rows, _ = explained(fake=engine(lambda request: "no idea" if request.sample == 2 else draw(request)))
    assert [row.status for row in rows] == ["not_applicable"] * 3 + ["ok", "not_applicable"]
    assert (rows[2].candidate, rows[2].text, rows[2].validate_score) == (None, None, None)
    assert rows[2].reason == "no candidate: its reply is unparseable; sample 3 stands"
    rows, fake = explained(fake=engine(lambda request: "no idea"))
    assert [row.status for row in rows] == ["unparseable"] * 5
    assert not any(is_judging(request) for request in fake.requests)


def test_without_readable_answers_of_the_judge_nothing_is_chosen():
    rows, _ = explained(fake=engine(draw, judge=lambda request: "well, well"))
    assert [row.status == "ok" for row in rows] == [True, False, False, False, False]
    assert rows[0].reason == "not chosen: no candidate got enough answers of the judge that can be read"
    assert all(row.validate_score is None and row.judge is None for row in rows)


@pytest.mark.parametrize(("unreadable", "chosen"), [(4, 1), (3, 2)])
def test_a_candidate_with_half_its_answers_unreadable_has_no_score(unreadable, chosen):
    prompts = []

    def judge(request):
        explanation, texts = texts_of(request)
        if explanation == "path after os.":
            prompts.append(texts)
            return "?" if len(prompts) <= unreadable else judged(request)
        return judged(request)

    def script(request):
        if is_reminder(request):
            return "still ?"
        return judge(request) if is_judging(request) else draw(request)

    rows, _ = explained(fake=FakeEngine(script))
    assert len(prompts) == 8
    assert [row.status == "ok" for row in rows] == [number == chosen for number in range(5)]
    assert (rows[2].validate_score is None) == (chosen == 1)


@pytest.mark.parametrize("who", ["writer", "judge"])
def test_nothing_is_chosen_while_an_answer_is_missing(who):
    def judge(request):
        return Transient("timeout") if who == "judge" and texts_of(request)[0] == "nothing" else judged(request)

    def write(request):
        return Transient("timeout") if who == "writer" and request.sample == 3 else draw(request)

    with pytest.raises(Transient):
        explained(fake=engine(write, judge=judge))


def test_another_engine_judges():
    judge = FakeEngine(judged, model="judge")
    rows, fake = explained(judge=judge)
    assert not any(is_judging(request) for request in fake.requests) and all(is_judging(r) for r in judge.requests)
    assert {row.judge for row in rows} == {"judge"} and {row.model for row in rows} == {"fake"}


def test_what_is_planned_is_what_is_sent():
    texts = ["the word path", "os.path, or a cat", "path after os.", "nothing", "os.path, or a cat, or answers"]
    rows, fake = explained(fake=engine(lambda request: draw(request, texts)))
    planned = BestOf().requests(validated(), resources(engine(draw)))
    assert len(planned) == len(fake.requests) == 5 + 5 * 8
    assert sorted(map(is_judging, planned)) == sorted(map(is_judging, fake.requests))
    written = [sorted((r for r in sent if not is_judging(r)), key=lambda r: r.sample) for sent in (planned, fake.requests)]
    assert written[0] == written[1]


def test_what_the_base_says_without_asking_is_said_once():
    latent = validated(explain_negatives=Examples.empty(16))
    latent = replace(latent, explain_statistics=latent.explain_statistics.take(range(100)))
    rows, fake = explained(latent, config={"base": "contrastive"})
    assert [row.status for row in rows] == ["not_applicable"] and not fake.requests


def test_a_cut_reply_keeps_its_status_when_nothing_else_is_there():
    rows, _ = explained(fake=engine(lambda request: Reply(text="EXPLANATION: the wo", finish="length")))
    assert {row.status for row in rows} == {"truncated"} and {row.text for row in rows} == {None}


def test_configuration():
    explainer = build_explainer("best_of:8", {"base": "contrastive", "scorer": "fuzzing", "base_options": {"num_negatives": 3}})
    assert explainer.config.num_samples == 8 and explainer.name == "best_of"
    assert explainer.needs.validate == 20 and explainer.needs.judge.engine and explainer.needs.engine
    assert build_explainer("best_of", {"num_samples": 8}).identity() == build_explainer("best_of:8", {}).identity()
    assert build_explainer("best_of", {"base": "activations_logits"}).needs.logits
    identities = [
        build_explainer("best_of", options).identity()
        for options in (
            {},
            {"num_samples": 8},
            {"temperature": 0.5},
            {"base": "contrastive"},
            {"base_options": {"threshold": 0.5}},
            {"scorer": "fuzzing"},
            {"scorer_options": {"examples_per_prompt": 10}},
            {"num_validate": 30},
            {"min_validate": 5},
        )
    ]
    assert len({str(identity) for identity in identities}) == len(identities)
    labels = build_explainer("best_of", {"scorer_options": {"mode": "labels"}})
    assert labels.needs.judge.labels and not labels.needs.labels
    assert labels.needs.judge == Detection(Detection.Config(mode="labels")).needs


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("best_of:8", {"num_samples": 3}, "contradict each other"),
        ("default:8", {}, "takes no number"),
        ("best_off:8", {}, "there is no explainer 'best_off:8'; did you mean 'best_of'"),
        ("best_of:1", {}, "num_samples"),
        ("best_of", {"temperature": 0}, "temperature"),
        ("best_of", {"base": "lexical"}, "base_options|temperature"),
        ("best_of", {"base": "refine"}, "cannot write candidates"),
        ("best_of", {"base": "none"}, "there is no explainer 'none'"),
        ("best_of", {"scorer": "embedding"}, "cannot judge candidates"),
        ("best_of", {"scorer": "example_embedding"}, "cannot judge candidates"),
        ("best_of", {"base_options": {"temperature": 0.3}}, "contradict each other"),
        ("best_of", {"scorer_options": {"mod": "list"}}, "did you mean 'mode'"),
    ],
)
def test_what_cannot_work_is_refused_beforehand(name, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_explainer(name, options)
