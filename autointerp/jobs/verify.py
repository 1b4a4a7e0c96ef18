"""Checks a results folder against what it says of itself: digests, counts, coverage of the plan, and ids derived anew."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from autointerp.digest import digest_file
from autointerp.errors import StoreError
from autointerp.jobs.plan import Items, read_plan
from autointerp.jobs.runner import finished_keys
from autointerp.records import STATUSES
from autointerp.results.folder import STAGES, Method, ResultsFolder, Stage, shard_name
from autointerp.results.write import MAIN_TABLE, Marker, ShardRows, explanation_id, read_markers, read_rows

_TABLES = ("explanations", "verdicts", "scores", "failures")


def verify(path: Path | str) -> list[str]:
    """Return one sentence per problem; empty when the folder is as it says. A shard that is in work is no problem.

    Raises: StoreError when there is no results folder at `path`.
    """
    folder = ResultsFolder.open(path)
    problems: list[str] = []
    try:
        plan = read_plan(folder)
    except StoreError as error:
        return [str(error)]
    repeated = len(plan) - len(set(zip(plan.keys().tolist(), plan.is_requested.tolist(), strict=True)))
    if repeated:
        problems.append(f"the plan names {repeated} latents twice for one purpose")
    for stage in STAGES:
        items = plan.items(stage)
        for method in folder.methods(stage):
            problems += _verify_method(folder, stage, method, items)
    problems += _strays(folder)
    return problems


def _verify_method(folder: ResultsFolder, stage: Stage, method: Method, items: Items) -> list[str]:
    problems: list[str] = []
    try:
        markers = read_markers(folder, stage, method.label)
    except StoreError as error:
        return [str(error)]
    for shard, marker in markers.items():
        where = f"{stage} {method.label} {shard_name(shard)}"
        if shard not in items.shards:
            problems.append(f"{where} has a marker and is not in the plan")
            continue
        damaged = _verify_files(folder, where, marker)
        problems += damaged
        if not damaged:
            problems += _verify_rows(folder, where, method, marker, items)
    return problems


def _verify_files(folder: ResultsFolder, where: str, marker: Marker) -> list[str]:
    problems = []
    for name, table in marker.tables.items():
        file = folder.path / table.path
        if not file.is_file():
            problems.append(f"{where}: the {name} file {table.path} is missing; remove the marker and the shard is done again")
        elif digest_file(file) != table.digest:
            problems.append(
                f"{where}: the {name} file {table.path} is not the one that was committed: its digest differs "
                "(where a run was killed while it wrote, running it again repairs that)"
            )
    return problems


def _verify_rows(folder: ResultsFolder, where: str, method: Method, marker: Marker, items: Items) -> list[str]:
    problems: list[str] = []
    try:
        rows = read_rows(folder, method, marker.shard)
    except StoreError as error:
        return [str(error)]
    for name, table in marker.tables.items():
        found = len(getattr(rows, name))
        if found != table.num_rows:
            problems.append(f"{where}: {table.path} has {found} rows, the marker says {table.num_rows}")
    planned = set(items.of(marker.shard))
    main = getattr(rows, MAIN_TABLE[method.stage])
    present = {(row.coder, row.latent) for row in main}
    if present - planned:
        problems.append(f"{where}: {len(present - planned)} latents have rows and are not planned there")
    if marker.is_done and planned - present:
        problems.append(f"{where} is done and {len(planned - present)} of its {len(planned)} latents have no row")
    finished = finished_keys(rows, method.stage)
    if len(finished) != marker.num_finished:
        problems.append(f"{where}: {len(finished)} latents are finished, the marker says {marker.num_finished}")
    problems += _verify_ids(where, method, rows)
    return problems


def _verify_ids(where: str, method: Method, rows: ShardRows) -> list[str]:
    problems = []
    wrong = sum(row.explanation_id != explanation_id(row) for row in rows.explanations)
    if wrong:
        problems.append(f"{where}: {wrong} explanations are not what their explanation_id is the digest of")
    strangers = sum(row.explainer_id != method.id for row in rows.explanations)
    strangers += sum(row.scorer_id != method.id for row in rows.verdicts)
    strangers += sum(row.scorer_id != method.id for row in rows.scores)
    if strangers:
        problems.append(f"{where}: {strangers} rows carry the id of another method")
    odd = {row.status for name in _TABLES for row in getattr(rows, name)} - set(STATUSES)
    if odd:
        problems.append(f"{where}: unknown status {', '.join(sorted(odd))}")
    valued = sum(row.status != "ok" and row.value is not None for row in rows.scores)
    valued += sum(row.status != "ok" and row.answer is not None for row in rows.verdicts)
    if valued:
        problems.append(f"{where}: {valued} rows have a value and a status other than ok")
    keys = Counter((row.coder, row.latent, row.sample) for row in rows.explanations)
    twice = sum(count > 1 for count in keys.values())
    asked = Counter((row.coder, row.latent, row.explanation_id, row.example_idx, row.source) for row in rows.verdicts)
    twice += sum(count > 1 for count in asked.values())
    if twice:
        problems.append(f"{where}: {twice} explanations or verdicts are there twice")
    return problems


def _strays(folder: ResultsFolder) -> list[str]:
    """Files in table folders that readers of the folder would stumble over."""
    problems = []
    for name in (*_TABLES, "examples", "plan"):
        for file in sorted((folder.path / name).rglob("*")):
            if file.is_file() and file.suffix != ".parquet" and not file.name.startswith("."):
                problems.append(f"{file.relative_to(folder.path)} is not parquet and lies in a table folder; move it away")
    return problems
