"""The index of embeddings: exact search against sorting everything, and what is missing, stale or damaged."""

import json

import numpy as np
import pytest

from autointerp.errors import IdentityError, StoreError
from autointerp.files import read_sealed, write_sealed
from autointerp.store import embeddings
from autointerp.store.embeddings import EmbeddingIndex, IndexRecord, index_folder, write_index

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
    np.save(path / "vectors.npy", unit(num=NUM)[:-1].astype(np.float16))
    with pytest.raises(StoreError, match=r"has the shape \(299, 16\) and index.json says \(300, 16\)"):
        EmbeddingIndex(path, store_id="sha256:s")
