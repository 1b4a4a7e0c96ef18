"""Digests that name content: canonical JSON, arrays and files, hashed with SHA-256 and tagged with the algorithm.

Also the seeded 64-bit hash that every random choice derives from, so that no choice depends on order or on counts.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import orjson

_MASK = (1 << 64) - 1
# Arrays without dimensions, not numpy scalars: an operation takes as long again to convert one of those as to begin.
_STEP, _FIRST_FACTOR, _SECOND_FACTOR = (
    np.array(number, np.uint64) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_SHIFT_27, _SHIFT_30, _SHIFT_31 = (np.array(bits, np.uint64) for bits in (27, 30, 31))


def canonical_json(value: Any) -> bytes:
    """Return `value` as JSON with sorted keys and no spaces; equal values give equal bytes."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY)


def digest(value: Any) -> str:
    """Return ``sha256:<64 hex>`` of the canonical JSON of `value`."""
    return "sha256:" + hashlib.sha256(canonical_json(value)).hexdigest()


def digest_bytes(*chunks: bytes) -> str:
    """Return ``sha256:<64 hex>`` of the concatenated chunks."""
    state = hashlib.sha256()
    for chunk in chunks:
        state.update(chunk)
    return "sha256:" + state.hexdigest()


def digest_file(path: Path) -> str:
    """Return ``sha256:<64 hex>`` of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def short(identity: str) -> str:
    """Return the first 8 hexadecimal digits of a digest, for folder names."""
    return identity.removeprefix("sha256:")[:8]


def seed_of(*parts: str | int) -> int:
    """Return a 64-bit seed that depends on every part and on nothing else."""
    return int.from_bytes(hashlib.blake2b(canonical_json(list(parts)), digest_size=8).digest(), "little")


def generator(*parts: str | int) -> np.random.Generator:
    """Return a random generator seeded by :func:`seed_of` of the parts."""
    return np.random.default_rng(seed_of(*parts))


def hash64(seed: int | np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return one uniform uint64 for each integer of `values` (splitmix64 of value xor seed); same shape.

    A uint64 array of seeds is broadcast against the values. Of one seed, different values have different hashes.
    """
    x = np.asarray(values.astype(np.uint64, copy=False) ^ (np.uint64(seed & _MASK) if isinstance(seed, int) else seed))
    # In place: half of the time is otherwise spent on fresh memory.
    x += _STEP
    y = np.right_shift(x, _SHIFT_30, np.empty_like(x))
    x ^= y
    x *= _FIRST_FACTOR
    np.right_shift(x, _SHIFT_27, y)
    x ^= y
    x *= _SECOND_FACTOR
    np.right_shift(x, _SHIFT_31, y)
    x ^= y
    return x
