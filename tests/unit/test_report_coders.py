"""Coders side by side: every figure against pandas and scipy, and the same figures as text, files and page."""

import re

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_ind, ttest_rel

from autointerp.reports import svg, write_report
from autointerp.reports.coders import FILES, WIDTH, coders_frame, coders_table
from autointerp.reports.source import Source
from autointerp.reports.summary import overview
from tests.report_folder import build

NUM = 20


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Three coders, the second a control of the first; what is kept is the default explainer's."""
    folder = tmp_path_factory.mktemp("results") / "r"
    build(folder, coders=("sae", "sae-random", "transcoder"), num_latents=NUM, num_shards=2, windows=8)
    for path in (folder / "plan").glob("*.parquet"):
        frame = pd.read_parquet(path)
        frame.assign(control_of=np.where(frame["coder"] == "sae-random", "sae", None)).to_parquet(path, index=False)
    return folder


@pytest.fixture(scope="module")
def frame(results):
    return coders_frame(overview(Source(results)))


def headline(results, coder, scorer, control=None, explainer="default"):
    files = sorted(results.glob(f"scores/{explainer}-*/{scorer}-*/*.parquet"))
    rows = pd.concat([pd.read_parquet(path) for path in files])
    rows = rows[rows["is_headline"] & (rows["coder"] == coder) & rows["quantile"].isna()]
    rows = rows[rows["control"].isna() if control is None else rows["control"] == control]
    return rows.set_index("latent")["value"].dropna().sort_index()


def row_of(frame, coder, scorer, explainer="default"):
    [row] = frame[(frame["coder"] == coder) & (frame["scorer"] == scorer) & (frame["explainer"] == explainer)].to_dict(
        "records"
    )
    return row


def test_a_row_for_each_coder_and_scorer_with_the_control_below_its_coder(frame):
    assert list(dict.fromkeys(frame["coder"])) == ["sae", "sae-random", "transcoder"]
    assert len(frame) == 3 * 4 and frame["series"].nunique() == 4
    assert set(frame["control_of"].dropna()) == {"sae"} and frame["chance"].eq(0.5).all()


@pytest.mark.parametrize("coder", ["sae", "sae-random", "transcoder"])
@pytest.mark.parametrize("scorer", ["detection", "fuzzing"])
def test_medians_coverage_and_paired_lifts(results, frame, coder, scorer):
    row, own = row_of(frame, coder, scorer), headline(results, coder, scorer)
    assert row["median"] == pytest.approx(own.median()) and row["mean"] == pytest.approx(own.mean())
    # One latent has too few examples, one no usable explanation, one is only planned.
    assert (row["num_scored"], row["num_planned"]) == (NUM - 3, NUM) and row["coverage"] == pytest.approx((NUM - 3) / NUM)
    assert row["ci_low"] in set(own) and row["ci_high"] in set(own)
    both = pd.concat([own, headline(results, coder, scorer, "shuffled")], axis=1, keys=["a", "b"]).dropna()
    wanted = ttest_rel(both["a"], both["b"]).confidence_interval()
    assert row["over_shuffled"] == pytest.approx((both["a"] - both["b"]).mean())
    assert (row["over_shuffled_low"], row["over_shuffled_high"]) == pytest.approx((wanted.low, wanted.high))
    assert row["over_shuffled_method"] == "t_paired" and row["over_shuffled_num"] == len(both)


def test_a_coder_is_compared_with_its_own_control_as_two_samples(results, frame):
    row = row_of(frame, "sae", "detection")
    own, theirs = headline(results, "sae", "detection"), headline(results, "sae-random", "detection")
    wanted = ttest_ind(own, theirs, equal_var=False).confidence_interval()
    assert row["over_random"] == pytest.approx(own.mean() - theirs.mean())
    assert (row["over_random_low"], row["over_random_high"]) == pytest.approx((wanted.low, wanted.high))
    assert row["over_random_method"] == "welch" and row["over_random_num"] == NUM - 3
    others = frame[frame["coder"] != "sae"]
    assert others["over_random"].isna().all()


def test_the_terminal_shows_rows_of_coders_and_columns_of_scorers(results, frame):
    text = coders_table(results)
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert (
        "detection default" in lines[0]
        and lines[2].startswith("chance")
        and lines[2].split()[1:] == ["0.500"] * len(re.findall("detection|fuzzing", lines[0]))
    )
    row = row_of(frame, "sae", "detection")
    assert f"{row['median']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]" in text
    assert f"{row['over_random']:+.3f} [{row['over_random_low']:.3f}, {row['over_random_high']:.3f}]" in text
    heads = [line for line in lines if line.startswith("coder")]
    # Four scorers do not fit beside each other, and each block says of every coder what it has.
    assert len(heads) >= 1 and sum("17 of 20" in line for line in lines) == 3 * len(heads)
    assert sum("over random" in line for line in lines) == len(heads)


def test_the_page_and_the_files_say_the_same(results, frame):
    page = write_report(results)
    saved = pd.read_parquet(page.with_name(FILES[0]))
    pd.testing.assert_frame_equal(saved, frame, check_dtype=False)
    pd.testing.assert_frame_equal(pd.read_csv(page.with_name(FILES[1])), frame, check_dtype=False)
    html = page.read_text(encoding="utf-8")
    section = html[html.index('id="h-coders"') : html.index('id="h-scores"')]
    assert (
        section.count("<svg") == 4
        and "over random" in section
        and f"{row_of(frame, 'sae', 'detection')['median']:.3f}" in section
    )
    assert all(f'href="{name}"' in section for name in FILES)


def test_one_coder_alone_is_beside_nothing(tmp_path):
    build(tmp_path / "r", coders=("sae",), num_latents=6, num_shards=1, windows=4)
    page = write_report(tmp_path / "r")
    assert 'id="h-coders"' not in page.read_text(encoding="utf-8") and not page.with_name(FILES[0]).exists()
    assert coders_table(tmp_path / "r").startswith("coder")


def test_a_folder_without_scores_says_so(tmp_path):
    build(tmp_path / "r", coders=("sae",), num_latents=3, num_shards=1, windows=4)
    for path in (tmp_path / "r" / "scores").rglob("*.parquet"):
        path.unlink()
    assert coders_table(tmp_path / "r") == "nothing is scored in this folder yet\n"


def test_a_series_without_any_value_is_no_column(results, frame, tmp_path):
    """What a scorer says of a latent it cannot grade has no source of negatives, and would look like one more scorer."""
    build(tmp_path / "r", coders=("sae", "transcoder"), num_latents=6, num_shards=1, windows=4)
    [path] = (tmp_path / "r" / "scores").glob("default-*/detection-[0-9a-f]*/*.parquet")
    rows = pd.read_parquet(path)
    lost = (rows["latent"] == rows["latent"].max()) & rows["is_headline"]
    rows.loc[lost, ["negatives", "status", "value", "ci_low", "ci_high"]] = ["none", "not_applicable", None, None, None]
    rows.to_parquet(path, index=False)
    found = overview(Source(tmp_path / "r"))
    assert len(found.series) == 5
    assert set(coders_frame(found)["series"]) == set(frame["series"])


def test_marks_stand_where_the_axis_says():
    marks = [
        svg.Mark(name="<sae>", value=0.75, low=0.7, high=0.8, control=0.5),
        svg.Mark(name="a" * 40, value=0.5, low=None, high=None, control=None, is_inner=True),
    ]
    drawn = svg.marks_plot(marks, chance=0.5, label="x")
    # The axis goes from 0.5 to 0.8 over 236 units from 150 on.
    assert f'cx="{150 + 236 * 0.25 / 0.3:.1f}"' in drawn and 'cx="150"' in drawn and drawn.count('class="ci"') == 1
    assert "&lt;sae&gt;: 0.750, interval 0.700 to 0.800, control 0.500" in drawn and "<sae>" not in drawn
    assert "a" * 21 + "\u2026" in drawn and drawn.count('class="control"') == 1
