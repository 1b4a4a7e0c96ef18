"""The plan only grows, names no latent twice, and several planners may work at once."""

import threading

import numpy as np
import pytest

from autointerp.errors import StoreError
from autointerp.jobs.plan import extend_plan, read_plan
from autointerp.reports.source import Source
from autointerp.reports.summary import overview
from autointerp.results.folder import ResultsFolder
from autointerp.tables import read_parquet


@pytest.fixture
def folder(tmp_path):
    return ResultsFolder.create(tmp_path / "results", store_id="s", provenance={})


def partners(coder):
    return np.where(np.arange(60) < 50, (np.arange(60) + 1) % 50, -1)


def rows(plan):
    return [
        (int(s), plan.coders[c], int(latent), bool(r))
        for s, c, latent, r in zip(plan.shard, plan.coder, plan.latent, plan.is_requested, strict=True)
    ]


def test_shards_never_change(folder):
    first = extend_plan(folder, {"a": [5, 3, 4]}, shard_latents=2)
    assert rows(first) == [(0, "a", 3, True), (0, "a", 4, True), (1, "a", 5, True)]
    second = extend_plan(folder, {"a": [4, 5, 6], "b": [1]}, shard_latents=5)
    assert rows(second)[:3] == rows(first)
    assert rows(second)[3:] == [(2, "a", 6, True), (3, "b", 1, True)]
    assert extend_plan(folder, {"a": [3]}).num_parts == 2


def test_rows_of_a_control_say_of_which_coder(folder):
    extend_plan(folder, {"a": [1]}, partners=partners)
    extend_plan(folder, {"a-random": [3]}, partners=partners, control_of={"a-random": "a"})
    found = {
        (row["coder"], row["latent"], row["purpose"]): row["control_of"]
        for path in folder.plan.glob("*.parquet")
        for row in read_parquet(path).to_pylist()
    }
    assert found == {
        ("a", 1, "requested"): None, ("a", 2, "partner"): None,
        ("a-random", 3, "requested"): "a", ("a-random", 4, "partner"): "a",
    }  # fmt: skip
    assert overview(Source(folder.path)).control_of == {"a-random": "a"}


def test_partners_are_explained_and_not_scored(folder):
    plan = extend_plan(folder, {"a": [3, 4, 55]}, partners=partners)
    assert rows(plan) == [(0, "a", 3, True), (0, "a", 4, True), (0, "a", 55, True), (1, "a", 5, False)]
    assert plan.items("score").of(0) == [("a", 3), ("a", 4), ("a", 55)]
    assert plan.items("explain").shards == [0, 1]
    assert plan.items("score").shards == [0]


def test_a_partner_that_is_requested_later_is_explained_once(folder):
    extend_plan(folder, {"a": [3]}, partners=partners)
    plan = extend_plan(folder, {"a": [4]}, partners=partners)
    assert rows(plan) == [(0, "a", 3, True), (1, "a", 4, False), (2, "a", 4, True), (3, "a", 5, False)]
    explain, score = plan.items("explain"), plan.items("score")
    assert {shard: explain.of(shard) for shard in explain.shards} == {0: [("a", 3)], 1: [("a", 4)], 3: [("a", 5)]}
    assert {shard: score.of(shard) for shard in score.shards} == {0: [("a", 3)], 2: [("a", 4)]}
    find = plan.explained_in()
    assert (find(("a", 4)), find(("a", 5)), find(("a", 9)), find(("z", 1))) == (1, 3, None, None)


def test_scope(folder):
    plan = extend_plan(folder, {"a": [1, 2, 3, 4], "b": [2]}, shard_latents=2)
    items = plan.items("explain", {"a": np.array([2, 9])})
    assert (items.num_wanted, items.wanted_shards, items.wanted(0)) == (1, [0], [("a", 2)])
    assert items.of(0) == [("a", 1), ("a", 2)]
    assert plan.items("explain", {}).wanted_shards == []


def test_planners_at_once(folder):
    barrier = threading.Barrier(6)

    def work(i):
        barrier.wait()
        for start in range(0, 60, 10):
            extend_plan(folder, {"a": range(start + i, start + i + 10)}, shard_latents=3)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plan = read_plan(folder)
    assert sorted(plan.latent.tolist()) == list(range(65))
    shards, counts = np.unique(plan.shard, return_counts=True)
    assert shards.tolist() == list(range(len(shards)))
    assert counts.max() <= 3
    assert not list(folder.plan.glob(".tmp-*"))


def test_a_missing_part_is_named(folder):
    extend_plan(folder, {"a": [1]})
    extend_plan(folder, {"a": [2]})
    (folder.plan / "part-000000.parquet").unlink()
    with pytest.raises(StoreError, match="lacks part 0"):
        read_plan(folder)
