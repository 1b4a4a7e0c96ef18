"""Activation functions: from pre-activations to the non-zero latents.

Every rule is exact in float32. TopK and GroupMax see all latents of a row at once, so that they are chunked over rows; the rest
act on one latent at a time and are chunked over latents. No rule writes its result into a dense array.
"""

# Shapes: N rows, L latents, M non-zeros.

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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
        return _where(pre_NL > 0, pre_NL, first_latent)

    def to(self, device: torch.device) -> Relu:
        return self


@dataclass(frozen=True)
class JumpRelu:
    """Pre-activations that are positive and strictly above the latent's threshold, unchanged."""

    threshold: Tensor
    """float32 [L]."""
    is_rectified: bool = True
    """False: what is above a negative threshold is kept, though it is negative."""
    name = "jumprelu"
    needs_all_latents = False

    def apply(self, pre_NL: Tensor, first_latent: int, /) -> Acts:
        threshold = self.threshold[first_latent : first_latent + pre_NL.shape[1]]
        if self.is_rectified:
            return _where(pre_NL > threshold.clamp(min=0), pre_NL, first_latent)
        return _where((pre_NL > threshold) & (pre_NL != 0), pre_NL, first_latent)

    def to(self, device: torch.device) -> JumpRelu:
        return JumpRelu(self.threshold.to(device), self.is_rectified)


@dataclass(frozen=True)
class TopK:
    """The k largest positive pre-activations of each row (fewer where fewer are positive); `signed`: largest by magnitude.

    With `is_rectified` False they are the k largest, positive or not.
    """

    k: int
    signed: bool = False
    is_rectified: bool = True
    name = "topk"
    needs_all_latents = True

    def apply(self, pre_NL: Tensor, first_latent: int, /) -> Acts:
        assert first_latent == 0, "top-k needs every latent of a row"
        if self.signed:
            latents_NK = pre_NL.abs().topk(self.k, dim=1, sorted=False).indices
            values_NK = pre_NL.gather(1, latents_NK)
            return _kept(values_NK != 0, latents_NK, values_NK)
        values_NK, latents_NK = pre_NL.topk(self.k, dim=1, sorted=False)
        return _kept(values_NK > 0 if self.is_rectified else values_NK != 0, latents_NK, values_NK)

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


@dataclass(frozen=True)
class ScaledTopK:
    """Top-k chosen by pre-activations times a factor of each latent; the values are without it."""

    inner: TopK
    factor: Tensor
    """float32 [L], above 0: the norm of what the latent writes."""
    name = "topk"
    needs_all_latents = True

    def apply(self, pre_NL: Tensor, first_latent: int, /) -> Acts:
        acts = self.inner.apply(pre_NL * self.factor, first_latent)
        return Acts(rows=acts.rows, latents=acts.latents, values=acts.values / self.factor[acts.latents])

    def to(self, device: torch.device) -> ScaledTopK:
        return ScaledTopK(self.inner, self.factor.to(device))


def _where(mask_NL: Tensor, pre_NL: Tensor, first_latent: int) -> Acts:
    rows, latents = mask_NL.nonzero(as_tuple=True)
    return Acts(rows=rows, latents=latents + first_latent, values=pre_NL[rows, latents])


def _kept(mask_NK: Tensor, latents_NK: Tensor, values_NK: Tensor) -> Acts:
    rows = mask_NK.nonzero(as_tuple=True)[0]
    return Acts(rows=rows, latents=latents_NK[mask_NK], values=values_NK[mask_NK])
