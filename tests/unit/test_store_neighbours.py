"""Neighbours by co-firing and by cosine: against counting and sorting everything; looking one up; refusing what is stale."""

import errno
import os

import numpy as np
import pytest
from small_store import random_fires, small_store

from autointerp.errors import IdentityError, InputError, ResourceError, StoreError
from autointerp.store import cooccurrence, open_store
from autointerp.store.cooccurrence import cooccurring
from autointerp.store.cosine import nearest_by_cosine
from autointerp.store.neighbours import KINDS, NeighbourTable, Ranked, neighbours_file
from autointerp.store.tables import build_cooccurrence, build_cosine


@pytest.fixture(scope="module")
def fires():
    return random_fires(0)


@pytest.fixture(scope="module")
def store(fires, tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("neighbours") / "store", fires)


def by_brute_force(fires, k):
    """(neighbours, similarities, counts) of each latent, from the whole matrix and a full sort."""
    active = fires != 0
    active[:, -3:] = False
    both = active.astype(int) @ active.T.astype(int)
    lists = []
    for i, row in enumerate(both):
        pairs = []
        for j, count in enumerate(row.tolist()):
            if j != i and count:
                union = int(active[i].sum() + active[j].sum()) - count
                pairs.append((-np.float32(count / union), j, count))
        pairs = sorted(pairs)[:k]
        lists.append(([j for _, j, _ in pairs], [-s for s, *_ in pairs], [c for *_, c in pairs]))
    return lists


def flattened(blocks):
    lists = []
    for block in blocks:
        assert block.first == len(lists)
        ends = np.cumsum(block.sizes)
        for low, high in zip(ends - block.sizes, ends, strict=True):
            counts = None if block.counts is None else block.counts[low:high].tolist()
            lists.append((block.neighbours[low:high].tolist(), block.similarities[low:high].tolist(), counts))
    return lists


@pytest.mark.parametrize("k", [1, 5, 29, 250])
@pytest.mark.parametrize("pairs_per_block", [1, 300, 1 << 22])
@pytest.mark.parametrize("budget", [0, 1 << 30], ids=["on disk", "in memory"])
def test_cooccurrence_is_what_counting_everything_gives(store, fires, k, pairs_per_block, budget):
    reader = store.coder("sae")
    found = cooccurring(reader, k=k, num_positions=480, budget_bytes=budget, pairs_per_block=pairs_per_block)
    assert flattened(found) == by_brute_force(fires, k)
    assert not list(reader.folder.glob(".tmp*"))


@pytest.mark.parametrize("pairs", [1, 100, 1 << 17])  # every latent alone; a few together; all of them
@pytest.mark.parametrize("cells", [0, 1 << 30], ids=["sorted", "added up"])
@pytest.mark.parametrize("budget", [0, 1 << 30], ids=["on disk", "in memory"])
def test_counts_do_not_depend_on_how_and_how_many_at_a_time_pairs_are_counted(store, fires, pairs, cells, budget, monkeypatch):
    monkeypatch.setattr(cooccurrence, "_CACHED_PAIRS", pairs)
    monkeypatch.setattr(cooccurrence, "_CELLS_PER_PAIR", cells)
    calls, real = [], cooccurrence._Source._added_up
    monkeypatch.setattr(cooccurrence._Source, "_added_up", lambda *args: calls.append(1) or real(*args))
    monkeypatch.setattr(cooccurrence, "_POSITIONS", 7)
    found = cooccurring(store.coder("sae"), k=250, num_positions=480, budget_bytes=budget)
    assert flattened(found) == by_brute_force(fires, 250)
    # One latent at a time goes another way, but for those that fire with none.
    assert bool(calls) == (cells > 0 and pairs > 1)


def test_a_full_disk_under_the_positions_is_told_before_they_are_mapped(store, monkeypatch):
    def full(_handle, _offset, length):
        assert length == 4 * store.coder("sae").num_activations
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="the disk is full; free some space"):
        list(cooccurring(store.coder("sae"), k=3, num_positions=480, budget_bytes=0))


@pytest.mark.parametrize("error", [AttributeError, OSError(errno.EOPNOTSUPP, "not here")], ids=["macOS", "some disks"])
def test_where_room_cannot_be_reserved_it_is_written(store, fires, monkeypatch, error):
    def refused(*_):
        raise error

    monkeypatch.setattr(os, "posix_fallocate", refused)
    monkeypatch.setattr(cooccurrence, "_CHUNK", 100)
    found = cooccurring(store.coder("sae"), k=250, num_positions=480, budget_bytes=0)
    assert flattened(found) == by_brute_force(fires, 250)


def test_what_killed_processes_left_goes(tmp_path, fires):
    reader = small_store(tmp_path / "store", fires).coder("sae")
    left = reader.folder / ".tmp-cooccurrence-abc"
    left.mkdir()
    (left / "latents").write_bytes(b"x" * 100)
    blocks = cooccurring(reader, k=3, num_positions=480, budget_bytes=0)
    next(blocks)
    assert not list(reader.folder.glob(".tmp*")) and not list(reader.folder.glob("tmp*"))
    blocks.close()


def test_a_latent_is_left_out_of_its_list_by_index_and_not_by_rank(store):
    # 7, 11 and 20 fire on the same positions: each is as near to the others as to itself, and ties go by index.
    lists = flattened(cooccurring(store.coder("sae"), k=2, num_positions=480))
    assert [lists[i][0] for i in (7, 11, 20)] == [[11, 20], [7, 20], [7, 11]]
    assert [lists[i][1] for i in (7, 11, 20)] == [[1.0, 1.0]] * 3
    lists = flattened(cooccurring(store.coder("sae"), k=1, num_positions=480))
    assert [lists[i][0] for i in (7, 11, 20)] == [[11], [7], [7]]


def test_a_latent_that_never_fires_has_no_neighbours(store):
    lists = flattened(cooccurring(store.coder("sae"), k=250, num_positions=480))
    assert lists[1] == ([], [], [])
    assert not any(1 in row[0] for row in lists)


def test_many_counts_need_more_than_float32():
    from autointerp.store.cooccurrence import _number

    assert _number(np.array([(1 << 23) - 1])) is np.float32
    assert _number(np.array([1 << 23])) is np.float64


@pytest.mark.parametrize("k", [1, 3, 39, 250])
@pytest.mark.parametrize("entries", [1, 200, 1 << 23])
def test_cosine_is_what_sorting_everything_gives(k, entries):
    rows = np.random.default_rng(1).normal(size=(40, 8)).astype(np.float32)
    rows[5] = 0
    rows[9] = rows[30]
    rows[31] = -rows[30]
    unit = rows.astype(float) / np.maximum(np.linalg.norm(rows.astype(float), axis=1), 1e-30)[:, None]
    cosine = np.round(unit @ unit.T, 6)
    for i, (neighbours, similarities, counts) in enumerate(flattened(nearest_by_cosine(rows, k=k, entries=entries))):
        others = [j for j in range(40) if j not in (i, 5)] if i != 5 else []
        expected = sorted(others, key=lambda j: (-cosine[i, j], j))[:k]
        assert neighbours == expected
        np.testing.assert_allclose(similarities, cosine[i, expected], atol=2e-6)
        assert counts is None


def test_copies_of_a_row_are_neighbours_of_each_other_in_order_of_index():
    rows = np.tile(np.array([[1.0, 2.0, 3.0]], np.float32), (300, 1))
    lists = flattened(nearest_by_cosine(rows, k=3, entries=300 * 7))
    assert [lists[i][0] for i in (0, 1, 2, 299)] == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]


@pytest.mark.parametrize("rows", [np.zeros(3, np.float32), np.array([[1.0], [np.nan]], np.float32)])
def test_weights_that_are_no_matrix_of_numbers(rows):
    with pytest.raises(InputError, match=r"expected one row per latent|row 1 of the weights is not finite"):
        list(nearest_by_cosine(rows, k=2))


def test_tables_are_found_by_latent(store, fires):
    advanced = []
    build_cooccurrence(store, "sae", k=6, advance=advanced.append)
    table = store.coder("sae").neighbours("cooccurrence")
    assert (table.k, sum(advanced)) == (6, 30)
    for latent, (neighbours, similarities, _) in enumerate(by_brute_force(fires, 6)):
        found = table.of(latent)
        assert (found[0].tolist(), found[1].tolist()) == (neighbours, similarities)
        assert found[0].dtype == np.int64


def test_looking_up_in_many_row_groups(tmp_path):
    store = small_store(tmp_path / "store", random_fires(3, width=1100, rate=0.02))
    rows = np.random.default_rng(0).normal(size=(1100, 5)).astype(np.float32)
    build_cosine(store, "sae", "encoder", rows, k=4)
    table = store.coder("sae").neighbours("encoder")
    expected = flattened(nearest_by_cosine(rows, k=4))
    for latent in (0, 511, 512, 1023, 1024, 1099, 3):
        assert table.of(latent)[0].tolist() == expected[latent][0]


def test_missing_stale_and_damaged_tables_are_told(tmp_path, fires):
    store = small_store(tmp_path / "store", fires)
    reader = store.coder("sae")
    with pytest.raises(
        StoreError, match=r"has no neighbours by decoder .*`autointerp tables .*store --coder sae --neighbours decoder`"
    ):
        reader.neighbours("decoder")
    with pytest.raises(InputError, match="has 30 latents and 3 rows of weights were given"):
        build_cosine(store, "sae", "decoder", np.ones((3, 4), np.float32))
    build_cooccurrence(store, "sae")
    path = store.path / neighbours_file("sae", "cooccurrence")
    with pytest.raises(IdentityError, match="computed for another coder or corpus; remove it"):
        NeighbourTable(path, coder_id="sha256:other", width=30)
    with pytest.raises(StoreError, match="has 30 latents and the coder 31"):
        NeighbourTable(path, coder_id=reader.coder_id, width=31)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(StoreError, match=r"cannot be read .*damaged or truncated"):
        reader.neighbours("cooccurrence")


def test_a_failed_table_leaves_nothing(tmp_path, fires):
    store = small_store(tmp_path / "store", fires)

    def blocks():
        yield Ranked(
            first=0, sizes=np.array([0]), neighbours=np.zeros(0, np.uint32), similarities=np.zeros(0, np.float32), counts=None
        )
        raise KeyboardInterrupt

    from autointerp.store.neighbours import write_neighbours

    with pytest.raises(KeyboardInterrupt):
        write_neighbours(store.path / neighbours_file("sae", "decoder"), blocks(), coder_id="x", k=1)
    assert [p.name for p in store.coder("sae").folder.iterdir() if "neighbours" in p.name] == []


def test_blocks_are_all_activations_in_order(store, fires):
    latents, positions, values = (np.concatenate(column) for column in zip(*store.coder("sae").blocks(), strict=True))
    wanted = fires.copy()
    wanted[:, -3:] = 0
    expected = np.nonzero(wanted)
    np.testing.assert_array_equal(latents, expected[0])
    np.testing.assert_array_equal(positions, expected[1])
    np.testing.assert_allclose(values, wanted[expected])
    assert open_store(store.path).coder("sae").num_activations == len(values)
    assert KINDS == ("cooccurrence", "decoder", "encoder")
