"""Arrays kept beside a store: mapped where they belong to it, made again where they do not, and never needed."""

from __future__ import annotations

import gc
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from small_store import random_fires, small_store

from autointerp.examples.selection import SelectionConfig, Selector
from autointerp.store import derived, open_store
from autointerp.store.arrays import Blocks
from autointerp.store.build import clean
from autointerp.store.contents import verify_contents
from autointerp.store.derived import derived_problems, read_derived, write_derived
from autointerp.store.reader import Store
from autointerp.store.verify import verify_store

CONFIG = SelectionConfig(window=8, min_window=4, min_documents=5)


@pytest.fixture(autouse=True)
def keep_of_any_size(monkeypatch):
    monkeypatch.setattr("autointerp.store.reader.MIN_DERIVED_POSITIONS", 0)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("derived") / "store"
    small_store(path, random_fires(1, num_positions=1280, rate=0.04))
    return path


@pytest.fixture
def path(original, tmp_path):
    return shutil.copytree(original, tmp_path / "store")


def refuse(*args, **kwargs):
    raise AssertionError("computed again")


def used(path):
    """Return all that is read of a store by way of derived arrays."""
    store = open_store(path)
    chosen = [Selector(store, CONFIG).select("sae", latent) for latent in (15, 20)]
    assert {one.status for one in chosen} == {"ok"}
    blocks = [(block.tokens, block.positions, block.documents) for one in chosen for block in (one.positives, one.negatives)]
    segments = store.segments
    arrays = [store.tokens, store.context_lengths, segments.document, segments.start, segments.stop, *sum(blocks, ())]
    return [np.array(array) for array in arrays]


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def folders(path):
    return sorted(folder.name.rsplit("-", 1)[0] for folder in (path / "derived").iterdir())


def test_the_next_process_maps_what_the_first_computed(path, monkeypatch):
    computed = used(path)
    assert folders(path) == ["corpus-v1", "windows-v1-w8-m4"]
    monkeypatch.setattr(Store, "_read_corpus", refuse)
    monkeypatch.setattr("autointerp.examples.windows.build_grid", refuse)
    assert_same(used(path), computed)
    store = open_store(path)
    assert type(store.tokens) is np.ndarray and not store.tokens.flags.writeable
    with pytest.raises(AssertionError, match="computed again"):
        Selector(store, SelectionConfig(window=16)).select("sae", 15)


def test_small_stores_keep_nothing(path, monkeypatch):
    computed = used(path)
    shutil.rmtree(path / "derived")
    monkeypatch.setattr("autointerp.store.reader.MIN_DERIVED_POSITIONS", 1 << 19)
    assert_same(used(path), computed)
    assert not (path / "derived").exists()


@pytest.mark.parametrize("fault", ["missing", "short", "long", "no index", "no json", "other key", "other format"])
def test_what_does_not_belong_is_made_again(path, fault):
    computed = used(path)
    for folder in (path / "derived").iterdir():
        array, index = sorted(folder.glob("*.npy"))[-1], folder / "index.json"
        match fault:
            case "missing":
                array.unlink()
            case "short":
                array.write_bytes(array.read_bytes()[:-1])
            case "long":
                array.write_bytes(array.read_bytes() + b"\0")
            case "no index":
                index.unlink()
            case "no json":
                index.write_text("{")
            case "other key":
                index.write_text(index.read_text().replace('"key": "sha256:', '"key": "sha256:0'))
            case "other format":
                array.write_bytes(bytes(array.stat().st_size))
    assert_same(used(path), computed)
    assert folders(path) == ["corpus-v1", "windows-v1-w8-m4"]
    assert verify_contents(path) == []


def test_a_store_that_cannot_be_written_to_is_read(path):
    computed = used(path)
    shutil.rmtree(path / "derived")
    (path / "derived").write_text("in the way")
    assert_same(used(path), computed)
    assert (path / "derived").read_text() == "in the way"


def test_other_tokens_have_other_arrays_and_take_the_place_of_the_former(path, tmp_path):
    used(path)
    small_store(tmp_path / "grown", random_fires(1, num_positions=1600, rate=0.04))
    expected = used(tmp_path / "grown")
    assert len(expected[0]) == 1600
    shutil.rmtree(tmp_path / "grown" / "derived")
    shutil.copytree(path / "derived", tmp_path / "grown" / "derived")
    assert_same(used(tmp_path / "grown"), expected)
    assert folders(tmp_path / "grown") == ["corpus-v1", "windows-v1-w8-m4"]
    assert {f.name for f in (path / "derived").iterdir()}.isdisjoint(f.name for f in (tmp_path / "grown" / "derived").iterdir())


@pytest.fixture
def interleaved_threads():
    """Let threads take turns wherever Python collects garbage, which is wherever it makes objects."""

    def give_way(phase, info):
        time.sleep(0)

    before = gc.get_threshold()
    gc.set_threshold(20)
    gc.callbacks.append(give_way)
    yield
    gc.callbacks.remove(give_way)
    gc.set_threshold(*before)


def test_threads_and_stores_that_compute_the_same_at_once(path, interleaved_threads):
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(used, [path] * 12))
    for found in results[1:]:
        assert_same(found, results[0])
    assert folders(path) == ["corpus-v1", "windows-v1-w8-m4"]
    assert verify_contents(path) == []


def test_what_is_kept_is_read_without_parsing_python(path, monkeypatch):
    # In CPython 3.11 `ast.literal_eval`, and so numpy.load, fails now and then where several threads call it at once.
    computed = used(path)
    monkeypatch.setattr("ast.literal_eval", refuse)
    assert_same(used(path), computed)


@pytest.mark.parametrize(
    "values", [np.arange(30), np.zeros(0, np.float32), np.ones((3, 4), np.uint8).T, np.zeros((0, 3), ">i2")]
)
def test_arrays_are_as_numpy_has_them(tmp_path, values):
    write_derived(tmp_path, "a", "sha256:1", {"x": values})
    for found in (read_derived(tmp_path, "a", "sha256:1")["x"], np.load(*tmp_path.glob("derived/*/x.npy"))):
        assert found.dtype == values.dtype and found.shape == values.shape
        np.testing.assert_array_equal(found, values)


def test_blocks_that_do_not_add_up_are_not_kept(tmp_path):
    blocks = Blocks(dtype="<i8", shape=(6,), make=lambda: iter([np.arange(5)]))
    assert write_derived(tmp_path, "a", "sha256:1", {"x": blocks}) is None
    assert not list((tmp_path / "derived").iterdir())


def test_leftovers_of_a_killed_writer_are_cleared(path):
    used(path)
    leftover = path / "derived" / ".tmp-1-abc"
    leftover.mkdir()
    (leftover / "tokens.npy").write_bytes(b"half")
    clean(path)
    assert folders(path) == ["corpus-v1", "windows-v1-w8-m4"]


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("block", [64, 1 << 24])
def test_a_flipped_byte_anywhere_is_seen(tmp_path, block, monkeypatch, caplog):
    monkeypatch.setattr(derived, "_BLOCK", block)
    monkeypatch.setattr(derived, "_CHUNK", 32)
    write_derived(tmp_path, "a", "sha256:1", {"x": np.arange(30), "y": np.zeros(3, np.float32)})
    for file in tmp_path.glob("derived/*/*.npy"):
        for at in (-1, *range(0, file.stat().st_size, 53)):
            flip(file, at)
            caplog.clear()
            assert read_derived(tmp_path, "a", "sha256:1") is None
            assert [record.levelname for record in caplog.records] == ["WARNING"]
            assert f"{file} is not as it was written and is not used" in caplog.text
            [problem] = derived_problems(tmp_path)
            assert f"{file} is not as it was written; remove {file.parent}, it is made again" in problem
            flip(file, at)
    assert read_derived(tmp_path, "a", "sha256:1")["x"].tolist() == list(range(30))


@pytest.mark.parametrize("name", ["corpus-*/stop", "windows-*/document"])
def test_damaged_arrays_are_made_again(path, name):
    computed = used(path)
    [file] = path.glob(f"derived/{name}.npy")
    flip(file, -1)
    assert len(verify_store(path)) == len(verify_contents(path)) == 1
    assert_same(used(path), computed)
    assert verify_store(path) == []


def test_other_tokens_of_the_same_size_are_not_used(path):
    computed = used(path)
    [file] = path.glob("derived/corpus-*/tokens.npy")
    tokens = np.load(file)
    np.save(file, tokens ^ np.uint32(3))
    assert_same(used(path), computed)
    np.testing.assert_array_equal(np.load(file), tokens)


def test_damaged_arrays_of_a_store_that_cannot_be_written_to_are_not_used(path, monkeypatch):
    computed = used(path)
    for file in path.glob("derived/*/*.npy"):
        flip(file, -1)
    monkeypatch.setattr("autointerp.store.reader.write_derived", lambda *args: None)
    assert_same(used(path), computed)
    assert len(verify_store(path)) == 16


@pytest.mark.parametrize("fault", ["no json", "no array"])
def test_verify_tells_what_cannot_be_read(path, fault):
    used(path)
    [index] = path.glob("derived/corpus-*/index.json")
    if fault == "no json":
        index.write_text("{")
    else:
        index.with_name("tokens.npy").unlink()
    [problem] = verify_store(path)
    assert f"remove {index.parent}, it is made again" in problem
    used(path)
    assert verify_store(path) == []


def test_object_arrays_are_never_loaded(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle=False"):
        write_derived(tmp_path, "a", "sha256:1", {"x": np.array([{}], object)})
    assert not list((tmp_path / "derived").iterdir())
    assert read_derived(tmp_path, "a", "sha256:1") is None
    assert write_derived(tmp_path, "a", "sha256:1", {"x": np.arange(3), "empty": np.zeros(0)})
    found = read_derived(tmp_path, "a", "sha256:1")
    assert found["x"].tolist() == [0, 1, 2] and len(found["empty"]) == 0
    assert read_derived(tmp_path, "a", "sha256:2") is None
