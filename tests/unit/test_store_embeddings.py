"""The index of embeddings: exact search against sorting everything, and what is missing, stale or damaged."""

import json

import numpy as np
import pytest

from autointerp.errors import IdentityError, StoreError
from autointerp.files import read_sealed, write_sealed
from autointerp.store import embeddings
from autointerp.store.embeddings import EmbeddingIndex, IndexRecord, build_index, index_folder, is_unfinished, write_index

NUM, DIM = 300, 16


def unit(seed=0, num=NUM):
    rows = np.random.default_rng(seed).normal(size=(num, DIM)).astype(np.float32)
    rows[7] = rows[200]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def record(**changes):
    values = {
        "store_id": "sha256:s",
        "embedder": "e",
        "embedder_id": "e@1",
        "window": 32,
        "min_window": 8,
        "num_windows": NUM,
        "dim": DIM,
    }
    return IndexRecord.parse(values | changes)


@pytest.fixture
def path(tmp_path):
    vectors = unit()
    write_index(tmp_path / "index", record(), (vectors[low : low + 64] for low in range(0, NUM, 64)))
    return tmp_path / "index"


@pytest.mark.parametrize("held", [0, 1 << 30])
@pytest.mark.parametrize("block", [7, 1 << 15])
@pytest.mark.parametrize("count", [1, 20, 300, 1000])
def test_search_is_exact(path, held, block, count, monkeypatch):
    monkeypatch.setattr(embeddings, "HELD_BYTES", held)
    monkeypatch.setattr(embeddings, "_BLOCK", block)
    index = EmbeddingIndex(path, store_id="sha256:s")
    stored = unit().astype(np.float16).astype(np.float64)
    rows = np.array([7, 0, 299])
    found = index.nearest(rows, count)
    assert found.shape == (3, min(count, NUM)) and found.dtype == np.int64
    for row, near in zip(rows, found, strict=True):
        cosine = stored @ stored[row]
        expected = np.sort(cosine)[::-1][: min(count, NUM)]
        np.testing.assert_allclose(cosine[near], expected, atol=2e-5)
        assert len(set(near.tolist())) == len(near)
    # Window 200 says what 7 says: as near as itself, and the smaller row comes first.
    if count > 1:
        assert found[0, :2].tolist() == [7, 200]
    assert index.nearest(np.zeros(0, np.int64), count).shape[0] == 0


@pytest.mark.parametrize("held", [0, 1 << 30])
def test_what_is_asked_for_together_changes_no_answer(tmp_path, held, monkeypatch):
    """Many windows that say nearly the same: cosines differ by less than a product in float32 is off by, and many are equal."""
    monkeypatch.setattr(embeddings, "HELD_BYTES", held)
    monkeypatch.setattr(embeddings, "_MAX_ENTRIES", 1000)
    rng = np.random.default_rng(0)
    num, dim = 600, 96
    rows = np.repeat(rng.normal(size=(6, dim)), num // 6, axis=0) + rng.choice([0, 1e-4, 3e-3], (num, 1)) * rng.normal(
        size=(num, dim)
    )
    rows = rng.permutation(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    write_index(tmp_path / "index", record(num_windows=num, dim=dim), [rows])
    stored = rows.astype(np.float16).astype(np.float64)
    asked = rng.choice(num, 40, replace=False)
    # Sums that are exact in every order, hence the same in reverse.
    exact = stored[asked] @ stored.T
    assert np.array_equal(exact, stored[asked][:, ::-1] @ stored[:, ::-1].T)
    expected = np.stack([np.lexsort((np.arange(num), -np.round(cosines, 5))) for cosines in exact])
    for count in (1, 40):
        for block in (101, 1 << 13):
            monkeypatch.setattr(embeddings, "_BLOCK", block)
            index = EmbeddingIndex(tmp_path / "index", store_id="sha256:s")
            np.testing.assert_array_equal(index.nearest(asked, count), expected[:, :count])
            for size in (1, 7):
                parts = [index.nearest(asked[low : low + size], count) for low in range(0, 14, size)]
                np.testing.assert_array_equal(np.concatenate(parts), expected[:14, :count])


# Building ------------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


class Work:
    """Embeds windows; stops before block number `stop_at` as Ctrl-C would."""

    def __init__(self, stop_at=None):
        self.stop_at, self.embedded, self.advanced = stop_at, [], []

    def __call__(self, low, high):
        if len(self.embedded) == self.stop_at:
            raise Stopped
        self.embedded.append((low, high))
        return unit()[low:high]

    def run(self, path, **changes):
        return build_index(path, record(**changes), self, advance=lambda count, is_new: self.advanced.append((count, is_new)))


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def whole(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "WINDOWS_PER_BLOCK", 64)
    assert Work().run(tmp_path / "whole")
    assert not is_unfinished(tmp_path / "whole")
    return content(tmp_path / "whole")


def test_a_stopped_build_is_gone_on_with(tmp_path, whole):
    assert set(whole) == {"vectors.npy", "index.json"}
    for stop_at in range(5):
        path = tmp_path / str(stop_at)
        with pytest.raises(Stopped):
            Work(stop_at).run(path)
        assert is_unfinished(path) == (stop_at > 0)
        rest = Work()
        assert rest.run(path)
        assert rest.embedded == [(low, min(low + 64, NUM)) for low in range(64 * stop_at, NUM, 64)]
        assert rest.advanced == [(64 if i < 4 else 44, i >= stop_at) for i in range(5)]
        assert content(path) == whole
        assert not Work().run(path) and content(path) == whole


@pytest.mark.parametrize("fault", ["flipped", "short", "half-written"])
def test_a_damaged_block_is_embedded_again(tmp_path, whole, fault):
    with pytest.raises(Stopped):
        Work(3).run(tmp_path / "index")
    block = sorted(tmp_path.glob("index/building-*/*.f16"))[1]
    data = bytearray(block.read_bytes())
    if fault == "flipped":
        data[5] ^= 1
        block.write_bytes(data)
    elif fault == "short":
        block.write_bytes(data[:-2])
    else:
        block.rename(block.with_name(f".tmp-0-{block.name}"))
    rest = Work()
    assert rest.run(tmp_path / "index")
    assert rest.embedded == [(64, 128), (192, 256), (256, 300)]
    assert content(tmp_path / "index") == whole


def test_blocks_of_another_store_or_embedder_are_not_used(tmp_path, whole):
    for changes in ({"store_id": "sha256:t"}, {"embedder_id": "e@2"}):
        with pytest.raises(Stopped):
            Work(3).run(tmp_path / "index", **changes)
    rest = Work()
    assert rest.run(tmp_path / "index") and len(rest.embedded) == 5
    assert content(tmp_path / "index") == whole


def test_who_builds_an_index_is_alone(tmp_path, whole):
    def second(low, high):
        with pytest.raises(StoreError, match=r"index is being written by process .*; wait for it"):
            Work().run(tmp_path / "index")
        return unit()[low:high]

    assert build_index(tmp_path / "index", record(), second, advance=lambda *_: None)
    assert content(tmp_path / "index") == whole


@pytest.mark.parametrize("wrong", [unit()[:3], np.full((64, DIM), np.nan), np.ones((64, DIM + 1))])
def test_vectors_that_are_none_are_refused(tmp_path, whole, wrong):
    with pytest.raises(StoreError, match=r"for the windows from 0 on, .* expected finite ones of the shape \(64, 16\)"):
        build_index(tmp_path / "index", record(), lambda low, high: wrong, advance=lambda *_: None)
    assert list(tmp_path.glob("index/**/*.f16")) == []


def test_vectors_lie_on_disk_as_float16_beside_the_embedders_id(path):
    assert np.load(path / "vectors.npy", allow_pickle=False).dtype == np.float16
    assert json.loads((path / "index.json").read_text())["embedder_id"] == "e@1"
    np.testing.assert_allclose(EmbeddingIndex(path, store_id="sha256:s").vectors(3, 9), unit()[3:9], atol=1e-3)


def test_each_embedder_and_grid_has_its_own_folder():
    folders = {
        index_folder(name, window=w, min_window=m)
        for name in ("a/b", "a-b", "all-MiniLM-L6-v2")
        for w in (16, 32)
        for m in (4, 8)
    }
    assert len(folders) == 12
    assert all(len(folder.split("/")) == 2 for folder in folders)


@pytest.mark.parametrize("num", [NUM - 1, NUM + 1])
def test_too_few_and_too_many_vectors_leave_nothing(tmp_path, num):
    with pytest.raises(StoreError, match="vectors"):
        write_index(tmp_path / "index", record(), [unit(num=num)])
    assert list((tmp_path / "index").iterdir()) == []


def test_another_stores_index_and_damage_are_told(path):
    with pytest.raises(IdentityError, match="is the index of another store"):
        EmbeddingIndex(path, store_id="sha256:t")
    vectors = (path / "vectors.npy").read_bytes()
    (path / "vectors.npy").write_bytes(vectors[:-100])
    with pytest.raises(StoreError, match=r"vectors.npy is not as it was written"):
        EmbeddingIndex(path, store_id="sha256:s")
    # An index of an earlier release has no digest.
    values = read_sealed(path / "index.json") | {"vectors_digest": None}
    write_sealed(path / "index.json", values)
    for content in (b"", vectors[:-100], vectors[:9]):
        (path / "vectors.npy").write_bytes(content)
        with pytest.raises(StoreError, match=r"vectors.npy cannot be read"):
            EmbeddingIndex(path, store_id="sha256:s")
    for num in range(NUM - 5, NUM):
        np.save(path / "vectors.npy", unit(num=NUM)[:num].astype(np.float16))
        with pytest.raises(StoreError, match=rf"it has {128 + 32 * num} bytes; an array of <f2 and shape \(300, 16\) has 9728"):
            EmbeddingIndex(path, store_id="sha256:s")
