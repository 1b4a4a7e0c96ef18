"""Nearest neighbours of latents by the cosine of their weights, a block of latents against all at a time.

Takes a plain matrix, so that whoever holds the weights need not be imported here.
"""

# Shapes: L latents, D width, B latents of a block.

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from autointerp.errors import InputError
from autointerp.store.neighbours import Ranked, ranked

ENTRIES_PER_BLOCK = 1 << 23
"""Similarities held at a time."""
_DECIMALS = 6


def nearest_by_cosine(rows_LD: np.ndarray, *, k: int, entries: int = ENTRIES_PER_BLOCK) -> Iterator[Ranked]:
    """Yield for every latent in order its `k` nearest by cosine, in blocks; `rows_LD` are float32, on disk or in memory.

    Cosines are rounded to six decimals, and equal ones ordered by index: the order of rows that are copies of each other does
    not depend on how a product was split. A row of zeros has no neighbours and is nobody's.

    Raises: InputError when the rows are no matrix of finite numbers.
    """
    if rows_LD.ndim != 2:
        raise InputError(f"the weights have the shape {rows_LD.shape}; expected one row per latent")
    width = len(rows_LD)
    step = max(1, entries // max(1, width))
    norms = np.concatenate(
        [np.zeros(0, np.float32), *(np.linalg.norm(rows_LD[low : low + step], axis=1) for low in range(0, width, step))]
    )
    if not np.isfinite(norms).all():
        raise InputError(f"row {int(np.argmin(np.isfinite(norms)))} of the weights is not finite; the coder's file is damaged")
    is_zero = norms == 0
    norms[is_zero] = 1
    for first in range(0, width, step):
        mine = rows_LD[first : first + step] / norms[first : first + step, None]
        similarity = mine @ rows_LD.T
        similarity /= norms
        np.round(similarity, _DECIMALS, out=similarity)
        similarity[:, is_zero] = -np.inf
        similarity[is_zero[first : first + step]] = -np.inf
        columns = np.tile(np.arange(width, dtype=np.int32), len(mine))
        starts = np.arange(len(mine) + 1) * width
        yield ranked(first, starts, columns, similarity.ravel(), k=k)
