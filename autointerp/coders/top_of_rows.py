"""The k largest positive pre-activations of each row on a CPU, without an array of (rows x latents) and without sorting rows.

A block of rows is multiplied with a slice of the latents at a time, into a buffer that stays in the cache. Of each group of
`_GROUP` latents the maximum is taken; the k-th largest maximum so far is at most the row's k-th largest value, since k groups
reach it. So the top k lie in groups that reach it when their slice is seen, and only those few are looked into. The result is
exact. Rows whose k-th value is tied are computed again for `torch.topk`, so that its choice among equals is kept.
"""

# Shapes: N rows, D input width, L latents, S latents of a slice, G groups of a slice, P groups looked into, M values found.

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from autointerp.coders.activations import TopK

BLOCK_ROWS = 256
_GROUP_BITS, _STRIDE_BITS = 4, 7
_GROUP = 1 << _GROUP_BITS
_STRIDE = 1 << _STRIDE_BITS
"""A group is every 128th latent of a slice, so that maxima over groups are vector instructions."""
SLICE = _GROUP * _STRIDE
_TINY = np.nextafter(np.float32(0), np.float32(1))


def is_worthwhile(activation: TopK, width: int) -> bool:
    """Return whether groups are many enough, compared with k, for most of them to be left alone."""
    return not activation.signed and width >= 4 * _GROUP * activation.k


class TopOfRows:
    """The top k of one linear map; not for several threads at once."""

    def __init__(self, encoder_LD: Tensor, bias_L: Tensor, k: int) -> None:
        self._encoder, self._bias, self._k = encoder_LD, bias_L, k
        self._pre_NS = torch.empty(BLOCK_ROWS, SLICE)
        self._maxima_NG = torch.empty(BLOCK_ROWS, _STRIDE)

    def find(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (rows int64, latents int64, values float32) [M] of up to `BLOCK_ROWS` rows float32 [N, D]."""
        num_rows, k = len(x_ND), self._k
        best_NK = np.zeros((num_rows, k), np.float32)
        bound_N = np.full(num_rows, _TINY)
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for first, pre_NS in self._slices(x_ND):
            maxima_NG = self._maxima_NG[:num_rows]
            torch.amax(pre_NS.view(num_rows, _GROUP, _STRIDE), 1, out=maxima_NG)
            both = np.concatenate([best_NK, maxima_NG.numpy()], axis=1)
            both.partition(_STRIDE, axis=1)
            best_NK = both[:, _STRIDE:]
            bound_N = np.maximum(both[:, _STRIDE], _TINY)
            rows, latents, values = _reaching(pre_NS.numpy(), maxima_NG.numpy(), bound_N)
            found.append((rows, latents + first, values))
        rows, latents, values = (np.concatenate(column) for column in zip(*found, strict=True))
        least_N, tied = _least(rows, values, bound_N, k)
        kept = np.flatnonzero(values >= least_N[rows])
        rows, latents, values = rows[kept], latents[kept], values[kept]
        if len(tied):
            again = self._again(x_ND, tied)
            rows, latents, values = (np.concatenate(pair) for pair in zip((rows, latents, values), again, strict=True))
        return torch.from_numpy(rows), torch.from_numpy(latents), torch.from_numpy(values)

    def _slices(self, x_ND: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the first latent and float32 [N, SLICE] of each slice; what the last one lacks is below everything."""
        pre_NS = self._pre_NS[: len(x_ND)]
        for first in range(0, len(self._encoder), SLICE):
            stop = min(first + SLICE, len(self._encoder))
            torch.addmm(self._bias[first:stop], x_ND, self._encoder[first:stop].T, out=pre_NS[:, : stop - first])
            pre_NS[:, stop - first :] = -torch.inf
            yield first, pre_NS

    def _again(self, x_ND: Tensor, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the top k of some rows by `torch.topk`, from the same products."""
        chosen = torch.from_numpy(rows)
        pre_NL = torch.cat([pre_NS[chosen] for _, pre_NS in self._slices(x_ND)], dim=1)
        values_NK, latents_NK = pre_NL[:, : len(self._encoder)].topk(self._k, dim=1, sorted=False)
        return np.repeat(rows, self._k), latents_NK.numpy().reshape(-1), values_NK.numpy().reshape(-1)


def _reaching(pre_NS: np.ndarray, maxima_NG: np.ndarray, bound_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (rows, latents within the slice, values) of what reaches its row's bound."""
    at_P = np.flatnonzero(maxima_NG >= bound_N[:, None])
    # Divisions by powers of two: numpy's own are many times slower than shifts.
    row_P, group_P = at_P >> _STRIDE_BITS, at_P & (_STRIDE - 1)
    found = pre_NS.reshape(-1).take((row_P * SLICE + group_P)[:, None] + np.arange(0, SLICE, _STRIDE))
    reaching = np.flatnonzero(found >= bound_N[row_P, None])
    of_M = reaching >> _GROUP_BITS
    return row_P[of_M], group_P[of_M] + (reaching & (_GROUP - 1)) * _STRIDE, found.reshape(-1)[reaching]


def _least(rows: np.ndarray, values: np.ndarray, bound_N: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest value of each row's top k, and the rows where the next one equals it: there nothing is reached."""
    reaching = values >= bound_N[rows]
    counts = np.bincount(rows[reaching], minlength=len(bound_N))
    crowded = counts > k
    least_N = bound_N.copy()
    if not crowded.any():
        return least_N, np.zeros(0, np.int64)
    # The bits of positive floats are ordered as the floats are: one sort of one integer each ranks all crowded rows.
    where = reaching & crowded[rows]
    bits = values[where].view(np.uint32)
    ranked = np.sort(rows[where].astype(np.uint64) << np.uint64(32) | (~bits).astype(np.uint64))
    last = np.cumsum(counts[crowded]) - counts[crowded] + k - 1
    least_N[crowded] = (~ranked[last].astype(np.uint32)).view(np.float32)
    tied = np.flatnonzero(crowded)[ranked[last] == ranked[last + 1]]
    least_N[tied] = np.inf
    return least_N, tied
