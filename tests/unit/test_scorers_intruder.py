import re
from dataclasses import replace

import numpy as np
import pytest
from planted import explained, headline, planted, resources, run

from autointerp import stats
from autointerp.llm.fake import FakeEngine
from autointerp.scorers.intruder import Intruder, IntruderConfig

MARKED = re.compile(r"os\. ?<< ?path ?>>")


def texts(request):
    return [line.split(": ", 1)[1] for line in request.prompt.messages[-1][1].splitlines()]


def finds(request):
    """Names the one text without a marked path after ``os.``."""
    odd = [i for i, text in enumerate(texts(request), start=1) if not MARKED.search(text)]
    return str(odd[0]) if len(odd) == 1 else "1"


def scored(script, *, latent=None, control=None, **config):
    engine = FakeEngine(script)
    result = run(
        Intruder(IntruderConfig(**config)).score(latent or planted(), explained(text=None), resources(engine), control=control)
    )
    return result, engine


def test_a_judge_that_sees_the_plant_finds_every_intruder():
    result, engine = scored(finds)
    score = headline(result)
    assert (score.value, score.metric, score.chance, score.num_scored, score.negatives) == (1.0, "accuracy", 0.2, 50, "random")
    assert len(engine.requests) == 50
    assert {(v.truth, v.answer, v.source) for v in result.verdicts} == {(False, False, "random")}
    assert all(v.truths == v.answers and sum(v.truths) == 1 and len(v.truths) == 5 for v in result.verdicts)
    assert not Intruder().needs.explanation


def test_answers_and_places_by_hand():
    result, engine = scored(lambda request: "2")
    for verdict, request in zip(result.verdicts, engine.requests, strict=True):
        place = next(i for i, text in enumerate(texts(request)) if not MARKED.search(text))
        assert verdict.truths == tuple(float(i == place) for i in range(5))
        assert verdict.answers == (0.0, 1.0, 0.0, 0.0, 0.0)
        assert verdict.answer == (place != 1)
    right = sum(v.answer is False for v in result.verdicts)
    assert headline(result).value == right / 50
    assert 0.05 < right / 50 < 0.4
    clusters = [v.quantile for v in result.verdicts]
    deff = stats.design_effect([float(v.answer is False) for v in result.verdicts], clusters)
    interval = stats.wilson(right, 50, deff=deff)
    assert (headline(result).ci_low, headline(result).ci_method) == (pytest.approx(interval.low), "wilson_clustered")


def test_places_are_spread_and_quantiles_take_turns():
    result, _ = scored(finds)
    assert len({v.truths.index(1.0) for v in result.verdicts}) == 5
    assert [v.quantile for v in result.verdicts] == list(range(10)) * 5
    by_quantile = [score for score in result.scores if score.quantile is not None]
    assert [score.num_scored for score in by_quantile] == [5] * 10 and not any(score.is_headline for score in by_quantile)


def test_the_windows_of_a_task_are_of_one_quantile_and_never_the_same_twice():
    latent = planted()
    for task in Intruder().items(latent, 0):
        others = [item for item in task.shown if item.truth]
        assert len(others) == 4 and len({item.position for item in task.shown}) == 5
        assert {item.quantile for item in others} == {task.quantile}
        assert task.shown[task.place].position == task.position
    few = latent.positives.take([0, 12, 22, 32])
    tasks = Intruder().items(replace(latent, positives=few), 0)
    assert all({item.position for item in task.shown if item.truth} == set(few.positions.tolist()) for task in tasks)


def test_marks_tell_nothing():
    tasks = Intruder().items(planted(), 0)
    inside = [int(item.mask.sum()) for task in tasks for item in task.shown if item.truth]
    assert {int(task.mask.sum()) for task in tasks} <= set(inside)
    assert all(task.mask.any() for task in tasks)
    places = np.array([np.flatnonzero(task.mask)[0] for task in tasks])
    assert len(set(places)) > 3


def test_under_the_control_the_same_windows_are_dealt_anew():
    values = [headline(scored(finds, latent=planted(latent=i), control="shuffled")[0]).value for i in range(5)]
    assert abs(np.mean(values) - 0.2) < 0.12


def test_too_few_windows_are_not_applicable():
    latent = planted()
    result, engine = scored(finds, latent=replace(latent, positives=latent.positives.take([0, 1, 2])))
    assert (result.verdicts, headline(result).status, engine.requests) == ((), "not_applicable", [])
    assert headline(result).chance == 0.2 and "3 activating windows" in headline(result).reason
    assert len(scored(finds, num_shown=4, latent=replace(latent, positives=latent.positives.take([0, 1, 2])))[0].verdicts) == 50


@pytest.mark.parametrize("text", ["6", "0", "", "Text 3", "3 or 4", "-1", "3.5", "[3]", "three", "1\n2"])
def test_a_reply_that_is_no_number_of_a_text_is_no_answer(text):
    result, engine = scored(lambda request: text)
    assert {(v.status, v.answer, v.answers) for v in result.verdicts} == {("unparseable", None, None)}
    assert len(engine.requests) == 100
    assert (headline(result).status, headline(result).unscored) == ("unparseable", {"unparseable": 50})
