"""The plan of a results folder: which latents lie in which shard; append-only.

Parts are numbered; a new part appears by a hard link under the next number, which fails when another planner was faster,
and then the plan is read again. So planners need no lock, and no latent is planned twice. A latent has at most one row per
purpose: ``partner`` (explained only because a shuffled control needs it) and ``requested``. It is explained in the shard of
its first row.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autointerp import tables
from autointerp.errors import StoreError
from autointerp.files import TEMPORARY_PREFIX
from autointerp.results.folder import ResultsFolder, link_exclusive
from autointerp.results.write import Key, table_of

SHARD_LATENTS = 250
_ABANDONED_S = 3600.0

Partners = Callable[[str], np.ndarray]
"""Coder name -> the partner of each latent, -1 where there is none."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All rows of a plan, in order."""

    coders: tuple[str, ...]
    coder: np.ndarray
    """int32 [R], index into `coders`."""
    latent: np.ndarray
    """int64 [R]"""
    shard: np.ndarray
    """int32 [R]"""
    is_requested: np.ndarray
    """bool [R], False for partners."""
    num_parts: int

    def __len__(self) -> int:
        return len(self.latent)

    @property
    def shards(self) -> list[int]:
        """All shards, ascending."""
        return [int(shard) for shard in np.unique(self.shard)]

    def keys(self) -> np.ndarray:
        """Return one int64 per row that names (coder, latent)."""
        return np.asarray(self.coder.astype(np.int64) << 32 | self.latent)

    def key(self, key: Key) -> int:
        """Return the int64 of one latent; -1 for a coder that is not planned."""
        return self.coders.index(key[0]) << 32 | key[1] if key[0] in self.coders else -1

    def rows(self, stage: str) -> np.ndarray:
        """Return the rows that `stage` works on, in order: it explains each latent once, and scores what was requested."""
        if stage == "score":
            return np.flatnonzero(self.is_requested)
        return np.asarray(np.sort(np.unique(self.keys(), return_index=True)[1]))

    def items(self, stage: str, scope: Mapping[str, np.ndarray] | None = None) -> Items:
        """Return the latents that `stage` works on by shard; `scope` names the latents wanted now, None means all."""
        rows = self.rows(stage)
        keys = self.keys()[rows]
        wanted = np.ones(len(rows), bool)
        if scope is not None:
            named = [
                self.coders.index(c) << 32 | np.asarray(latents, np.int64) for c, latents in scope.items() if c in self.coders
            ]
            wanted = np.isin(keys, np.concatenate(named) if named else np.zeros(0, np.int64))
        return Items(self.coders, self.shard[rows], keys, wanted)

    def latents(self, coders: Sequence[str], *, only_requested: bool = False) -> dict[str, np.ndarray]:
        """Return the planned latents of the given coders."""
        return {name: _planned(self, name, only_requested=only_requested) for name in coders if name in self.coders}

    def explained_in(self) -> Callable[[Key], int | None]:
        """Return a function from a latent to the shard in which it is explained, None when it is not planned."""
        rows = self.rows("explain")
        keys = self.keys()[rows]
        order = np.argsort(keys)
        keys, shards = keys[order], self.shard[rows][order]

        def find(key: Key) -> int | None:
            at = int(np.searchsorted(keys, self.key(key)))
            return int(shards[at]) if at < len(keys) and keys[at] == self.key(key) else None

        return find


class Items:
    """The latents of a stage by shard; they become Python objects one shard at a time, so memory stays flat."""

    def __init__(self, coders: Sequence[str], shard: np.ndarray, keys: np.ndarray, wanted: np.ndarray) -> None:
        order = np.argsort(shard, kind="stable")
        self._coders = coders
        self._keys, self._wanted = keys[order], wanted[order]
        shards, self._start = np.unique(shard[order], return_index=True)
        self._stop = np.append(self._start[1:], len(order))
        self._row = {int(shard): i for i, shard in enumerate(shards)}
        self.num_wanted = int(wanted.sum())

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def shards(self) -> list[int]:
        """All shards with work, ascending."""
        return list(self._row)

    @property
    def wanted_shards(self) -> list[int]:
        """Those with latents that are wanted now."""
        return [shard for shard, i in self._row.items() if self._wanted[self._start[i] : self._stop[i]].any()]

    def of(self, shard: int) -> list[Key]:
        """Return all latents of a shard."""
        return self._decoded(self._keys[self._slice(shard)])

    def wanted(self, shard: int) -> list[Key]:
        """Return the latents of a shard that are wanted now."""
        rows = self._slice(shard)
        return self._decoded(self._keys[rows][self._wanted[rows]])

    def num_wanted_in(self, shard: int) -> int:
        """Return how many latents of a shard are wanted now."""
        return int(self._wanted[self._slice(shard)].sum())

    def _slice(self, shard: int) -> slice:
        i = self._row[shard]
        return slice(int(self._start[i]), int(self._stop[i]))

    def _decoded(self, keys: np.ndarray) -> list[Key]:
        return [(self._coders[key >> 32], key & 0xFFFFFFFF) for key in keys.tolist()]


def read_plan(folder: ResultsFolder) -> Plan:
    """Return the plan as it is now; empty when nothing is planned.

    Raises: StoreError when a part is missing or damaged.
    """
    paths = sorted(folder.plan.glob("part-*.parquet"))
    numbers = [int(path.stem.removeprefix("part-")) for path in paths]
    if numbers != list(range(len(paths))):
        missing = sorted(set(range(numbers[-1] + 1)) - set(numbers))
        raise StoreError(f"{folder.plan} lacks part {missing[0]}; a plan only ever grows, so that file was removed: restore it")
    coders: dict[str, int] = {}
    columns: dict[str, list[np.ndarray]] = {"coder": [], "latent": [], "shard": [], "is_requested": []}
    for path in paths:
        table = tables.read_parquet(path)
        names = table.column("coder").to_pylist()
        columns["coder"].append(np.array([coders.setdefault(name, len(coders)) for name in names], np.int32))
        columns["latent"].append(table.column("latent").to_numpy().astype(np.int64))
        columns["shard"].append(table.column("shard").to_numpy().astype(np.int32))
        columns["is_requested"].append(np.array([p == "requested" for p in table.column("purpose").to_pylist()], bool))
    empty = {"coder": np.int32, "latent": np.int64, "shard": np.int32, "is_requested": bool}
    joined = {name: np.concatenate(parts) if parts else np.zeros(0, empty[name]) for name, parts in columns.items()}
    return Plan(coders=tuple(coders), num_parts=len(paths), **joined)


def extend_plan(
    folder: ResultsFolder,
    requested: Mapping[str, Sequence[int] | np.ndarray],
    *,
    partners: Partners | None = None,
    shard_latents: int = SHARD_LATENTS,
    control_of: Mapping[str, str] | None = None,
) -> Plan:
    """Return the plan with the latents of each coder in it, and their partners when given; existing shards stay.

    `control_of`: the coder that a coder is a control of, for those that are.
    """
    wanted = {coder: np.unique(np.asarray(latents, np.int64)) for coder, latents in requested.items()}
    paired = {coder: partners(coder) for coder in wanted} if partners is not None else {}
    while True:
        plan = read_plan(folder)
        rows = _new_rows(plan, wanted, paired, shard_latents=shard_latents)
        if not rows or _append(folder, plan.num_parts, rows, control_of or {}):
            return read_plan(folder) if rows else plan


def _new_rows(
    plan: Plan, wanted: Mapping[str, np.ndarray], paired: Mapping[str, np.ndarray], *, shard_latents: int
) -> list[tuple[int, str, int, str]]:
    shard = int(plan.shard.max()) + 1 if len(plan) else 0
    rows: list[tuple[int, str, int, str]] = []
    added: dict[str, np.ndarray] = {}
    for coder, latents in wanted.items():
        added[coder] = np.setdiff1d(latents, _planned(plan, coder, only_requested=True))
        shard = _chunk(rows, coder, added[coder], "requested", shard, shard_latents)
    for coder, latents in wanted.items():
        if coder in paired:
            needed = np.unique(paired[coder][latents])
            known = np.concatenate([_planned(plan, coder, only_requested=False), added[coder]])
            shard = _chunk(rows, coder, np.setdiff1d(needed[needed >= 0], known), "partner", shard, shard_latents)
    return rows


def _planned(plan: Plan, coder: str, *, only_requested: bool) -> np.ndarray:
    if coder not in plan.coders:
        return np.zeros(0, np.int64)
    mask = plan.coder == plan.coders.index(coder)
    return np.asarray(plan.latent[mask & plan.is_requested if only_requested else mask])


def _chunk(rows: list[tuple[int, str, int, str]], coder: str, latents: np.ndarray, purpose: str, shard: int, size: int) -> int:
    for start in range(0, len(latents), size):
        rows.extend((shard, coder, int(latent), purpose) for latent in latents[start : start + size])
        shard += 1
    return shard


def _append(folder: ResultsFolder, number: int, rows: list[tuple[int, str, int, str]], control_of: Mapping[str, str]) -> bool:
    """Add a part under `number`; return False when another planner took that number."""
    _drop_abandoned(folder.plan)
    temporary = folder.plan / f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}.parquet"
    named = (
        {"shard": shard, "coder": coder, "latent": latent, "purpose": purpose, "control_of": control_of.get(coder)}
        for shard, coder, latent, purpose in rows
    )
    try:
        tables.write_parquet(temporary, table_of(named, tables.PLAN))
        return link_exclusive(temporary, folder.plan / f"part-{number:06d}.parquet")
    finally:
        temporary.unlink(missing_ok=True)


def _drop_abandoned(plan: Path) -> None:
    """Remove what killed planners left; nobody needs an hour to write a part."""
    for leftover in plan.glob(f"{TEMPORARY_PREFIX}*"):
        try:
            if time.time() - leftover.stat().st_mtime > _ABANDONED_S:
                leftover.unlink(missing_ok=True)
        except FileNotFoundError:
            continue
