"""Running some contexts of a store through the subject and its coders again, to compare with the activations recorded.

Two runs of one model differ in the last bits, more so on another device or in half precision; and near the rule that selects
(the k-th largest, a threshold) a latent may fire in one of them only. What differs by more than that is told.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from autointerp.digest import canonical_json, hash64, seed_of
from autointerp.errors import IdentityError, InputError
from autointerp.jobs.readings import CoderConfig, reading_of
from autointerp.jobs.tables import check_subject
from autointerp.store import Store, open_store
from autointerp.subject.corpus import Context
from autointerp.subject.model import Subject, load_subject
from autointerp.subject.recorder import Reading, Recorder, TokenFilter

logger = logging.getLogger("autointerp.jobs")

TOLERANCE = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 5e-2}
"""Largest relative difference, by the subject's dtype; values are stored with three digits."""


def rerun(
    path: Path | str,
    subject: str,
    *,
    num_contexts: int,
    revision: str | None = None,
    device: str = "auto",
    seed: int = 0,
    weights: Mapping[str, str] | None = None,
) -> list[str]:
    """Return one sentence per coder whose activations on `num_contexts` contexts are not those in the store.

    Raises: IdentityError when subject or coder are not those of the store; InputError when they are not there.
    """
    store = open_store(path)
    identity, provenance = store.manifest.identity, store.manifest.provenance
    token_filter = TokenFilter.parse(identity.token_filter)
    if token_filter.template:
        raise InputError(
            f"{store.path} dropped the tokens of a chat template and does not say which they were; it cannot be run again"
        )
    quantization = identity.quantization
    loaded = load_subject(
        subject,
        revision=revision,
        device=device,
        dtype=str(provenance.get("dtype", "auto")),
        quantization=quantization,  # type: ignore[arg-type]  # written from the same literal
    )
    check_subject(store, loaded)
    readings = {}
    for name in store.coder_names:
        if store.coder(name).record.control_of is None:
            readings[name] = _reading(store, name, (weights or {}).get(name), loaded)
        else:
            logger.info("coder %s is a control, whose weights are kept nowhere: it is not run again", name)
    recorder = Recorder(
        loaded,
        readings,
        ctx_len=store.ctx_len,
        token_filter=token_filter,
        batch_tokens=int(provenance.get("batch_tokens", 2048)),
    )
    chosen = np.sort(np.argsort(hash64(seed_of("rerun", seed), np.arange(store.num_contexts)))[:num_contexts])
    again = _run(store, recorder, chosen, readings)
    tolerance = TOLERANCE[loaded.dtype]
    problems = []
    for name in readings:
        problem = _compare(store, name, chosen, again[name], tolerance=tolerance)
        problems += [problem] if problem else []
    return problems


def _reading(store: Store, name: str, source: str | None, subject: Subject) -> Reading:
    """Return a coder as it was read when the store was made.

    Raises: IdentityError when its weights or its rules are others.
    """
    record = store.coder(name).record
    for hookpoint in (record.hookpoints[0], None):
        # The name that the files publish may come with rules that the full name of the same place does not.
        try:
            reading = reading_of(CoderConfig(name=name, source=source or record.source, hookpoint=hookpoint), subject)
        except InputError:
            if hookpoint is None:
                raise
            continue
        spec = reading.coder.spec
        found = (spec.digest, dict(spec.reading), reading.hookpoint)
        if canonical_json(found) == canonical_json((record.digest, record.reading, record.hookpoints[0])):
            return reading
    raise IdentityError(
        f"coder {name!r} is not read as {store.path} recorded it: digest, rules and hookpoint are {found} and were "
        f"{(record.digest, record.reading, record.hookpoints[0])}; name its files as --coder {name}=SOURCE"
    )


def _run(
    store: Store, recorder: Recorder, chosen: np.ndarray, names: Iterable[str]
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return (latents, positions, values) of each coder on the chosen contexts."""
    ctx_len = store.ctx_len
    contexts = [
        Context(
            tokens=store.tokens[first * ctx_len : first * ctx_len + int(store.context_lengths[first])],
            segments=[],
            is_template=None,
            documents=[],
        )
        for first in chosen.tolist()
    ]
    found: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {name: [] for name in names}
    for _, batch in recorder.batches(contexts):
        for acts in batch:
            positions = chosen[acts.positions // ctx_len] * ctx_len + acts.positions % ctx_len
            fires = acts.values != 0
            found[acts.coder].append((acts.latents[fires].astype(np.int64), positions[fires], acts.values[fires]))
    return {name: _joined(blocks) for name, blocks in found.items()}


def _joined(blocks: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    nothing = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    latents, positions, values = (np.concatenate(column) for column in zip(nothing, *blocks, strict=True))
    return latents, positions, values


def _compare(
    store: Store, coder: str, chosen: np.ndarray, again: tuple[np.ndarray, np.ndarray, np.ndarray], *, tolerance: float
) -> str | None:
    is_chosen = np.zeros(store.num_contexts, bool)
    is_chosen[chosen] = True
    reader = store.coder(coder)
    stored = _joined([tuple(a[is_chosen[block[1] // store.ctx_len]] for a in block) for block in reader.blocks()])
    num_positions = store.num_positions
    keys = [latents * num_positions + positions for latents, positions, _ in (stored, again)]
    union = np.union1d(*keys)
    values = np.zeros((2, len(union)))
    for row, (key, (_, _, some)) in enumerate(zip(keys, (stored, again), strict=True)):
        values[row, np.searchsorted(union, key)] = some
    # The weakest activation of either run at a position: what fires in one run only may be as weak, and no stronger.
    weakest = np.full(num_positions, np.inf)
    for _, positions, some in (stored, again):
        np.minimum.at(weakest, positions, np.abs(some))
    size = np.abs(values).max(axis=0)
    differs = np.abs(values[0] - values[1]) > tolerance * size
    only_one = (values == 0).any(axis=0)
    wrong = differs & ~(only_one & (size <= (1 + 2 * tolerance) * weakest[union % num_positions]))
    if not wrong.any():
        return None
    worst = int(np.argmax(np.where(wrong, np.abs(values[0] - values[1]), -1)))
    latent, position = divmod(int(union[worst]), num_positions)
    return (
        f"coder {coder!r} of {store.path}: of {len(union)} activations on {len(chosen)} contexts {int(wrong.sum())} are others "
        f"when run again (latent {latent} at position {position}: {values[0, worst]:.4g} is stored, {values[1, worst]:.4g} "
        f"came out, tolerance {tolerance:.1%}); the part is damaged, or the store was made with another dtype or library"
    )
