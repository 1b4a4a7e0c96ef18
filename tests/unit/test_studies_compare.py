"""Differences between methods: pairs, intervals, and what is never paired."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from autointerp import tables
from autointerp.digest import digest, short
from autointerp.errors import ConfigError, InputError
from autointerp.records import Score
from autointerp.results.folder import Method, ResultsFolder
from autointerp.stats import holm, paired_difference, welch_difference
from autointerp.studies.compare import Side, compare, comparison_table


def test_paired_and_welch_against_scipy():
    random = np.random.default_rng(0)
    a, b, c = random.normal(0.7, 0.1, 30), random.normal(0.6, 0.2, 30), random.normal(0.6, 0.3, 12)
    found, expected = paired_difference(a, b), scipy_stats.ttest_rel(a, b)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.interval.low, found.interval.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    found, expected = welch_difference(a, c), scipy_stats.ttest_ind(a, c, equal_var=False)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.interval.low, found.interval.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_differences_at_the_edges():
    assert paired_difference([0.5, 0.6], [0.5, 0.6]).p == 1
    assert paired_difference([0.75, 0.5], [0.5, 0.25]).p == 0
    assert math.isnan(paired_difference([0.5], [0.4]).p) and math.isnan(welch_difference([0.5], [0.4, 0.3]).interval.low)
    assert welch_difference([1.0, 1.0], [1.0, 1.0]).p == 1
    with pytest.raises(ValueError, match="a pair for each latent"):
        paired_difference([1.0], [1.0, 2.0])


def test_holm_by_hand():
    # Holm (1979): 0.01 * 4, 0.02 * 3, 0.03 * 2 = 0.06, 0.5 * 1; never decreasing.
    assert holm([0.5, 0.01, math.nan, 0.03, 0.02]) == pytest.approx([0.5, 0.04, math.nan, 0.06, 0.06], nan_ok=True)
    assert holm([0.6, 0.7]) == pytest.approx([1, 1])


VALUES = np.random.default_rng(1).uniform(0.5, 1, 40)


def write(
    path,
    explainer,
    values,
    *,
    coder="sae",
    coder_id="sae-1",
    control=None,
    judge="rule",
    selection="s",
    scorer="detection",
    label=None,
    of=None,
    **settings,
):
    """Add the scores of one method to a results folder and return it; latent i has value i, None has no score.

    `explainer` is its name, `label` its folder's; `of`: the method that this is a control of.
    """
    folder = ResultsFolder.create(path, store_id="store", provenance={"store": "x"})
    folder.register_coder(coder, coder_id)
    label = label or f"{explainer}-{short(digest(explainer))}"
    identity = {"explainer": label, "control": control, "of": of and of.id, "judge": judge, "scorer": scorer}
    identity |= {"settings": {"prompt": None, **settings}}
    method = Method(
        stage="score",
        name=scorer,
        identity=identity,
        model=judge,
        control=control,
        control_of=of and of.id,
        explainer=label,
    )
    folder.register(method)
    rows = [
        Score(
            coder=coder, latent=i, explanation_id="e", scorer=scorer, scorer_id=method.id, base_id=method.base_id, selection_id=selection, control=control,
            judge=judge, explainer=explainer, metric="balanced_accuracy", is_headline=True, negatives="random", quantile=None,
            status="ok" if value is not None else "undefined", value=value, ci_low=None, ci_high=None, ci_method="none", chance=0.5,
            disjoint="document", num_scored=10,
        )
        for i, value in enumerate(values)
    ]  # fmt: skip
    file = folder.table("scores", method, len(coder) + ord(coder[-1]))
    file.parent.mkdir(parents=True, exist_ok=True)
    tables.write_parquet(file, tables.scores_table(rows))
    return method


def test_two_explainers_on_the_same_latents(tmp_path):
    shift = 0.1 + 0.01 * (np.arange(40) % 2)
    write(tmp_path, "a", VALUES.tolist())
    write(tmp_path, "b", [*(VALUES - shift).tolist()[:30], *[None] * 10])
    [row] = compare(f"{tmp_path}:explainer=a", ":explainer=b").to_dict("records")
    assert (row["num_first"], row["num_second"], row["num_pairs"]) == (40, 30, 30)
    assert row["difference"] == pytest.approx(shift[:30].mean()) and row["wins"] == 1
    expected = scipy_stats.ttest_1samp(shift[:30], 0)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert row["mean_first"] == pytest.approx(VALUES[:30].mean()), "means are over the pairs"
    assert (row["first"], row["second"]) == ("a", "b") and row["same_examples"] is True
    assert "only one side scored are left out" in comparison_table(compare(f"{tmp_path}:explainer=a", ":explainer=b"))


def test_control_and_judges(tmp_path):
    write(tmp_path, "a", VALUES.tolist())
    write(tmp_path, "a", [0.5] * 40, control="shuffled")
    write(tmp_path, "a", (VALUES + 0.01).tolist(), judge="big", selection="other")
    [row] = compare(f"{tmp_path}:judge=rule", ":control=shuffled").to_dict("records")
    assert row["difference"] == pytest.approx(VALUES.mean() - 0.5) and (row["first"], row["second"]) == ("none", "shuffled")
    frame = compare(f"{tmp_path}:judge=big", ":judge=rule")
    assert frame["difference"].tolist() == pytest.approx([0.01])
    assert "other examples" in comparison_table(frame)


def test_coders_of_one_name_are_not_the_same_coder(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write(one, "a", VALUES.tolist())
    write(two, "a", VALUES.tolist()[:20], coder_id="sae-2")
    [row] = compare(str(one), str(two)).to_dict("records")
    assert row["num_pairs"] == 0 and row["ci_method"] == "welch" and row["wins"] is None
    expected = scipy_stats.ttest_ind(VALUES, VALUES[:20], equal_var=False)
    assert row["p"] == pytest.approx(expected.pvalue)
    assert "no latent in common" in comparison_table(compare(str(one), str(two)))


def test_what_both_sides_hold_is_held_equal(tmp_path):
    for explainer in ("a", "b"):
        for coder in ("x", "y"):
            write(tmp_path, explainer, VALUES.tolist(), coder=coder, coder_id=coder)
    frame = compare(f"{tmp_path}:explainer=a", ":explainer=b")
    assert frame["num_pairs"].tolist() == [40, 40]
    assert frame["p_holm"].tolist() == [1, 1]
    assert "2 comparisons: p is adjusted by Holm's method" in comparison_table(frame)


def test_sides_are_read_and_refused_with_a_sentence(tmp_path):
    write(tmp_path, "a", VALUES.tolist())
    assert Side.parse("results/x:explainer=a,coder=b:c").only == {"explainer": "a", "coder": "b:c"}
    assert str(Side.parse("results/x:y").folder) == "results/x:y"
    with pytest.raises(ConfigError, match="did you mean 'explainer'"):
        Side.parse("r:explaner=a")
    with pytest.raises(ConfigError, match="names no results folder"):
        Side.parse(":explainer=a")
    with pytest.raises(InputError, match=r"with explainer = 'zzz'; known: a$"):
        compare(f"{tmp_path}:explainer=zzz", str(tmp_path))
    with pytest.raises(InputError, match="the two sides are the same"):
        compare(str(tmp_path), str(tmp_path))


def test_explainers_of_one_name_are_chosen_by_their_folder_names(tmp_path):
    for label, shift in (("lexical-8ce2ea75", 0.0), ("lexical-be8c7d3d", -0.1)):
        for scorer in ("detection", "fuzzing"):
            write(tmp_path, "lexical", (VALUES + shift).tolist(), label=label, scorer=scorer)
    frame = compare(f"{tmp_path}:explainer=lexical-8ce2ea75", ":explainer=lexical-be8c7d3d")
    assert frame[["scorer", "first", "second", "num_pairs"]].to_numpy().tolist() == [
        ["detection", "lexical-8ce2ea75", "lexical-be8c7d3d", 40],
        ["fuzzing", "lexical-8ce2ea75", "lexical-be8c7d3d", 40],
    ]
    assert frame["difference"].tolist() == pytest.approx([0.1, 0.1])
    # The name alone is both, and a side may hold both.
    assert len(compare(f"{tmp_path}:explainer=lexical", ":explainer=lexical-be8c7d3d")) == 2
    with pytest.raises(InputError, match="has no scores with explainer = 'lexical-8ce2ea7'; did you mean 'lexical-8ce2ea75'"):
        compare(f"{tmp_path}:explainer=lexical-8ce2ea7", str(tmp_path))


def test_a_folder_beside_itself_gives_each_pair_once(tmp_path):
    for label in ("lexical-8ce2ea75", "lexical-be8c7d3d"):
        for strictness in (0.3, 0.95):
            write(tmp_path, "lexical", (VALUES + strictness * len(label)).tolist(), label=label, strictness=strictness)
    frame = compare(str(tmp_path), str(tmp_path))
    # Of six pairs of the four, those that differ in the explainer alone (2) or the scorer's settings alone (2).
    assert len(frame) == 4 and len({frozenset(pair) for pair in zip(frame["first"], frame["second"], strict=True)}) == 4
    assert frame["p_holm"].tolist() == pytest.approx(holm(frame["p"].to_numpy()).tolist())


def test_settings_are_held_equal_and_rows_say_which(tmp_path):
    ids = {}
    for explainer, shift in (("a", 0.0), ("b", 0.1)):
        for strictness in (0.3, 0.95):
            for judge in ("rule", "big"):
                values = (VALUES - shift - strictness / 10).tolist()
                ids[explainer, strictness, judge] = short(
                    write(tmp_path, explainer, values, judge=judge, strictness=strictness).id
                )
    frame = compare(f"{tmp_path}:explainer=a", ":explainer=b")
    assert frame["difference"].tolist() == pytest.approx([0.1] * 4)
    wanted = {tuple(f"{e} {judge} {ids[e, s, judge]}" for e in "ab") for s in (0.3, 0.95) for judge in ("rule", "big")}
    assert set(zip(frame["first"], frame["second"], strict=True)) == wanted
    first, second = ids["a", 0.3, "big"], ids["a", 0.95, "big"]
    [row] = compare(f"{tmp_path}:scorer_id={first}", f":scorer_id={second}").to_dict("records")
    assert (row["first"], row["second"]) == (first, second) and row["difference"] == pytest.approx(0.065)


def test_a_score_is_beside_its_own_control(tmp_path):
    ids = []
    for strictness, judge in ((0.3, "big"), (0.95, "big"), (0.3, "small")):
        own = write(tmp_path, "a", (VALUES + strictness).tolist(), judge=judge, strictness=strictness)
        write(tmp_path, "a", [strictness] * 40, control="shuffled", of=own, judge=judge, strictness=strictness)
        # Rules judge this one, with settings that say so.
        write(tmp_path, "a", (VALUES / 2 + strictness).tolist(), control="lexical", of=own, judge="rule", by=judge)
        ids.append(short(own.id))
    write(tmp_path, "lexical", VALUES.tolist(), judge="big")  # has no lexical control
    frame = compare(f"{tmp_path}:explainer=a", ":control=shuffled")
    assert frame["difference"].tolist() == pytest.approx([VALUES.mean()] * 3)
    for side, num in (("", 3), (":judge=big", 2), (f":scorer_id={ids[1]}", 1)):
        frame = compare(f"{tmp_path}{side}", ":control=lexical")
        assert frame["difference"].tolist() == pytest.approx([VALUES.mean() / 2] * num)
