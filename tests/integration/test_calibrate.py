"""The calibration study from planting to page, on part of the latents: what the scorers must show."""

import pandas as pd
import pytest

from autointerp.errors import ConfigError
from autointerp.results.load import load_explanations, load_scores
from autointerp.store import open_store, verify_store
from autointerp.studies.calibrate import CalibrateConfig, calibrate, chosen_latents
from autointerp.studies.calibration import FILE, write_calibration
from autointerp.studies.plant import EXACT, LEVELS
from autointerp.studies.planted import ORIGIN, ROLES, planted_in

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("calibrate")]  # one study for all of them


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    config = {"store": folder / "store", "results": folder / "results", "num_tokens": 262_144, "with_retest": False}
    names = ["token-0", "set-3", "after-0", "after-5", *(f"topic-{i}" for i in range(12)), "quoted-0", "comment-0", "place-1",
             "digits-0", "seen-1", "mixture-1", "dense-1", "noise-0"]  # fmt: skip
    from autointerp.studies.plant import plant_store

    plant_store(config["store"], num_tokens=config["num_tokens"])
    known = [latent["name"] for latent in planted_in(config["store"])["latents"]]
    config["latents"] = tuple(known.index(name) for name in names)
    reports = calibrate(CalibrateConfig(**config))
    frame, page = write_calibration(config["results"])
    return CalibrateConfig(**config), reports, frame, page


def measure(frame, name, **where):
    rows = frame[frame["measure"] == name]
    for key, value in where.items():
        rows = rows[rows[key] == value]
    return rows


def test_every_command_can_read_the_store(study):
    config, reports, _, _ = study
    assert verify_store(config.store) == []
    assert open_store(config.store).coder_names == sorted(level.coder for level in LEVELS)
    explanations = load_explanations(config.results).query("status == 'ok'")
    assert set(explanations["explainer"]) == set(ROLES) and set(explanations["origin"]) == {ORIGIN}
    assert all(report.exit_code == 0 for report in reports)


def test_a_rule_judge_ranks_true_above_wrong(study):
    found = measure(study[2], "auroc", role="wrong", family="all")
    assert {"detection", "fuzzing"} <= set(found["scorer"])
    assert (found["value"] >= 0.99).all(), found[["scorer", "negatives", "value"]]
    same = measure(study[2], "auroc", role="paraphrase", family="all")["value"]
    assert (same == 0.5).all(), "a paraphrase has the same rule"


def test_scores_fall_with_noise(study):
    found = measure(study[2], "spearman", noise="moved")
    assert len(found) >= 4 and (found["value"] <= -0.9).all()
    levels = measure(study[2], "level", noise="moved", negatives="random")
    assert levels.groupby("scorer")["share"].nunique().min() >= 6


def test_another_latents_explanation_is_worth_chance(study):
    found = measure(study[2], "shuffled", negatives="random")
    assert len(found) >= 2
    assert ((found["ci_low"] <= found["chance"]) & (found["chance"] <= found["ci_high"])).all()
    assert ((found["value"] - found["chance"]).abs() < 0.03).all()


def test_a_topic_is_told_from_the_truth_by_hard_negatives_only(study):
    def of(negatives):
        [value] = measure(study[2], "auroc", scorer="detection", role="too_broad", family="topic", negatives=negatives)["value"]
        return value

    assert of("random") <= 0.65 and of("same_token") >= 0.9


def test_the_table_and_the_page_are_written(study):
    _, _, frame, page = study
    pd.testing.assert_frame_equal(pd.read_parquet(page.with_name(FILE)), frame, check_dtype=False)
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") >= 2 and "same_token" in text and "style=" not in text


def test_a_second_call_has_nothing_to_do(study):
    config, _, frame, _ = study
    assert sum(report.num_latents for report in calibrate(config)) == 0
    again, _ = write_calibration(config.results)
    pd.testing.assert_frame_equal(again, frame)
    assert EXACT in open_store(config.store).coder_names


def test_a_judge_that_always_says_yes_ranks_nothing(study):
    config = study[0].model_copy(
        update={
            "scorers": ("detection",), "engine": "tests.judges:AlwaysYes", "with_noise": False,
            "latents": study[0].latents[:4], "negatives": ("random", "same_token"),
        }
    )  # fmt: skip
    reports = calibrate(config)
    assert all(report.exit_code == 0 for report in reports) and sum(report.num_sent for report in reports) > 0
    frame, _ = write_calibration(config.results)
    found = measure(frame, "auroc", judge="always-yes", family="all")
    assert set(found["role"]) == set(ROLES) - {"true"} and (found["value"] == 0.5).all()
    assert set(measure(frame, "auroc", scorer="detection")["judge"]) == {"rule", "always-yes"}
    [tokens] = measure(frame, "tokens", judge="always-yes")["value"]
    assert tokens > 1000 and (measure(frame, "tokens", judge="rule")["value"] == 0).all()
    assert measure(frame, "auroc", judge="always-yes")["prompt"].str.fullmatch(r"[0-9a-f]{8}").all()


def test_a_random_choice_is_the_same_at_every_level_and_in_both_measurements(study):
    config = study[0].model_copy(update={"latents": "random:5", "scorers": ("detection",)})
    chosen = chosen_latents(config)
    assert len(chosen) == 5 and chosen == chosen_latents(config)
    folder = config.results.with_name("few")
    calibrate(config.model_copy(update={"results": folder, "with_retest": True}))
    for path in (folder, folder.with_name("few-retest")):
        scores = load_scores(path)
        true = scores[(scores["explainer"] == "true") & scores["control"].isna()]
        assert set(true["coder"]) == ({level.coder for level in LEVELS} if path == folder else {EXACT})
        assert all(set(rows["latent"]) == set(chosen) for _, rows in true.groupby("coder"))
    frame, _ = write_calibration(folder)
    assert measure(frame, "retest_sd")["num_latents"].min() > 0


def test_options_for_an_unknown_scorer_are_refused(study):
    config = study[0].model_copy(update={"options": {"detecting": {}}})
    with pytest.raises(ConfigError, match="did you mean 'detection'"):
        calibrate(config)
