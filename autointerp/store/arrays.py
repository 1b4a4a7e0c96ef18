"""Arrays that need not be in memory as a whole: written block by block, and mapped. And memory that is given back."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from autointerp.errors import StoreError

_MAGIC = b"\x93NUMPY\x01\x00"
"""How a file begins whose header has less than 64 KiB; its length follows in two bytes."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """An array that is made in blocks along its first axis."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Iterator[np.ndarray]]
    """Yields the blocks in order; called whenever they are wanted."""

    def checked(self) -> Iterator[np.ndarray]:
        """Yield the blocks.

        Raises: StoreError at the end when they are not as many rows as they should be.
        """
        num_rows = 0
        for block in self.make():
            num_rows += len(block)
            yield block
        if num_rows != self.shape[0]:
            raise StoreError(
                f"blocks of {num_rows} rows were made for an array of {self.shape[0]}: what they are made of was changed or is "
                "damaged; `autointerp verify` says where"
            )

    def whole(self) -> np.ndarray:
        """Return the array, in memory. Raises: StoreError as :meth:`checked`."""
        return np.concatenate([np.zeros((0, *self.shape[1:]), self.dtype), *self.checked()], dtype=self.dtype)


def write_blocks(file: BinaryIO, blocks: Iterable[np.ndarray], *, dtype: str, shape: tuple[int, ...]) -> int:
    """Write an array as ``.npy``; return how many rows the blocks had, which should be ``shape[0]``."""
    # Written, not mapped: a full disk is an error of a write, and a deadly signal where memory is mapped.
    np.lib.format.write_array_header_1_0(file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})
    num_rows = 0
    for block in blocks:
        num_rows += len(block)
        file.write(np.ascontiguousarray(block, dtype).tobytes())
    return num_rows


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


def forget_pages(array: np.ndarray) -> None:
    """Let the memory of a mapped array go; what is touched again is read again. Does nothing to others."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def give_back_memory() -> None:
    """Return to the system what was freed: pyarrow keeps it for later, and so does the C library of Linux."""
    pa.default_memory_pool().release_unused()
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
