"""What a calibration's scores come to, on frames whose answers are known."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from autointerp.stats import auroc_newcombe, mean_t, wilson
from autointerp.studies import calibration as study


def rows_of(values, *, role="true", coder="exact", share=0.0, noise="moved", family="token"):
    return pd.DataFrame(
        {"latent": range(len(values)), "role": role, "coder": coder, "share": share, "noise": noise, "family": family,
         "value": np.array(values, float), "control": "", "metric": "balanced_accuracy", "num_scored": 100,
         "status": np.where(np.isfinite(values), "ok", "undefined")}
    )  # fmt: skip


def test_ranking_against_hand_counts():
    true, broad = [0.9, 0.8, 0.7, np.nan], [0.85, 0.8, 0.2, 0.1]
    frame = pd.concat([rows_of(true), rows_of(broad, role="too_broad")])
    found = {(row["measure"], row["family"]): row for row in study._ranking(frame)}
    # Pairs of the three latents that have both: 0.9 > all three; 0.8 > 0.2, = 0.8; 0.7 > 0.2.
    assert found["auroc", "all"]["value"] == pytest.approx((3 + 1 + 0.5 + 1) / 9)
    assert found["auroc", "all"]["ci_low"] == auroc_newcombe(5.5 / 9, 3, 3).low
    assert found["wins", "all"]["value"] == pytest.approx(2.5 / 3)
    assert found["wins", "all"]["ci_high"] == wilson(2.5, 3).high
    assert found["auroc", "token"]["num_latents"] == 3


def test_an_explanation_whose_correlation_is_undefined_loses():
    """Dropped, the wrong explanations that hold nowhere would leave only wrong ones that happen to hold."""
    true = rows_of([0.9, 0.3, np.nan, 0.8]).assign(metric="correlation")
    wrong = rows_of([np.nan, 0.4, np.nan, np.nan], role="wrong").assign(metric="correlation", num_scored=[100, 100, 100, 0])
    found = {(row["measure"], row["family"]): row for row in study._ranking(pd.concat([true, wrong]))}
    # The last has no answers, so it is no score of the explanation. 0.9 and 0.3 win over both undefined ones, 0.9 over 0.4;
    # undefined ties with undefined twice and loses to 0.4.
    assert found["auroc", "all"]["value"] == pytest.approx((3 + 2 + 1) / 9)
    assert found["wins", "all"]["value"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["wins", "all"]["num_undefined"] == 2 and found["wins", "all"]["num_latents"] == 3
    # Other metrics are undefined for want of answers, not of a prediction.
    other = [frame.assign(metric="balanced_accuracy") for frame in (true, wrong)]
    assert next(study._ranking(pd.concat(other)))["num_latents"] == 1


def test_noise_is_read_over_the_same_latents_at_every_level():
    shares = (0.0, 0.1, 0.2, 0.3, 0.5)
    frames = [rows_of([1 - s, 0.9 - s, 0.5], share=s, coder="exact" if s == 0 else f"m{s}") for s in shares]
    frames[2].loc[2, "value"] = np.nan  # the third latent has no score at one level, so it counts at none
    found = list(study._noise(pd.concat(frames)))
    levels = [row["value"] for row in found if row["measure"] == "level"]
    assert levels == pytest.approx([0.95 - s for s in shares])
    assert next(row["ci_low"] for row in found if row["measure"] == "level") == pytest.approx(mean_t(np.array([1.0, 0.9])).low)
    [rho] = [row["value"] for row in found if row["measure"] == "spearman"]
    assert rho == pytest.approx(-1)
    upward = [rows_of([s, s + 0.1], share=s, coder=f"m{s}") for s in shares]
    assert [row["value"] for row in study._noise(pd.concat(upward)) if row["measure"] == "spearman"] == pytest.approx([1])


def test_four_levels_are_too_few_for_a_correlation():
    frames = [rows_of([1 - s, 0.9 - s], share=s) for s in (0.0, 0.1, 0.2, 0.3)]
    assert {row["measure"] for row in study._noise(pd.concat(frames))} == {"level"}


def test_spread_of_one_measurement_from_two():
    random = np.random.default_rng(0)
    truth, spread = random.uniform(0.6, 0.9, 4000), 0.05
    one, two = (truth + spread * random.normal(size=4000) for _ in range(2))
    keys = dict.fromkeys(study._VARIANT, "x")
    again = rows_of(two).assign(**keys)
    [found] = study._retest(rows_of(one), again, keys)
    assert found["value"] == pytest.approx(spread, rel=0.05)
    for name in study._VARIANT:
        another = rows_of(two + 0.2).assign(**{**keys, name: "y"})
        assert list(study._retest(rows_of(one), pd.concat([again, another]), keys)) == [found], name


def test_correlations_by_chance_are_those_of_shifted_predictions():
    random = np.random.default_rng(0)
    truths, answers = random.random(40), 10.0 * (random.random(40) < 0.2)
    found = study.shifted_correlations(truths, answers)
    assert found == pytest.approx([np.corrcoef(truths, np.roll(answers, k))[0, 1] for k in range(40)])
    assert found.mean() == pytest.approx(0)
    gaps = np.insert(answers, [3, 17], np.nan), np.insert(truths, [3, 17], 99.0)
    assert study.shifted_correlations(gaps[1], gaps[0]) == pytest.approx(found), "a token without an answer takes no part"


def test_a_median_of_correlations_has_its_chance_level(monkeypatch):
    """Two active tokens and one predicted elsewhere: 98 of 100 shifts miss, and the median is what a miss gives."""
    truths, answers = np.zeros((2, 100))
    truths[[3, 50]], answers[10] = 1, 10
    one = {"truth": True, "source": "positive", "truths": truths[:60], "answers": answers[:60]}
    two = {"truth": False, "source": "random", "truths": truths[60:], "answers": answers[60:]}
    other = {"truth": False, "source": "same_token", "truths": truths[:9], "answers": answers[:9] + 5}
    verdicts = pd.DataFrame([{"latent": latent, **row} for latent in range(9) for row in (one, two, other)])
    monkeypatch.setattr(study, "_predictions", lambda folder, method: verdicts)
    keys = {**dict.fromkeys(study._VARIANT, "x"), "negatives": "random", "metric": "correlation"}
    scores = rows_of([-0.1] * 9).assign(**keys, control="shuffled", scorer_id="i")
    folder = SimpleNamespace(methods=lambda stage: [SimpleNamespace(id="i")])
    [found] = study._by_chance(folder, scores)
    missed = np.corrcoef(truths, answers)[0, 1]
    assert (found["value"], found["ci_low"], found["ci_high"]) == pytest.approx((missed,) * 3) and missed < 0
    assert (found["measure"], found["negatives"], found["num_latents"]) == ("shuffled_chance", "random", 9)
    rows = [{**keys, "measure": "shuffled", "chance": 0.0}, {**keys, "scorer": "y", "measure": "shuffled", "chance": 0.5}]
    assert study._with_chance(rows, [found]) == [found]
    assert [row["chance"] for row in rows] == [found["value"], 0.5]


def test_what_names_a_variant():
    def named(*, seed=0, count=50, judge=None, embedder=None, explainer="e"):
        identity = {"scorer": "s", "settings": {}, "judge": judge, "embedder": embedder, "explainer_id": explainer}
        return study._variant(
            SimpleNamespace(identity=identity, settings={"selection": {"num_positives": count, "seed": seed}})
        )

    assert named() == named(seed=1) == named(explainer="f"), "the repeated measurement is of the same variant"
    assert len({named(), named(count=10), named(judge={"model": "m"}), named(embedder="a"), named(embedder="b")}) == 5


def test_probabilities_are_held_against_each_source_of_negatives_apart(monkeypatch):
    # (source, active, probability): one positive right and one wrong, random negatives right, same-token ones half and half.
    rows = [("positive", True, 1.0), ("positive", True, 0.0), *[("random", False, 0.0)] * 6,
            ("same_token", False, 1.0), ("same_token", False, 0.25)]  # fmt: skip
    verdicts = pd.DataFrame(rows, columns=["source", "truth", "probability"]).assign(
        coder="exact", scorer_id="i", control=None, status="ok", latent=0
    )
    # A latent that has none of a source takes no part there.
    alone = verdicts.iloc[:3].assign(latent=1)
    verdicts = pd.concat([verdicts, alone[alone["truth"]]], ignore_index=True)
    monkeypatch.setattr(study, "load_verdicts", lambda path, columns: verdicts[columns])
    kept = rows_of([1.0]).assign(scorer_id="i", scorer="s", judge="j", prompt="-", variant="v")
    found = study._probabilities(SimpleNamespace(path="x"), kept)
    assert {(row["negatives"], row["measure"]): row["value"] for row in found} == {
        ("random", "calibration_error"): pytest.approx(1 / 8),
        ("random", "brier"): pytest.approx(1 / 8),
        # Bins of 0 (one positive), 0.25 and 1 (a positive and a negative).
        ("same_token", "calibration_error"): pytest.approx((1 + 0.25 + 1) / 4),
        ("same_token", "brier"): pytest.approx((0 + 1 + 1 + 0.0625) / 4),
    }
    assert [row["chance"] for row in found if row["measure"] == "brier"] == [0.25 * 0.75, 0.25]


def test_tables_have_a_row_per_variant_and_the_lesson_is_there():
    shared = {
        "scorer": "detection",
        "judge": "rule",
        "prompt": "-",
        "variant": "v",
        "metric": "balanced_accuracy",
        "num_latents": 8,
    }
    rows = []
    for negatives, value in (("random", 0.5), ("same_token", 1.0)):
        one = {**shared, "negatives": negatives, "measure": "auroc", "role": "too_broad", "ci_low": 0.4, "ci_high": 1.0}
        rows += [{**one, "family": family, "value": value} for family in ("all", "topic")]
        rows.append({**shared, "negatives": negatives, "measure": "shuffled", "value": 0.5, "chance": 0.5})
    found = study.sections(pd.DataFrame(rows, columns=study.COLUMNS))
    lesson = next(section for section in found if "topic" in section.title)
    assert [row[4] for row in lesson.rows[1:]] == ["random", "same_token"]
    assert [row[-1] for row in lesson.rows[1:]] == ["0.500 [0.400, 1.000]", "1.000 [0.400, 1.000]"]
    again = [{**row, "variant": "w"} for row in rows]
    twins = study.sections(pd.DataFrame([*rows, *again], columns=study.COLUMNS))
    assert [row[3] for row in twins[0].rows] == ["variant", "v", "v", "w", "w"]
    text, markdown = study.text_of(found), study.markdown_of(found)
    assert text.count("same_token") == markdown.count("same_token") >= 3
