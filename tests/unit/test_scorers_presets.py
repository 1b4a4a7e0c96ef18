"""The protocols of SAEBench and delphi."""

import json
import math
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from planted import explained, headline, planted, resources, run

from autointerp.errors import ConfigError, ReplyError
from autointerp.llm.fake import FakeEngine, prompt_text
from autointerp.records import Reply
from autointerp.scorers.delphi import DelphiDetection, DelphiFuzzing, DelphiFuzzingConfig, overlapping
from autointerp.scorers.parse import read_numbers
from autointerp.scorers.saebench import SAEBench, SAEBenchConfig

LOG = json.loads((Path(__file__).parents[1] / "data" / "saebench-log.json").read_text())


def texts(request):
    return [line.split(": ", 1)[1] for line in request.prompt.messages[-1][1].splitlines() if re.match(r"Text \d+: ", line)]


def bench(script, *, latent=None, control=None, **config):
    engine = FakeEngine(script)
    scorer = SAEBench(SAEBenchConfig(**config))
    return run(
        scorer.score(latent or planted(num=50, width=32), explained("os.path"), resources(engine), control=control)
    ), engine


def lists(request):
    fits = [str(i) for i, text in enumerate(texts(request), start=1) if "os.path" in text]
    return ", ".join(fits) or "none"


# SAEBench ---------------------------------------------------------------------------------------------------------


def test_fourteen_windows_in_one_prompt():
    result, engine = bench(lists)
    assert len(engine.requests) == 1
    assert [v.truth for v in result.verdicts] == [True] * 4 + [False] * 10
    assert [v.quantile for v in result.verdicts[:2]] == [0, 0]
    assert headline(result).value == 1.0
    assert headline(result).chance == pytest.approx(10 / 14)
    assert headline(result).metric == "accuracy"
    assert len(texts(engine.requests[0])) == 14
    truths = [("os.path" in text) for text in texts(engine.requests[0])]
    assert sum(truths) == 4 and truths != sorted(truths, reverse=True)


def test_saying_none_is_chance_and_saying_all_is_below():
    none = headline(bench(lambda request: "none")[0])
    assert none.value == pytest.approx(10 / 14) == pytest.approx(none.chance)
    everything = headline(bench(lambda request: ", ".join(map(str, range(1, 15))))[0])
    assert everything.value == pytest.approx(4 / 14)
    # Any four numbers: the mean over all choices is (4 * 4 + 10 * 10) / (14 * 14).
    mean = np.mean([sum((i in c) == (i < 4) for i in range(14)) / 14 for c in combinations(range(14), 4)])
    assert mean == pytest.approx(0.592, abs=5e-4)


def test_the_log_that_ships_with_saebench_is_scored_as_there():
    """100 latents of gpt2-small: accuracy and balanced accuracy from the listed numbers, through this scorer."""
    accuracies, balanced = [], []
    for _, predicted, active, published in LOG["rows"]:
        result, engine = _one(predicted, active)
        assert headline(result).value == pytest.approx(published, abs=1e-6)
        accuracies.append(headline(result).value)
        [score] = [s for s in result.scores if s.metric == "balanced_accuracy"]
        balanced.append(score.value)
    assert np.mean(accuracies) == pytest.approx(0.885)
    assert np.std(accuracies, ddof=1) == pytest.approx(0.138, abs=5e-4)
    assert np.mean(balanced) == pytest.approx(0.847, abs=5e-4)
    assert sum(a == 1 for a in accuracies) == 37
    assert sum(not predicted for _, predicted, _, _ in LOG["rows"]) == 4


class Fixed(SAEBench):
    """Shows the windows in such an order that the active ones have given numbers."""

    def __init__(self, active):
        super().__init__()
        self.active = active

    def batches(self, items, latent, seed):
        positives, negatives = iter([i for i in items if i.truth]), iter([i for i in items if not i.truth])
        return [[next(positives) if number in self.active else next(negatives) for number in range(1, 15)]]


def _one(predicted, active):
    engine = FakeEngine(lambda request: ", ".join(map(str, predicted)) or "None")
    return run(Fixed(active).score(planted(num=20, width=32), explained(), resources(engine))), engine


def test_windows_are_cut_about_their_strongest_token_and_stay_inside_their_window():
    latent = planted(num=50, width=32)
    cut = SAEBench().judged(latent, None, 0)
    originals = {int(p): row for row, p in enumerate(latent.positives.positions)}
    for row in range(4):
        assert cut.positives.lengths[row] == 21
        start = int(cut.positives.positions[row]) % 32
        source = originals[int(cut.positives.positions[row]) - start]
        peak = int(latent.positives.activations[source].argmax())
        assert start == min(max(peak - 10, 0), 11)
        assert (cut.positives.tokens[row] == latent.positives.tokens[source, start : start + 21]).all()
        assert cut.positives.activations[row, peak - start] == 4
    short = SAEBench(SAEBenchConfig(buffer=20)).judged(latent, None, 0)
    assert short.positives.tokens.shape[1] == 32
    assert not np.any(cut.negatives.activations)


def test_weaker_windows_are_drawn_in_proportion_to_the_square():
    latent = planted(num=50, width=32)
    strengths = np.where(np.arange(50) < 5, 10.0, np.where(np.arange(50) < 10, 3.0, 0.01))[:, None]
    scaled = replace(latent.positives, activations=(latent.positives.activations > 0) * strengths.astype(np.float32))
    drawn = [SAEBench().judged(replace(latent, positives=scaled, latent=i), None, 0).positives for i in range(20)]
    peaks = np.concatenate([d.activations.max(axis=1)[2:] for d in drawn])
    assert (peaks == 3).all()
    assert all((d.activations.max(axis=1)[:2] == 10).all() for d in drawn)


def test_saebench_without_enough_windows_is_not_applicable():
    latent = planted(num=9, width=32)
    result, engine = bench(lists, latent=latent)
    assert (result.verdicts, headline(result).status, engine.requests) == ((), "not_applicable", [])


@pytest.mark.parametrize("text", ["", "1 2", "15", "0, 1", "1, 1", "Text 1, Text 2", "[1, 2]", "none of them", "1,,2", "all"])
def test_numbers_are_read_strictly(text):
    with pytest.raises(ReplyError):
        read_numbers(text, 14)


@pytest.mark.parametrize(
    ("text", "found"), [("none", set()), ("None.", set()), ("1, 4 and 13", {1, 4, 13}), ("2, and 3.", {2, 3}), ("14", {14})]
)
def test_numbers_are_read_as_they_are_written(text, found):
    assert read_numbers(text, 14) == found


def test_nothing_in_the_prompt_says_that_four_fit():
    """SAEBench shows an answer of four random numbers as its example."""
    _, engine = bench(lists)
    messages = engine.requests[0].prompt.messages
    answers = [content for role, content in messages if role == "assistant"]
    assert sorted(len(read_numbers(answer, 14)) for answer in answers) == [0, 2, 3]
    told = " ".join(content for role, content in messages if role != "assistant").split("Description: ")[0]
    assert not re.search(r"\bfour\b|\d+, \d+", told)


def test_a_lost_prompt_loses_its_fourteen_windows():
    result, _ = bench(lambda request: Reply(text="", finish="filter"))
    assert {v.status for v in result.verdicts} == {"refused"}
    assert (headline(result).status, headline(result).unscored) == ("refused", {"refused": 14})


def test_the_first_source_of_negatives_is_the_only_one():
    both = replace(planted(num=50, width=32), negative_sources=("random", "same_token"))
    assert headline(bench(lists, latent=both)[0]).negatives == "random"
    few = replace(both, negatives=both.negatives.take(range(9)))
    result, engine = bench(lists, latent=few)
    assert (headline(result).status, headline(result).negatives, engine.requests) == ("not_applicable", "random", [])


# delphi -----------------------------------------------------------------------------------------------------------


def arrays(request):
    found = [int("os.path" in text or "os.<<path>>" in text or "os. << path >>" in text) for text in texts(request)]
    return json.dumps(found)


def delphi(scorer, latent=None):
    engine = FakeEngine(arrays)
    return run(scorer.score(latent or planted(width=32), explained("os.path"), resources(engine))), engine


def test_some_scored_windows_were_explained_and_rows_say_so():
    latent = planted(width=32)
    result, engine = delphi(DelphiDetection(), latent)
    scored = {v.position for v in result.verdicts if v.truth}
    explained_ones = set(latent.explain.positions.tolist())
    # 40 of 190 windows were explained: about 10.5 of 50 by chance.
    assert 4 <= len(scored & explained_ones) <= 18
    assert {score.disjoint for score in result.scores} == {"none"}
    assert headline(result).value == 1.0 and headline(result).metric == "balanced_accuracy"
    assert {v.scorer for v in result.verdicts} == {"delphi_detection"}
    assert len(engine.requests) == 20 and all(len(texts(r)) == 5 for r in engine.requests)
    assert len(engine.requests[0].prompt.messages) == 1 + 2 * 3 + 1
    listed = DelphiDetection().requests(latent, explained("os.path"), resources())
    assert {prompt_text(r) for r in listed} == {prompt_text(r) for r in engine.requests}


def test_the_draw_is_stratified_by_rank_and_drops_the_remainder():
    latent = planted(num=50, width=32)
    strengths = np.linspace(1, 9, 100)[:, None]
    statistics = latent.explain_statistics.take(range(100))
    statistics = replace(statistics, activations=((statistics.activations > 0) * strengths).astype(np.float32))
    drawn = overlapping(replace(latent, explain_statistics=statistics), 0).positives
    assert (np.bincount(drawn.quantiles) == 5).all()
    peaks = drawn.activations.max(axis=1)
    for q in range(9):
        assert peaks[drawn.quantiles == q].min() >= peaks[drawn.quantiles == q + 1].max()
    assert len(set(drawn.positions.tolist())) == 50


def test_delphis_fuzzing_marks_the_same_places_in_every_silent_window():
    latent = planted(width=32)
    scorer = DelphiFuzzing()
    judged = scorer.judged(latent, None, 0)
    items = scorer.items(judged, 0)
    masks = [item.mask for item in items if not item.truth]
    assert all((mask == masks[0]).all() for mask in masks)
    mean = np.count_nonzero(judged.positives.activations, axis=1).mean()
    assert masks[0].sum() == math.ceil(mean) and masks[0][24]
    result, _ = delphi(scorer, latent)
    assert {v.scorer for v in result.verdicts} == {"delphi_fuzzing"}
    assert {score.disjoint for score in result.scores} == {"none"}
    with pytest.raises(ConfigError):
        DelphiFuzzingConfig.parse({"variant": "active"})
