"""Merging many runs within a small budget: the same store, nothing decoded again and again, and it may stop anywhere."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from autointerp.errors import Interrupted, StoreError
from autointerp.store import merge, open_store, verify_store
from autointerp.store.merge import Source
from autointerp.store.premerge import _BYTES_PER_FILE, BYTES_PER_MERGED, _cheapest, max_files, range_rows
from tests.unit.test_store_build import CODERS, Corpus, build, tree, writer_at

GROUP_ROWS, RANGE_ROWS = 32, 128
OPTIONS = {"row_group_rows": 64, "part_rows": 1500, "document_columns": {"n": "int64"}, "memory_budget_bytes": 1}


@pytest.fixture
def small(monkeypatch):
    """Row groups, ranges and buffers so small that a few thousand activations are many."""
    for module in ("runs", "merge", "premerge"):
        monkeypatch.setattr(f"autointerp.store.{module}.RUN_GROUP_ROWS", GROUP_ROWS)
    monkeypatch.setattr("autointerp.store.premerge.MIN_RANGE_ROWS", RANGE_ROWS)


@pytest.fixture
def decoded(monkeypatch):
    """How many rows were read from files of runs."""
    rows = [0]
    for name in ("read_row_group", "read_row_groups"):
        real = getattr(pq.ParquetFile, name)

        def read(file, *args, real=real, **options):
            table = real(file, *args, **options)
            rows[0] += table.num_rows * ("key" in table.column_names)
            return table

        monkeypatch.setattr(pq.ParquetFile, name, read)
    return rows


def contents(path):
    """All files of a store but the manifest, and statistics apart: the mean of a streamed float32 may differ in its last bit."""
    store = open_store(path)
    files = {
        name: data
        for name, data in tree(path).items()
        if name.startswith("coders") and name.endswith("parquet") and "latents" not in name
    }
    return files, {name: store.coder(name).latents for name in CODERS}


def assert_equal(path, other):
    (files, latents), (expected, wanted) = contents(path), contents(other)
    assert files == expected and len(files) > 3
    for coder, columns in wanted.items():
        for name, column in columns.items():
            np.testing.assert_allclose(latents[coder][name], column, rtol=1e-6 if name == "mean" else 0)


@pytest.mark.parametrize("values", ["plain", "extreme"])
@pytest.mark.parametrize(("contexts_per_run", "buffer_rows"), [(1, 1 << 10), (20, 100), (40, 100)])
def test_any_number_of_runs_gives_the_same_store(tmp_path, small, monkeypatch, contexts_per_run, buffer_rows, values):
    """One file for each run, several for each, and so many for one that they are merged by themselves."""
    corpus = Corpus(40, values=values)
    build(tmp_path / "large", corpus, contexts_per_run=40, **OPTIONS | {"memory_budget_bytes": 1 << 30})
    monkeypatch.setattr("autointerp.store.runs.MIN_BUFFER_ROWS", buffer_rows)
    build(tmp_path / "small", corpus, contexts_per_run=contexts_per_run, **OPTIONS)
    assert_equal(tmp_path / "small", tmp_path / "large")
    assert verify_store(tmp_path / "small") == []


@pytest.mark.parametrize("values", ["plain", "extreme"])
def test_a_large_latent_is_put_in_columns_piece_by_piece(tmp_path, monkeypatch, values):
    corpus = Corpus(40, values=values)
    options = OPTIONS | {"contexts_per_run": 40, "memory_budget_bytes": 1 << 30}
    build(tmp_path / "whole", corpus, **options)
    sizes, real = [], merge.SpilledCoder._columns

    def columns(spilled, ordered, start, stop, *, first):
        sizes.append(stop - start)
        return real(spilled, ordered, start, stop, first=first)

    monkeypatch.setattr(merge, "_BLOCK_ROWS", 40)
    monkeypatch.setattr(merge.SpilledCoder, "_columns", columns)
    store = build(tmp_path / "pieces", corpus, **options)
    assert max(sizes) == 40 and int(store.coder("wide").latents["count"].max()) > 400
    assert_equal(tmp_path / "pieces", tmp_path / "whole")


def test_each_row_group_is_decoded_once_and_few_are_held(tmp_path, small, decoded, monkeypatch):
    corpus, files, held = Corpus(40), {}, []
    real = merge._read

    def read(file, *args, **options):
        files[file.path] = file
        yield from real(file, *args, **options)
        arrays = [file.held.keys for file in files.values() if file.held is not None and file.path.exists()]
        held.append(sum(len(keys if keys.base is None else keys.base) for keys in arrays))

    monkeypatch.setattr(merge, "_read", read)
    total = sum(map(len, corpus.activations.values()))
    for contexts_per_run, passes in ((10, 0), (1, 2)):
        decoded[0] = 0
        files.clear()
        held.clear()
        store = build(tmp_path / f"{contexts_per_run}", corpus, contexts_per_run=contexts_per_run, **OPTIONS)
        assert store.manifest.provenance["num_runs"] == 40 // contexts_per_run
        # Once to count and once to merge, again for each time that files are merged beforehand.
        assert 2 * total <= decoded[0] <= 2 * (1 + passes) * total
        assert 0 < max(held) <= max_files(1) * GROUP_ROWS


def source(number, num_rows, run=None):
    run = number if run is None else run
    return Source(
        name=str(number),
        num_rows=num_rows,
        dtype="float16",
        start=0,
        position_bits=8,
        runs=(run, run),
        files=(number, number + 1),
    )


def test_as_few_rows_as_possible_are_merged_beforehand():
    sources = [source(number, rows) for number, rows in enumerate([9, 9, 1, 1, 9, 9])]
    assert _cheapest(sources, 5) == (2, 4)
    assert _cheapest(sources, 4) == (1, 4)
    assert _cheapest(sources, 3) == (1, 4)  # 11 rows for two files less
    several = [source(number, 5, run) for number, run in enumerate([0, 1, 1, 1, 2, 3])]
    assert _cheapest(several, 5) == (4, 6)  # not a part of the files of one run
    assert _cheapest(several[:4], 2) == (1, 3)  # unless they are too many


def test_a_merge_that_is_stopped_goes_on(tmp_path, small):
    """Every other time the files that were merged are there still, as after a kill before they were removed."""
    corpus, options, polls = Corpus(20), {"contexts_per_run": 1, **OPTIONS}, [0]

    def poll():
        polls[0] += 1
        if polls[0] == stop_at:
            raise Interrupted("stopped by SIGTERM")

    stop_at = 1
    with writer_at(tmp_path / "spilled", CODERS, **options) as writer, pytest.raises(Interrupted):
        corpus.feed(writer)
        writer.finish(poll)
    with writer_at(shutil.copytree(tmp_path / "spilled", tmp_path / "whole"), CODERS, **options) as writer:
        writer.finish(poll)
    whole, num_polls = tree(tmp_path / "whole"), polls[0] - 1
    assert num_polls > 80
    for number, stop_at in enumerate(np.linspace(2, num_polls, 7).astype(int).tolist()):
        path, polls[0] = shutil.copytree(tmp_path / "spilled", tmp_path / str(stop_at)), 0
        with writer_at(path, CODERS, **options) as writer, pytest.raises(Interrupted):
            writer.finish(poll)
        assert polls[0] == stop_at and not list(path.rglob(".tmp*"))
        if number % 2:
            for folder in (path / "building/runs").glob("*/"):
                shutil.copytree(tmp_path / "spilled/building/runs" / folder.name, folder, dirs_exist_ok=True)
        with writer_at(path, CODERS, **options) as writer:
            writer.finish()
        assert tree(path) == whole


def test_a_damaged_file_of_merged_runs_is_told(tmp_path, small):
    corpus, path, options = Corpus(12), tmp_path / "store", {"contexts_per_run": 1, **OPTIONS}
    build(path, corpus, stop=12, **options)

    def poll():
        if list((path / "building/runs").rglob("merged-*")):
            raise Interrupted("stopped by SIGTERM")

    with writer_at(path, CODERS, **options) as writer, pytest.raises(Interrupted):
        corpus.feed(writer)
        writer.finish(poll)
    (merged,) = (path / "building/runs").rglob("merged-*")
    merged.write_bytes(merged.read_bytes()[:-10])
    with pytest.raises(StoreError, match=r"merged-\d+-\d+.parquet cannot be read"):
        build(path, corpus, **options)


@pytest.mark.parametrize("budget", [1 << 26, 100_000_000, 1 << 30])
def test_a_merge_of_many_files_takes_no_more_memory_than_one_of_few(budget):
    for num_files in (1, 13, max_files(budget)):
        held, sorted_at_once = num_files * _BYTES_PER_FILE, range_rows(budget, num_files) * BYTES_PER_MERGED
        assert budget - BYTES_PER_MERGED < held + sorted_at_once <= budget
        assert held <= budget / 16
