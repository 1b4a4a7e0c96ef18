"""A build damaged while it was interrupted, or without room: it goes on to the same store, or says in a sentence what is wrong."""

import os
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_store_build import CODERS, Corpus, build, tree, writer_at
from test_store_grow import first, grow

from autointerp.errors import AutointerpError, ResourceError
from autointerp.store import verify_store, write_vocabulary
from autointerp.store.embeddings import IndexRecord, write_index

FLIPS = 12
RUN = "building/runs/coder=wide/run-00001-000.parquet"
MARKER = "building/runs/run-00001.json"


@pytest.fixture(scope="module")
def corpus():
    return Corpus(12)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    return tree(build(tmp_path_factory.mktemp("whole") / "store", corpus).path)


@pytest.fixture(scope="module")
def spilled(corpus, tmp_path_factory):
    """All runs are committed and nothing else is done."""
    path = tmp_path_factory.mktemp("spilled") / "store"
    options = {"row_group_rows": 64, "part_rows": 1500, "document_columns": {"n": "int64"}}
    with writer_at(path, CODERS, **options) as writer:
        write_vocabulary(path / "tokenizer", [b"a", b"b"], [False, True])
        corpus.feed(writer)
        writer.close_run()
    return path


@pytest.mark.parametrize(
    "name", [RUN, MARKER, "building/state.json", "tokens/part-00001.parquet", "documents/part-00001.parquet"]
)
def test_a_damaged_build_goes_on_or_says_what_is_wrong(corpus, whole, spilled, tmp_path, name):
    data, rng, told = (spilled / name).read_bytes(), random.Random(name), 0
    damages = [None, data[:0], data[: len(data) // 2]]
    for number in range(FLIPS):
        flipped = bytearray(data)
        flipped[rng.randrange(0 if number % 2 else len(data) // 2, len(data))] ^= 1 << rng.randrange(8)
        damages.append(bytes(flipped))
    for number, damaged in enumerate(damages):
        path = shutil.copytree(spilled, tmp_path / f"store-{number}")
        (path / name).unlink()
        if damaged is not None:
            (path / name).write_bytes(damaged)
        try:
            found = tree(build(path, corpus).path)
            if found != whole:
                # The build does not look into what it has committed; whoever reads it does.
                assert any(name in problem for problem in verify_store(path))
                told += 1
        except AutointerpError as error:
            told += 1
            assert "\n" not in str(error) and str(path) in str(error)
        shutil.rmtree(path)
    assert told >= FLIPS // 4


@pytest.mark.parametrize("what", ["new", "added", "extended"])
def test_a_run_lost_while_it_is_merged_is_told(corpus, spilled, tmp_path, monkeypatch, what):
    path = tmp_path / "store"
    again, marker = {
        "new": (lambda: build(path, corpus), MARKER),
        "added": (lambda: build(path, corpus), MARKER),
        "extended": (lambda: grow(path, corpus), "building/grown/building/runs/run-00001.json"),
    }[what]
    if what == "new":
        shutil.copytree(spilled, path)
    elif what == "added":
        build(path, corpus, {"wide": CODERS["wide"]})
    else:
        build(path, first(corpus, 6))

    def killed(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("autointerp.store.writer.merge_coder", killed)
        again()
    (path / marker).unlink()
    with pytest.raises(AutointerpError, match=r"runs of 7 contexts and had 12 .* a file run-\*.json is missing"):
        again()


@pytest.fixture
def disk(tmp_path):
    """Mount a disk of so many bytes; again to change its size."""
    if os.geteuid() != 0 or not Path("/proc/mounts").exists():
        pytest.skip("mounting a small disk needs root")
    folder, mounted = tmp_path / "disk", []
    folder.mkdir()

    def resize(size):
        how = "remount," if mounted else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{how}size={size}", "tmpfs", folder]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this machine does not let root mount a tmpfs")
        mounted.append(folder)
        return folder

    yield resize
    if mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_told_wherever_it_fills_and_the_build_goes_on(corpus, whole, disk):
    page = 4096
    path = disk(page * 12) / "store"
    sizes = 0
    for pages in range(12, 400, 3):
        disk(page * pages)
        try:
            build(path, corpus)
            break
        except ResourceError as error:
            sizes += 1
            assert "the disk is full; free some space and run the same command again" in str(error)
            assert "\n" not in str(error)
    assert sizes >= 8
    assert tree(path) == whole


def test_a_full_disk_under_the_vectors_is_told(disk):
    path = disk(1 << 16) / "index"
    record = IndexRecord(store_id="s", embedder="e", embedder_id="e", window=8, min_window=4, num_windows=4096, dim=16)
    with pytest.raises(ResourceError, match="the disk is full"):
        write_index(path, record, (np.ones((256, 16)) for _ in range(16)))
    assert list(path.iterdir()) == []
    disk(1 << 20)
    write_index(path, record, (np.ones((256, 16)) for _ in range(16)))
