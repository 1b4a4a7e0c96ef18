"""Activation functions: from pre-activations to the non-zero latents.

Every rule is exact in float32. TopK and GroupMax see all latents of a row at once, so that they are chunked over rows; the rest
act on one latent at a time and are chunked over latents. No rule writes its result into a dense array.
"""

# Shapes: N rows, L latents, M non-zeros.

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Acts:
    """The non-zero activations of N rows; in no particular order."""

    rows: Tensor
    """int64 [M], row of the input, 0..N-1."""
    latents: Tensor
    """int64 [M]."""
    values: Tensor
    """float32 [M], never 0; negative only where the coder's rule gives negative values."""

    def __len__(self) -> int:
        return len(self.rows)


class Activation(Protocol):
    """Turns pre-activations into non-zeros."""

    name: str
    needs_all_latents: bool
    """True: `apply` must be given all latents of a row."""

    def apply(self, pre_NL: Tensor, first_latent: int, /) -> Acts:
        """Return the non-zeros; `pre_NL` holds latents first_latent, first_latent + 1, ... and may be overwritten."""

    def to(self, device: torch.device) -> Activation: ...


@dataclass(frozen=True)
class Relu:
    """Positive pre-activations."""

    name = "relu"
    needs_all_latents = False

    def apply(self, pre_NL: Tensor, first_latent: int, /) -> Acts:
        return _where(_greater(pre_NL, torch.zeros(1, device=pre_NL.device)), pre_NL, first_latent)

    def to(self, device: torch.device) -> Relu:
        return self


@dataclass(frozen=True)
class JumpRelu:
    """Pre-activations that are positive and strictly above the latent's threshold, unchanged."""

    threshold: Tensor
    """float32 [L]."""
    name = "jumprelu"
    needs_all_latents = False

    def apply(self, pre_NL: Tensor, first_latent: int, /) -> Acts:
        threshold = self.threshold[first_latent : first_latent + pre_NL.shape[1]]
        return _where(_greater(pre_NL, threshold.clamp(min=0)), pre_NL, first_latent)

    def to(self, device: torch.device) -> JumpRelu:
        return JumpRelu(self.threshold.to(device))


@dataclass(frozen=True)
class TopK:
    """The k largest positive pre-activations of each row (fewer where fewer are positive); `signed`: largest by magnitude."""

    k: int
    signed: bool = False
    name = "topk"
    needs_all_latents = True

    def apply(self, pre_NL: Tensor, first_latent: int, /) -> Acts:
        assert first_latent == 0, "top-k needs every latent of a row"
        if self.signed:
            latents_NK = pre_NL.abs().topk(self.k, dim=1, sorted=False).indices
            values_NK = pre_NL.gather(1, latents_NK)
            return _kept(values_NK != 0, latents_NK, values_NK)
        values_NK, latents_NK = pre_NL.topk(self.k, dim=1, sorted=False)
        return _kept(values_NK > 0, latents_NK, values_NK)

    def to(self, device: torch.device) -> TopK:
        return self


@dataclass(frozen=True)
class GroupMax:
    """The largest positive pre-activation of each of k contiguous groups of latents."""

    k: int
    name = "groupmax"
    needs_all_latents = True

    def apply(self, pre_NL: Tensor, first_latent: int, /) -> Acts:
        assert first_latent == 0, "group maxima need every latent of a row"
        size = pre_NL.shape[1] // self.k
        values_NK, within_NK = pre_NL.view(len(pre_NL), self.k, size).max(dim=2)
        latents_NK = within_NK + torch.arange(self.k, device=pre_NL.device) * size
        return _kept(values_NK > 0, latents_NK, values_NK)

    def to(self, device: torch.device) -> GroupMax:
        return self


def _greater(pre_NL: Tensor, bound_L: Tensor) -> Tensor:
    if pre_NL.device.type == "cpu":  # several times faster than torch's comparison
        return torch.from_numpy(np.greater(pre_NL.numpy(), bound_L.numpy()))
    return pre_NL > bound_L


def _where(mask_NL: Tensor, pre_NL: Tensor, first_latent: int) -> Acts:
    if mask_NL.device.type == "cpu":
        # Several times faster than torch's nonzero and indexing on a CPU.
        at = np.flatnonzero(mask_NL.numpy())
        values = pre_NL.contiguous().numpy().reshape(-1)[at]
        rows, latents = (torch.from_numpy(found) for found in np.divmod(at, mask_NL.shape[1]))
        return Acts(rows=rows, latents=latents + first_latent, values=torch.from_numpy(values))
    rows, latents = mask_NL.nonzero(as_tuple=True)
    return Acts(rows=rows, latents=latents + first_latent, values=pre_NL[rows, latents])


def _kept(mask_NK: Tensor, latents_NK: Tensor, values_NK: Tensor) -> Acts:
    rows = mask_NK.nonzero(as_tuple=True)[0]
    return Acts(rows=rows, latents=latents_NK[mask_NK], values=values_NK[mask_NK])
