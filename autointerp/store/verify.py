"""Checking a finished store: digests of all files, then what they hold against each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from autointerp.errors import StoreError
from autointerp.store.corpus import iterate_contexts, tokens_digest
from autointerp.store.derived import derived_problems
from autointerp.store.layout import activations_part, damage
from autointerp.store.manifest import Manifest, coder_id_of, read_manifest, store_id_of
from autointerp.store.parquet import iterate_tables
from autointerp.store.reader import CoderReader, open_store


def verify_store(path: Path | str) -> list[str]:
    """Return one sentence per problem of a finished store, each with the file's path; none when it is whole.

    Reads every byte once for digests and every part once more for order and counts.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except StoreError as error:
        return [str(error)]
    damaged = list(_damaged(path, manifest))
    problems = [sentence for _, sentence in damaged]
    problems += _strangers(path, manifest)
    bad = {name for name, _ in damaged}
    if not any(name.startswith("tokens/") for name in bad):
        problems += _told(_corpus_problems(path, manifest))
    for coder in sorted(manifest.extent.coders):
        if not any(name.startswith(f"coders/coder={coder}/") for name in bad):
            problems += _told(_coder_problems(path, manifest, coder))
    return problems + derived_problems(path)


def _told(problems: Iterator[str]) -> list[str]:
    found: list[str] = []
    try:
        for problem in problems:
            found.append(problem)  # those found before an error are kept
    except StoreError as error:
        found.append(str(error))
    return found


def _damaged(path: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    for name, entry in manifest.files.items():
        if problem := damage(path / name, entry):
            yield name, problem


def _strangers(path: Path, manifest: Manifest) -> list[str]:
    known = {path / name for name in manifest.files}
    found = [file for folder in ("tokens", "documents") for file in (path / folder).glob("*.parquet")]
    for coder in manifest.extent.coders:
        found += (path / activations_part(coder, 0)).parent.glob("*.parquet")
    return [
        f"{file} is not in the manifest, and readers of the whole folder would take it in; remove it"
        for file in sorted(found)
        if file not in known and not file.name.startswith(".")
    ]


def _corpus_problems(path: Path, manifest: Manifest) -> Iterator[str]:
    where = path / "manifest.json"
    if manifest.store_id != store_id_of(manifest.identity):
        yield f"{where} has a store_id that is not the digest of its identity; restore it"
    names = sorted(name for name in manifest.files if name.startswith("tokens/"))
    found = tokens_digest(iterate_contexts(path / name for name in names))
    extent = manifest.extent
    if (found.num_contexts, found.num_tokens) != (extent.num_contexts, extent.num_tokens):
        yield (
            f"{path / 'tokens'} holds {found.num_contexts} contexts of {found.num_tokens} tokens in all and {where} says "
            f"{extent.num_contexts} of {extent.num_tokens}; restore both together"
        )
    elif found.value() != manifest.identity.tokens_digest:
        yield f"{path / 'tokens'} holds other tokens than {where} says; restore both together"


def _coder_problems(path: Path, manifest: Manifest, coder: str) -> Iterator[str]:
    reader = open_store(path).coder(coder)
    if reader.coder_id != coder_id_of(manifest.store_id, reader.record):
        yield f"{path / 'manifest.json'} has a coder_id for {coder!r} that is not the digest of its coder.json; restore both"
    counts = np.zeros(reader.width, np.int64)
    num_positions = manifest.extent.num_contexts * manifest.identity.ctx_len
    for part in range(manifest.extent.coders[coder].num_parts):
        file = path / activations_part(coder, part)
        before = counts.copy()
        if problem := _part_problem(file, counts, num_positions=num_positions):
            yield f"{file} {problem}; build the store again"
            return
        yield from _offset_problems(file, reader, part=part, counts=counts - before)
    stored = reader.latents["count"]
    if not np.array_equal(counts, stored):
        latent = int(np.argmax(counts != stored))
        yield (
            f"the parts of {path / 'coders' / f'coder={coder}'} hold {counts[latent]} activations of latent {latent} and "
            f"latents.parquet says {stored[latent]}; restore both together"
        )
    if counts.sum() != reader.num_activations:
        yield f"{path / 'manifest.json'} says {reader.num_activations} activations of {coder!r}, not {counts.sum()}; restore it"


def _part_problem(file: Path, counts: np.ndarray, *, num_positions: int) -> str | None:
    """Return what is wrong with a part; add its activations to `counts`."""
    last = (-1, -1)
    for table in iterate_tables(file):
        latents, positions = table["latent"].to_numpy().astype(np.int64), table["position"].to_numpy()
        values = table["activation"].to_numpy().astype(np.float32)
        is_same = latents[1:] == latents[:-1]
        in_order = (latents[1:] > latents[:-1]) | (is_same & (positions[1:] > positions[:-1]))
        if not in_order.all() or (int(latents[0]), int(positions[0])) <= last:
            return "is not sorted by latent and position"
        if latents[-1] >= len(counts) or positions.min() < 0 or positions.max() >= num_positions:
            return "holds a latent or position beyond the coder's width or the corpus"
        if not np.isfinite(values).all() or not values.all():
            return "holds an activation that is zero or not finite"
        counts += np.bincount(latents, minlength=len(counts))
        last = int(latents[-1]), int(positions[-1])
    return None


def _offset_problems(file: Path, reader: CoderReader, *, part: int, counts: np.ndarray) -> Iterator[str]:
    fires = counts > 0
    offsets = (np.cumsum(counts) - counts)[fires]
    columns = reader.latents
    if (columns["part"][fires] != part).any() or not np.array_equal(columns["row_offset"][fires], offsets):
        yield f"{file} holds latents elsewhere than its latents.parquet says; restore both together"
