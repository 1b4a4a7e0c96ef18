"""The calibration study from planting to page, on part of the latents: what the scorers must show."""

import pandas as pd
import pytest

from autointerp.errors import ConfigError
from autointerp.llm.settings import EngineConfig
from autointerp.results.load import load_explanations, load_scores
from autointerp.store import open_store, verify_store
from autointerp.studies.calibrate import CalibrateConfig, calibrate, chosen_latents, plan_calibration
from autointerp.studies.calibration import FILE, sections, write_calibration
from autointerp.studies.plant import EXACT, LEVELS
from autointerp.studies.planted import ORIGIN, ROLES, planted_in

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("calibrate")]  # one study for all of them


BY_RULE = {"detection", "fuzzing", "simulation", "saebench", "delphi_detection", "delphi_fuzzing"}


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
    assert set(found["scorer"]) == BY_RULE
    assert set(found["negatives"]) == {"random", "same_token", "neighbour_cooccurrence"}
    assert (found["value"] >= 0.99).all(), found[["scorer", "negatives", "value"]]
    same = measure(study[2], "auroc", role="paraphrase", family="all")["value"]
    assert (same == 0.5).all(), "a paraphrase has the same rule"


def test_scores_fall_with_noise(study):
    found = measure(study[2], "spearman", noise="moved")
    assert set(found["scorer"]) == BY_RULE and (found["value"] <= -0.9).all()
    levels = measure(study[2], "level", noise="moved", negatives="random")
    assert levels.groupby("scorer")["share"].nunique().min() >= 6


def test_another_latents_explanation_is_worth_chance(study):
    found = measure(study[2], "shuffled", negatives="random")
    assert set(found["scorer"]) == BY_RULE
    assert ((found["value"] - found["chance"]).abs() < 0.03).all()
    classifiers = found[found["scorer"] != "simulation"]
    assert ((classifiers["ci_low"] <= classifiers["chance"]) & (classifiers["chance"] <= classifiers["ci_high"])).all()
    # Correlations of rare events are skewed, so by chance their median is below 0. It is lower still where rules exclude each
    # other, as those of different words do: docs/calibrate.md says by how much.
    [by_chance] = measure(study[2], "shuffled_chance", scorer="simulation", negatives="random").to_dict("records")
    [median] = found[found["scorer"] == "simulation"].to_dict("records")
    assert (
        -0.02 < by_chance["ci_low"] < by_chance["value"] < by_chance["ci_high"] < 0 and median["chance"] == by_chance["value"]
    )
    assert abs(median["value"] - by_chance["value"]) < 0.01


def test_a_latents_own_interval_holds_chance_under_another_latents_explanation(study):
    scores = load_scores(study[0].results)
    rows = scores[scores["is_headline"] & (scores["status"] == "ok") & (scores["coder"] == EXACT)]
    rows = rows[(rows["control"] == "shuffled").fillna(False) & rows["ci_low"].notna()]
    rows = rows.assign(holds=(rows["ci_low"] <= rows["chance"] + 1e-9) & (rows["chance"] - 1e-9 <= rows["ci_high"]))
    held = rows[rows["negatives"] == "random"].groupby("scorer")["holds"].agg(["mean", "count"])
    assert set(held.index) == BY_RULE and (held["mean"] > 0.8).all() and (held["count"] >= 8).all(), held


def test_wrong_explanations_that_hold_nowhere_count(study):
    found = measure(study[2], "auroc", scorer="simulation", role="wrong", family="all", negatives="random")
    [same] = measure(study[2], "auroc", scorer="detection", role="wrong", family="all", negatives="random")["num_latents"]
    assert found["num_undefined"].tolist() != [0] and found["num_latents"].tolist() == [same]


def test_a_topic_is_told_from_the_truth_by_hard_negatives_only(study):
    def of(scorer, negatives, column="value"):
        [value] = measure(study[2], "auroc", scorer=scorer, role="too_broad", family="topic", negatives=negatives)[column]
        return value

    for scorer in ("detection", "delphi_detection", "fuzzing", "delphi_fuzzing", "saebench"):
        assert of(scorer, "random", "ci_low") < 0.5
    assert of("detection", "random") <= 0.65
    for scorer in ("detection", "delphi_detection"):
        assert of(scorer, "same_token") >= 0.9 and of(scorer, "neighbour_cooccurrence") >= 0.9
    # Highlights of a silent window say nothing of a topic, unless they are where the neighbour fires.
    assert of("fuzzing", "same_token", "ci_low") < 0.5 and of("fuzzing", "neighbour_cooccurrence") >= 0.9
    lesson = next(section for section in sections(study[2]) if section.title.startswith("The topic alone"))
    assert {(row[0], row[4]) for row in lesson.rows[1:]} >= {
        ("detection", negatives) for negatives in ("random", "same_token", "neighbour_cooccurrence")
    }


def test_what_is_measured_of_every_scorer_and_judge(study):
    frame = study[2]
    for scorer in BY_RULE:
        of_scorer = frame[frame["scorer"] == scorer]
        assert set(of_scorer["measure"]) >= {"auroc", "wins", "level", "spearman", "shuffled", "shuffled_mean", "tokens"}
        for name in ("auroc", "wins"):
            assert set(measure(of_scorer, name, family="all")["role"]) == set(ROLES) - {"true"}
        states_probabilities = set(of_scorer["measure"]) >= {"calibration_error", "brier"}
        assert states_probabilities == (scorer != "simulation")
        for name in ("calibration_error", "brier") if states_probabilities else ():
            assert set(measure(of_scorer, name)["negatives"]) == set(measure(of_scorer, "auroc")["negatives"])


def test_the_table_and_the_page_are_written(study):
    _, _, frame, page = study
    pd.testing.assert_frame_equal(pd.read_parquet(page.with_name(FILE)), frame, check_dtype=False)
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 6 and "same_token" in text and "style=" not in text


def test_a_second_call_has_nothing_to_do(study):
    config, _, frame, _ = study
    assert sum(report.num_latents for report in calibrate(config)) == 0
    again, _ = write_calibration(config.results)
    pd.testing.assert_frame_equal(again, frame)
    assert EXACT in open_store(config.store).coder_names


def test_a_judge_that_always_says_yes_ranks_nothing(study, caplog):
    config = study[0].model_copy(
        update={
            "scorers": ("detection",), "engine": "tests.judges:AlwaysYes", "with_noise": False,
            "latents": study[0].latents[:4], "results": study[0].results.with_name("judged"),
        }
    )  # fmt: skip
    [answers, labels] = plan_calibration(config)
    assert (answers.scorer, labels.scorer) == ("detection", "detection, labels")
    assert load_explanations(config.results).query("status == 'ok'")["explainer"].nunique() == len(ROLES)
    assert not len(load_scores(config.results)), "a plan asks nobody"
    with caplog.at_level("INFO", logger="autointerp.studies"):
        reports = calibrate(config)
    said = next(record.message for record in caplog.records if "the judge has" in record.message)
    sent = sum(report.num_sent for report in reports)
    assert answers.requests.value + labels.requests.value == sent > 0 and f"left: {sent:,} requests" in said
    # A request per example of the four true explanations, of fewer sources where one has none.
    assert labels.num_explanations == 4 and 4 * 100 <= labels.requests.value <= 4 * 200
    assert all(report.exit_code == 0 for report in reports)
    assert [price.sentence() for price in plan_calibration(config)] == ["the judge has nothing left to do"] * 2
    frame, _ = write_calibration(config.results)
    found = measure(frame, "auroc", judge="always-yes", family="all")
    assert set(found["role"]) == set(ROLES) - {"true"} and (found["value"] == 0.5).all()
    assert set(measure(frame, "auroc", scorer="detection")["judge"]) == {"rule", "always-yes"}
    # Right of the positives, certain and wrong of the negatives: both measures are the share of negatives, source by source.
    error, brier = (measure(frame, name, judge="always-yes").set_index("negatives") for name in ("calibration_error", "brier"))
    assert len(brier) == 3 and error["value"].to_dict() == pytest.approx(brier["value"].to_dict())
    assert (brier["value"] * (1 - brier["value"])).to_dict() == pytest.approx(brier["chance"].to_dict())
    assert brier["value"]["random"] == pytest.approx(0.5, abs=0.05)
    tokens = measure(frame, "tokens", judge="always-yes")["value"]
    assert len(tokens) == 2 and (tokens > 1000).all() and (measure(frame, "tokens", judge="rule")["value"] == 0).all()
    assert measure(frame, "auroc", judge="always-yes")["prompt"].str.fullmatch(r"[0-9a-f]{8}").all()


def test_a_limit_is_one_of_the_whole_study(study):
    config = study[0].model_copy(
        update={
            "scorers": ("detection",), "engine": "tests.judges:AlwaysYes", "with_noise": False, "with_probabilities": False,
            "latents": study[0].latents[:1], "results": study[0].results.with_name("limited"),
            "engine_options": EngineConfig(max_requests=50),
        }
    )  # fmt: skip
    reports = calibrate(config)
    assert sum(report.num_sent for report in reports) == 50 and reports[-1].stop.kind == "budget"


def test_the_spread_is_of_one_embedder(study):
    """Two embedders in one folder have nothing to do with each other's repeated measurement."""
    config = study[0].model_copy(
        update={
            "scorers": ("embedding",), "with_noise": False, "with_retest": True, "latents": study[0].latents[:4],
            "results": study[0].results.with_name("embedded"),
        }
    )  # fmt: skip

    def spread(embedder):
        calibrate(config.model_copy(update={"embedder": f"tests.judges:{embedder}"}))
        frame, _ = write_calibration(config.results)
        return measure(frame, "retest_sd").set_index(["judge", "negatives"])["value"]

    alone = spread("Constant")
    assert (alone == 0).all()
    both = spread("Hashed")
    assert (both["constant"] == 0).all() and (both["hashed"] > 0).all()


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
