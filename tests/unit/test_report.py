"""The report and its text twin: what they say of a folder, and that no text in it gets out of its place."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

import autointerp
from autointerp.errors import ConfigError, InputError, StoreError
from autointerp.reports import report, svg, write_report
from autointerp.reports.index import coder_folder, coverage_rows, headline_rows, series_names, short_names
from autointerp.reports.pages import latent_page
from autointerp.reports.source import Source
from autointerp.reports.summary import Overview, Series, SeriesKey, overview, picks
from autointerp.reports.terminal import show_latent, summary_table
from autointerp.reports.text import json_for_html, level_of, one_line, visible, window_html
from tests.report_folder import HOSTILE, JUDGE, build

HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "demo <b>"
    build(folder, num_latents=10, num_shards=2)
    return folder


@pytest.fixture(scope="module")
def pages(results, tmp_path_factory):
    return write_report(results, tmp_path_factory.mktemp("out")).parent


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of the data block."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.data, self._inside = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag == "script" and dict(attrs).get("id") == "data"

    def handle_data(self, data):
        self.data += data if self._inside else ""


def page(folder, coder="sae", latent=3):
    return (folder / "latents" / coder / f"{latent}.html").read_text("utf-8")


# Text ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_hidden_characters_are_named_and_the_rest_stays(text):
    assert not HIDDEN.search(visible(text))
    assert visible("plain text\n\ttab, \u05e9\u05dc\u05d5\u05dd, \U0001f469\u200d\U0001f4bb") == (
        "plain text\n\ttab, \u05e9\u05dc\u05d5\u05dd, \U0001f469\u200d\U0001f4bb"
    )


def test_stacked_marks_are_cut():
    assert visible("a" + "\u0301" * 50 + "b") == "a" + "\u0301" * 4 + "b"


def test_one_line_shows_line_ends_and_cuts():
    assert one_line("a\r\n\tb") == "a\u2190\u21b5\u2192b"
    assert one_line("x" * 50, 10) == "x" * 7 + "..."


def test_json_cannot_end_its_script_and_survives():
    text = json_for_html({"text": HOSTILE})
    assert "<" not in text and ">" not in text and "\u2028" not in text
    assert json.loads(text) == {"text": HOSTILE}


def test_window_marks_active_tokens_only():
    html = window_html(["a<b", "", " x", "\n", "  ", "\t"], [0.0, 1.0, -2.0, 0.0, 0.0, 0.0], 2.0)
    assert html == (
        'a&lt;b<b class="a5 e" title="1"></b><b class="a10" title="-2"> x</b>'
        '<s class="n">\n</s><s class="w">  </s><s class="t">\t</s>'
    )


@pytest.mark.parametrize(("value", "level"), [(0.0, 0), (0.001, 1), (0.5, 5), (-1.0, 10), (7.0, 10)])
def test_levels(value, level):
    assert level_of(value, 1.0) == level


def test_level_without_scale_is_silent():
    assert level_of(1.0, 0.0) == 0


# Numbers ---------------------------------------------------------------------------------------------------------------


def test_headline_rows_agree_with_pandas(results):
    scores = pd.concat(pd.read_parquet(path) for path in (results / "scores").rglob("*.parquet"))
    head = scores[scores.is_headline & (scores.status == "ok")]
    rows = headline_rows(overview(Source(results)))
    assert len(rows) == 8
    for row in rows:
        judged = head[(head.coder == row["coder"]) & (head.explainer == row["explainer"]) & (head.scorer == row["scorer"])]
        own = judged[judged.control.isna()].set_index("latent").value
        other = judged[judged.control == "shuffled"].set_index("latent").value
        assert row["num_scored"] == len(own) == 7
        assert row["num_rows"] == 9
        assert row["median"].value == pytest.approx(own.median())
        assert row["control"].value == pytest.approx(other.median())
        assert row["lift"].value == pytest.approx((own - other).median())
        assert row["chance"] == 0.5
        assert row["num_unknown"] == 1
        assert row["same_model"] == (row["judge"] == JUDGE)


def test_coverage_adds_up_to_the_plan(results):
    found = overview(Source(results))
    assert found.num_latents == 20
    assert found.partners == {"sae": 1}
    for row in coverage_rows(found):
        assert row["planned"] == 10
        assert row["ok"] + sum(count for _, count in row["without"]) == 10
        assert dict(row["without"])["too_few_examples"] == 1
    assert [found.status("sae", 7 * i + 3) for i in (0, 1, 2, 9)] == ["ok", "too_few_examples", "unparseable", "planned"]


def test_series_of_other_scorers_are_told_apart():
    first = SeriesKey("default-00000000", "detection", "m", "random", "balanced_accuracy", "sha256:aaaaaaaaaa")
    assert series_names([first]) == ["detection"]
    second = SeriesKey("default-00000000", "detection", "m", "same_token", "balanced_accuracy", "sha256:aaaaaaaaaa")
    third = SeriesKey("default-00000000", "detection", "m", "random", "balanced_accuracy", "sha256:bbbbbbbbbb")
    assert series_names([first, second]) == ["detection random", "detection same_token"]
    assert series_names([first, third]) == ["detection aaaaaaaa", "detection bbbbbbbb"]
    assert short_names(["default-00000000", "default-11111111", "lexical-00000000"]) == {
        "default-00000000": "default-00000000",
        "default-11111111": "default-11111111",
        "lexical-00000000": "lexical",
    }


def test_sources_of_negatives_are_compared_on_the_latents_that_have_them_all():
    def series(values, name):
        frame = pd.DataFrame({"value": values, "status": ["ok"] * 5, "disjoint": ["document"] * 5, "control": np.nan})
        frame = frame.assign(ci_low=np.nan, ci_high=np.nan, chance=0.5, generic=np.nan, lexical=np.nan)
        return SeriesKey("default-00000000", "detection", "m", name, "auroc", "sha256:aa"), {"sae": Series(frame, None)}

    found = Overview(requested={"sae": np.arange(5)})
    found.series = dict([series([0.5, 0.6, 0.9, 0.9, 0.9], "random"), series([0.4, 0.5, np.nan, np.nan, np.nan], "same_token")])
    [random, same] = headline_rows(found)
    assert (random["median"].value, same["median"].value) == (0.9, pytest.approx(0.45))
    assert [(row["shared"]["num"], row["shared"]["num_sources"]) for row in (random, same)] == [(2, 2)] * 2
    assert [row["shared"]["median"].value for row in (random, same)] == pytest.approx([0.55, 0.45])
    # A source that no latent has any windows of shares nothing with the others; equal latents need no other median.
    found.series = dict([series([0.5, 0.6, 0.9, 0.9, 0.9], "random"), series([np.nan] * 5, "same_token")])
    assert [row["shared"] for row in headline_rows(found)] == [None, None]
    found.series = dict([series([0.5, 0.6, np.nan, 0.9, 0.9], name) for name in ("random", "same_token")])
    assert [row["shared"] for row in headline_rows(found)] == [None, None]


def test_picks_do_not_repeat(results):
    for by_coder in overview(Source(results)).series.values():
        for coder, series in by_coder.items():
            groups = picks(series, coder)
            chosen = [latent for group in groups.values() for latent in group]
            assert len(set(chosen)) == len(chosen) == 6
            values = series.frame.value
            assert values[groups["best"][0]] == values.max()
            assert values[groups["worst"][0]] == values.min()


def test_large_files_are_read_by_latent_and_give_the_same_rows(results):
    keys = [("sae", 3), ("sae", 10), ("transcoder", 17), ("sae", 24)]
    whole = dict(Source(results).latents(keys))
    parts = dict(Source(results).latents(keys, whole_file_rows=0))
    assert whole.keys() == parts.keys() == set(keys)
    for key in keys:
        for table in whole[key]:
            left = [row for row in whole[key][table] if table != "verdicts" or row["control"] is None]
            right = [row for row in parts[key][table] if table != "verdicts" or row["control"] is None]
            assert json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True, default=lambda array: array.tolist())


# Pages -----------------------------------------------------------------------------------------------------------------


def test_equal_tables_give_equal_bytes(results, pages, tmp_path):
    again = write_report(results, tmp_path / "again").parent
    names = sorted(path.relative_to(pages) for path in pages.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((pages / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_every_planned_latent_has_a_page_and_every_link_a_file(results, pages):
    assert len(list((pages / "latents").glob("*/*.html"))) == 20
    for path in pages.rglob("*.html"):
        for tag, attributes in Elements(path.read_text("utf-8")).tags:
            link = attributes.get("href") or attributes.get("src")
            if link and not link.startswith(("#", "data:")) and tag != "base":
                assert ":" not in link
                assert (path.parent / link).is_file(), (path.name, link)


def test_hostile_text_makes_no_elements(pages):
    for text in (page(pages), (pages / "index.html").read_text("utf-8")):
        elements = Elements(text)
        assert not HIDDEN.search(text)
        assert {tag for tag, _ in elements.tags} & {"img", "iframe", "object", "form"} <= {"form"}
        assert all(
            a.get("src", "").startswith(("assets/", "../../assets/")) or "id" in a for t, a in elements.tags if t == "script"
        )
        assert not [name for _, attributes in elements.tags for name in attributes if name.startswith("on") or name == "style"]
    assert "dataset.pwned" in page(pages)
    assert "{{ 7 * 7 }}" in page(pages)


def test_data_block_holds_every_latent(pages):
    data = json.loads(Elements((pages / "index.html").read_text("utf-8")).data)
    assert data["coders"] == ["sae", "transcoder"]
    assert len(data["rows"]["latent"]) == 20
    assert {len(column) for column in data["rows"].values() if column is not data["rows"]["values"]} == {20}
    assert [len(series) for series in data["rows"]["values"]] == [4] * 4
    assert data["explainers"] == ["default", "lexical"]
    assert data["has_density"] is False
    assert sorted(data["statuses"]) == ["ok", "planned", "too_few_examples", "unparseable"]


def test_page_says_what_the_reader_must_know(pages):
    text = page(pages, latent=24)
    assert "same model" in text and "pools unknown" in text and "random negatives" in text
    assert "false alarm" in text and ": missed" in text
    assert re.search(r'title="document \d+, position \d+"', text)
    assert "1 unparseable" in text
    assert "pools unknown" not in page(pages, latent=38)
    assert "No explanation: it fires in too few distinct windows" in page(pages, latent=10)
    assert "Not explained yet." in page(pages, latent=66)


def test_windows_of_each_quantile_and_pool(pages):
    text = page(pages, latent=38)
    assert re.findall(r"<h3>Quantile (\d)", text) == ["0", "1", "2", "3", "4"]
    strongest = text.split("<h3>Quantile 0")[1].split("<h3>Quantile 1")[0]
    assert strongest.count('class="pool explain"') == strongest.count('class="pool score"') == 4
    # Only scored windows have verdicts.
    explained = [part for part in strongest.split("<li ") if 'class="pool explain"' in part]
    assert not any("detection" in part for part in explained)


def test_max_examples(results, tmp_path):
    folder = write_report(results, tmp_path / "few", max_examples=5).parent
    assert page(folder, latent=38).count('class="pool explain"') == 5 + 1  # the legend has one


def test_limit_counts_what_it_leaves_out_and_stale_pages_go(results, tmp_path):
    write_report(results, tmp_path / "out")
    index = write_report(results, tmp_path / "out", limit=8)
    assert len(list((tmp_path / "out" / "latents").glob("*/*.html"))) == 8
    text = index.read_text("utf-8")
    assert "hold 8 of 20 latents" in text and "12 were left out" in text
    assert len(json.loads(Elements(text).data)["rows"]["latent"]) == 8


def test_firing_rates_where_the_table_has_them(tmp_path):
    build(tmp_path / "with", coders=("sae",), num_latents=4, num_shards=1, density=True)
    text = write_report(tmp_path / "with").read_text("utf-8")
    assert "By firing rate" in text and 'class="points"' in text
    build(tmp_path / "without", coders=("sae",), num_latents=4, num_shards=1)
    assert "By firing rate" not in write_report(tmp_path / "without").read_text("utf-8")


def test_folder_with_explanations_only(tmp_path):
    build(tmp_path / "r", coders=("sae",), num_latents=5, num_shards=1)
    for name in ("scores", "verdicts", "examples", "plan"):
        (tmp_path / "r" / name).rename(tmp_path / name)
    text = write_report(tmp_path / "r").read_text("utf-8")
    assert "Nothing is scored in this folder yet." in text
    assert "Not scored yet." in page(tmp_path / "r" / "report", latent=24)
    assert "nothing is scored" in summary_table(tmp_path / "r")


def test_half_written_files_are_skipped(tmp_path):
    build(tmp_path / "r", coders=("sae",), num_latents=4, num_shards=1)
    for table in ("scores", "verdicts", "examples", "explanations", "plan"):
        (tmp_path / "r" / table / ".tmp-1-shard-000000.parquet").write_bytes(b"PAR1 torn")
    assert write_report(tmp_path / "r").is_file()


def test_coder_names_become_folders_of_their_own():
    names = ["sae", "a/b", "a~2fb", "..", ".", "a b", "\u05d0", "a%2fb", "model.layers.2"]
    folders = [coder_folder(name) for name in names]
    assert len(set(folders)) == len(folders)
    assert all(re.fullmatch(r"[A-Za-z0-9._~-]+", name) and name.strip(".") for name in folders)
    assert folders[0] == "sae" and folders[-1] == "model.layers.2"


def test_hostile_coder_name(tmp_path):
    build(tmp_path / "r", coders=("../x<i>",), num_latents=4, num_shards=1, control=False)
    index = write_report(tmp_path / "r")
    assert len(list((index.parent / "latents").glob("*/*.html"))) == 4
    assert "<i>" not in index.read_text("utf-8")


def test_refusals(results, tmp_path):
    with pytest.raises(StoreError, match="no such folder"):
        write_report(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="holds no plan, explanations or scores"):
        write_report(tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(StoreError, match="holds other files"):
        write_report(results, tmp_path / "mine")
    with pytest.raises(StoreError, match="it is a file"):
        write_report(results, tmp_path / "mine" / "thesis.txt")
    with pytest.raises(ConfigError, match="limit = 0 cannot be used"):
        report(results, tmp_path / "out", limit=0)
    (tmp_path / "torn" / "scores").mkdir(parents=True)
    (tmp_path / "torn" / "scores" / "shard-000000.parquet").write_bytes(b"not parquet")
    with pytest.raises(StoreError, match="cannot be read as parquet"):
        write_report(tmp_path / "torn")


def test_public_name_is_the_function():
    assert autointerp.report is report


# Drawings --------------------------------------------------------------------------------------------------------------


def test_bar_places_value_chance_and_control():
    bar = svg.interval_bar(0.75, 0.5, 1.0, chance=0.5, control=0.25, width=112)
    assert 'cx="81"' in bar  # 6 + 0.75 * 100
    assert 'd="M56 9H106"' in bar
    assert 'd="M56 2V16"' in bar
    assert 'd="M31 4.5' in bar
    assert svg.interval_bar(None, None, None, chance=None, control=None).count("<path") == 1


def test_axes_fit_the_metric():
    assert svg.domain_of([0.2, None, 1.0]) == (0.0, 1.0)
    assert svg.domain_of([-0.2, 0.5]) == (-1.0, 1.0)
    assert svg.domain_of([2.5]) == (0.0, 3.0)
    assert svg.domain_of([]) == (0.0, 1.0)


def test_histogram_shares():
    drawn = svg.histogram(np.array([0.1, 0.1, 0.9]), np.zeros(0), chance=None, label="<x>")
    assert drawn.count("<rect") == 2 and "2 latents" in drawn and "&lt;x&gt;" in drawn and "<x>" not in drawn


# Terminal --------------------------------------------------------------------------------------------------------------


def test_terminal_text_has_no_control_characters(results):
    text = show_latent(results, "sae", 3)
    assert not HIDDEN.search(text.replace("\n", ""))
    assert "detection" in text and "same model" in text and "<<" in text
    coloured = show_latent(results, "sae", 3, colour=True)
    assert not HIDDEN.search(re.sub(r"\x1b\[[0-9;]*m", "", coloured).replace("\n", ""))
    assert "\x1b[48;5;" in coloured


def test_summary_table_has_a_row_per_series(results):
    lines = summary_table(results).splitlines()
    assert lines[0].split()[:4] == ["coder", "explainer", "scorer", "judge"]
    assert len([line for line in lines if "balanced_accuracy" in line]) == 8
    assert "sae: 3 of 10 latents without a score: 1 planned" in lines[-2]


def test_a_control_follows_the_coder_it_is_of():
    names = ["a", "b", "b-random", "a2", "z-of-a"]
    found = Overview(requested=dict.fromkeys(names), control_of={"b-random": "b", "z-of-a": "a"})
    assert found.coders == ["a", "z-of-a", "a2", "b", "b-random"]


def test_unknown_latents_are_answered_with_what_there_is(results):
    with pytest.raises(InputError, match="has no coder 'sea'; coders: sae, transcoder"):
        show_latent(results, "sea", 3)
    with pytest.raises(InputError, match="has no rows of sae/4; it holds 10 latents"):
        show_latent(results, "sae", 4)
    with pytest.raises(InputError, match=r"planned .* and not explained yet"):
        show_latent(results, "sae", 66)


def test_windows_the_explainer_saw_carry_no_verdict():
    shared = {"selection_id": "s", "source": "positive", "quantile": 0, "position": 7, "document": 1, "disjoint": "unknown"}
    window = {**shared, "pieces": ["a"], "activations": [1.0]}
    verdict = {
        "explanation_id": "e", "scorer": "detection", "scorer_id": "d", "control": None, "example_idx": 0, "position": 7,
        "source": "positive", "quantile": 0, "truth": True, "answer": False, "probability": 0.25, "status": "ok",
    }  # fmt: skip
    rows = {
        "explanations": [],
        "scores": [],
        "verdicts": [verdict],
        "examples": [{**window, "pool": "explain"}, {**window, "pool": "score"}],
    }
    explain, score = latent_page("sae", 1, rows).quantiles[0]["windows"]
    assert explain.marks == () and explain.wrong == ""
    assert [mark.kind for mark in score.marks] == ["miss"] and score.wrong == "miss"
    assert "probability 0.25" in score.marks[0].title


@pytest.fixture
def with_floors(tmp_path):
    """A folder whose detection scores were also judged under the generic control, and by rule under the lexical one."""
    folder = tmp_path / "r"
    build(folder, coders=("sae",), num_latents=20, num_shards=2, windows=4, density=True)
    for path in sorted(folder.glob("scores/default-*/detection-shuffled-*/*.parquet")):
        table = pd.read_parquet(path)
        for control, value, judge in (("generic", 0.5, None), ("lexical", 0.6, "rule")):
            some = table[table["latent"] < 60].assign(control=control, value=value)
            place = path.parent.with_name(f"detection-{control}-00000000") / path.name
            place.parent.mkdir(exist_ok=True)
            (some if judge is None else some.assign(judge=judge)).to_parquet(place, index=False)
    return folder


def test_floors_are_paired_with_their_series_and_apart_from_the_main_control(with_floors):
    rows = headline_rows(overview(Source(with_floors)), plots=False)
    [row] = [row for row in rows if row["scorer"] == "detection" and row["explainer"] == "default"]
    others = [other for other in rows if other is not row]
    assert row["control_name"] == "shuffled" and all(not other["floors"] for other in others)
    frame = pd.concat(pd.read_parquet(p) for p in with_floors.glob("scores/default-*/detection-*/*.parquet"))
    frame = frame[frame["is_headline"] & frame["quantile"].isna()].set_index("latent")
    own = frame[frame["control"].isna()]["value"].dropna()
    for floor, level in zip(row["floors"], (0.5, 0.6), strict=True):
        among = own[own.index < 60]
        assert floor["num"] == len(among) and floor["lift"].value == pytest.approx((among - level).median())
    density = pd.concat(pd.read_parquet(p) for p in with_floors.glob("explanations/default-*/*.parquet")).set_index("latent")
    rates = density["density"].reindex(own.index)
    assert row["weighted"].value == pytest.approx((own * rates).sum() / rates.sum())
    assert row["mean"].value == pytest.approx(own.mean())


@pytest.fixture
def with_two_settings(with_floors):
    """The same folder, whose detection was also run with other settings: of its own scores and controls, each 0.2 higher."""
    for path in sorted(with_floors.glob("scores/default-*/detection-*/*.parquet")):
        table = pd.read_parquet(path)
        other = table.assign(
            value=table["value"] + 0.2,
            scorer_id=table["scorer_id"].str.replace("sha256:", "sha256:ffff"),
            base_id=table["base_id"].str.replace("sha256:", "sha256:ffff"),
        )
        place = path.parent.with_name(f"{path.parent.name[:-8]}ffff0000") / path.name
        place.parent.mkdir(exist_ok=True)
        other.to_parquet(place, index=False)
    return with_floors


def test_controls_of_other_settings_are_not_mixed(with_two_settings):
    found = overview(Source(with_two_settings))
    series = {
        key.scorer_id: by["sae"].frame
        for key, by in found.series.items()
        if (key.scorer, key.explainer[:7]) == ("detection", "default")
    }
    one, two = (series[i] for i in sorted(series, key=lambda i: i.startswith("sha256:ffff")))
    for column in ("value", "control", "generic", "lexical"):
        assert one[column].notna().sum() > 5
        pd.testing.assert_series_equal(two[column], one[column] + 0.2)
    assert set(one["generic"].dropna()) == {0.5} and set(one["lexical"].dropna()) == {0.6}


def test_rows_of_other_settings_are_told_apart(with_two_settings):
    rows = headline_rows(overview(Source(with_two_settings)), plots=False)
    alike = [row for row in rows if row["scorer"] == "detection" and row["explainer"] == "default"]
    assert len({row["settings"] for row in alike}) == 2 and all(len(row["settings"]) == 8 for row in alike)
    assert all(row["settings"] == "" for row in rows if row not in alike)
    text = summary_table(with_two_settings)
    assert "scorer_id" in text and all(f" {row['settings']} " in text for row in alike)
    index = write_report(with_two_settings).read_text()
    assert all(f'detection<span class="ci">{row["settings"]}</span>' in index for row in alike)


def test_a_latents_page_sets_each_setting_beside_its_own_controls(with_two_settings):
    [(_, rows)] = Source(with_two_settings).latents([("sae", 31)])
    page = latent_page("sae", 31, rows)
    groups = [group for group in page.scores if group["scorer"].startswith("detection") and group["judge"] == JUDGE]
    one, two = sorted(groups, key=lambda group: group["rows"][0]["scorer_id"].startswith("sha256:ffff"))
    for left, right in zip(one["rows"], two["rows"], strict=True):
        assert right["control_value"] == pytest.approx(left["control_value"] + 0.2)
        assert left["floors"] == pytest.approx({"generic": 0.5, "lexical": 0.6})
        assert right["floors"] == pytest.approx({"generic": 0.7, "lexical": 0.8})
    assert two["scorer"].startswith("detection ffff") and one["scorer"] != two["scorer"]
    names = page.plots[0]["names"]
    assert len(set(names)) == len(names)


def test_a_latents_page_knows_whose_floor_it_is():
    """A judge's generic floor is not another's; the lexical floor is judged by rule whoever judges the explanation."""
    shared = {
        "explanation_id": "e", "scorer": "detection", "explainer": "default", "label": "default-0", "metric": "balanced_accuracy",
        "is_headline": True, "negatives": "random", "quantile": None, "status": "ok", "ci_low": None, "ci_high": None,
        "ci_method": "none", "chance": 0.5, "disjoint": "document", "num_scored": 1,
    }  # fmt: skip
    scores = [
        shared | {"base_id": base, "scorer_id": f"{base} {control}", "judge": judge, "control": control, "value": value}
        for base, judge, control, value in [
            ("sha256:rule", "rule", None, 1.0),
            ("sha256:rule", "rule", "generic", 0.50),
            ("sha256:two", "two", None, 0.9),
            ("sha256:two", "two", "generic", 0.54),
            ("sha256:two", "rule", "lexical", 0.6),
        ]
    ]
    found = latent_page("sae", 1, {"explanations": [], "scores": scores, "verdicts": [], "examples": []}).scores
    assert {group["judge"]: group["rows"][0]["floors"] for group in found} == {
        "rule": {"generic": 0.50},
        "two": {"generic": 0.54, "lexical": 0.6},
    }


def test_floors_are_shown(with_floors):
    text = summary_table(with_floors)
    assert re.search(r"generic +\+0\.\d+", text) and re.search(r"lexical +\+0\.\d+", text)
    assert "by firing rate" in text and "share of tokens it fires on" in text
    index = write_report(with_floors).read_text()
    assert "generic +0." in index and "by rate 0." in index
    assert "lexical 0.600" in (with_floors / "report" / "latents" / "sae" / "31.html").read_text()
