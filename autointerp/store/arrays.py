"""Arrays of a store that are mapped, not read."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np

_MAGIC = b"\x93NUMPY\x01\x00"
"""How a file begins whose header has less than 64 KiB; its length follows in two bytes."""


def mapped(path: Path, *, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the C-ordered array of a ``.npy`` file, mapped and read-only, given what its header says.

    The header is not parsed. numpy does that with `ast.literal_eval`, which in CPython 3.11 fails now and then when several
    threads call it at once (python/cpython#106905).

    Raises: OSError when the file cannot be read; ValueError when it does not hold as many bytes as such an array.
    """
    with path.open("rb") as file:
        start = file.read(len(_MAGIC) + 2)
    header = len(start) + int.from_bytes(start[len(_MAGIC) :], "little")
    size, wanted = path.stat().st_size, header + np.dtype(dtype).itemsize * prod(shape)
    if not start.startswith(_MAGIC) or size != wanted:
        raise ValueError(f"it has {size} bytes; an array of {dtype} and shape {shape} has {wanted}")
    # A plain array: a memmap takes longer over every slice.
    return np.memmap(path, dtype, "r", offset=header, shape=shape).view(np.ndarray)
