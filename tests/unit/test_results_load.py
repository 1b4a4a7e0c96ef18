"""Tables as data frames, the summary, and what is written comes back."""

import asyncio
import dataclasses
import random
import shutil

import jobs_standins as standins
import numpy as np
import pandas as pd
import pytest

from autointerp import tables
from autointerp.errors import StoreError
from autointerp.jobs.explain import ExplainConfig, explain_from
from autointerp.jobs.score import ScoreConfig, score_from
from autointerp.results.folder import Method, ResultsFolder
from autointerp.results.load import (
    density_deciles,
    load_explanations,
    load_failures,
    load_scores,
    load_verdicts,
    summary,
)
from autointerp.results.write import ShardRows, explanation_id, read_rows, write_tables


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "r"
    source, engine = standins.Source(), standins.engine()

    async def run():
        config = ExplainConfig(store="x", results=path, latents="0-11", controls=("shuffled",))
        await explain_from(config, source, standins.Explainer(), engine, progress=False)
        await score_from(ScoreConfig(results=path, controls=("shuffled",)), source, [standins.Scorer()], engine, progress=False)

    asyncio.run(run())
    return path


def test_frames(finished):
    explanations, verdicts, scores = load_explanations(finished), load_verdicts(finished), load_scores(finished)
    assert list(zip(explanations["coder"], explanations["latent"], strict=True)) == sorted(
        zip(explanations["coder"], explanations["latent"], strict=True)
    )
    assert set(verdicts["control"].dropna()) == {"shuffled"}
    assert verdicts["answer"].dtype == "boolean" and scores["value"].dtype == float
    assert len(scores.groupby(["coder", "control"], dropna=False)) == 4
    assert load_failures(finished).empty
    assert list(load_verdicts(finished, columns=["coder", "latent", "truth"])) == ["coder", "latent", "truth"]


def test_plain_pandas_reads_the_same(finished):
    plain = pd.read_parquet(finished / "scores")
    assert len(plain) == len(load_scores(finished))
    assert set(plain.columns) == set(load_scores(finished).columns)
    assert plain[plain["status"] == "ok"].groupby(["scorer", "metric"])["value"].mean().notna().all()


def test_summary(finished):
    frame = summary(finished).set_index(["coder", "control"])
    assert (frame["weighted_mean"] - frame["mean"]).abs().max() < 1e-12, "all fire equally often"
    assert len(frame) == 4
    row = frame.loc["a", "none"].to_dict()
    scores = load_scores(finished)
    own = scores[(scores["coder"] == "a") & scores["control"].isna()]
    assert row["num_latents"] == 11 and row["num_missing"] == 1  # latent 7 has too few examples
    assert row["mean"] == pytest.approx(own["value"].mean()) and row["median"] == own["value"].median()
    assert row["mean_low"] <= row["mean"] <= row["mean_high"]
    assert row["chance"] == 0.5
    # A scorer and its control are told to belong together, here and in the table that pandas reads.
    assert frame.loc["a", "none"]["scorer_id"] == frame.loc["a", "shuffled"]["base_id"] == frame.loc["a", "none"]["base_id"]
    plain = pd.read_parquet(finished / "scores")
    is_own, keys = plain["control"].isna(), ["coder", "latent", "base_id", "metric", "negatives"]
    both = plain[is_own].merge(plain[~is_own], on=keys)
    assert len(both) == is_own.sum() == 24 and (both["scorer_id_x"] == both["base_id"]).all()


def test_nothing_yet(tmp_path):
    folder = ResultsFolder.create(tmp_path / "r", store_id="s", provenance={})
    assert load_scores(folder.path).empty
    assert list(load_scores(folder.path).columns) == tables.SCORES.names
    assert summary(folder.path).empty
    with pytest.raises(StoreError, match="no such folder"):
        load_scores(tmp_path / "elsewhere")


def test_deciles():
    density = np.array([0, 5, 1, 0, 3, 2, 4, 6, 7, 8, 9, 10]) / 100
    assert density_deciles(density).tolist() == [-1, 4, 0, -1, 2, 1, 3, 5, 6, 7, 8, 9]


def test_rows_come_back_as_they_were(finished, tmp_path):
    folder = ResultsFolder.open(finished)
    for stage in ("explain", "score"):
        for method in folder.methods(stage):
            rows = read_rows(folder, method, 0)
            copy = ResultsFolder.create(tmp_path / "copy", store_id="s", provenance={})
            write_tables(copy, method, 0, rows)
            for name in ("explanations",) if stage == "explain" else ("verdicts", "scores"):
                assert copy.table(name, method, 0).read_bytes() == folder.table(name, method, 0).read_bytes()


def test_order_of_rows_does_not_matter(finished, tmp_path):
    folder = ResultsFolder.open(finished)
    method = folder.methods("score")[0]
    rows = read_rows(folder, method, 0)
    copy = ResultsFolder.create(tmp_path / "copy", store_id="s", provenance={})
    write_tables(copy, method, 0, ShardRows(verdicts=rows.verdicts[::-1], scores=rows.scores[::-1]))
    assert copy.table("verdicts", method, 0).read_bytes() == folder.table("verdicts", method, 0).read_bytes()


def test_ids_depend_on_what_is_said(finished):
    folder = ResultsFolder.open(finished)
    row = read_rows(folder, folder.methods("explain")[0], 0).explanations[0]
    assert row.explanation_id == explanation_id(row)
    for change in ({"text": "x"}, {"rule": "{}"}, {"sample": 1}, {"latent": 99}, {"explainer_id": "y"}):
        assert explanation_id(dataclasses.replace(row, **change)) != row.explanation_id
    assert explanation_id(dataclasses.replace(row, prompt_tokens=9, model="other")) == row.explanation_id


def test_a_failures_file_goes_when_failures_do(tmp_path):
    from autointerp.results.write import Failure

    folder = ResultsFolder.create(tmp_path / "r", store_id="s", provenance={})
    method = Method(stage="explain", name="x", model="m", identity={})
    failure = Failure(coder="a", latent=1, stage="explain", method=method.label, status="no_reply", error="Transient: gone")
    assert set(write_tables(folder, method, 0, ShardRows(failures=[failure]))) == {"explanations", "failures"}
    assert read_rows(folder, method, 0).failures == [failure]
    assert set(write_tables(folder, method, 0, ShardRows())) == {"explanations"}
    assert load_failures(folder.path).empty


def test_a_damaged_table_is_told_or_reads_the_same(finished, tmp_path):
    rng = random.Random(0)
    path = shutil.copytree(finished, tmp_path / "r")
    for table, load in (("explanations", load_explanations), ("scores", load_scores), ("verdicts", load_verdicts)):
        file = sorted((path / table).rglob("*.parquet"))[0]
        whole, data, told = load(path), file.read_bytes(), 0
        for number in range(60):
            flipped = bytearray(data)
            flipped[rng.randrange(0 if number % 2 else len(data) // 2, len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(data[: rng.randrange(len(data))] if number % 10 == 0 else flipped)
            try:
                pd.testing.assert_frame_equal(load(path), whole)
            except StoreError as error:
                told += 1
                assert str(file) in str(error) and "\n" not in str(error)
        assert told >= 15
        file.write_bytes(data)


def test_a_column_of_another_name_is_told(finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / "r")
    file = sorted((path / "scores").rglob("*.parquet"))[0]
    file.write_bytes(file.read_bytes().replace(b"ci_method", b"ci_methoe"))
    with pytest.raises(StoreError, match="has other columns than were written"):
        load_scores(path)
