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
    is_rectified: bool = True
    """False: what is above a negative threshold is kept, though it is negative."""
    name = "jumprelu"
    needs_all_latents = False

    def apply(self, pre_NL: Tensor, first_latent: int, /) -> Acts:
        threshold = self.threshold[first_latent : first_latent + pre_NL.shape[1]]
        if self.is_rectified:
            return _where(_greater(pre_NL, threshold.clamp(min=0)), pre_NL, first_latent)
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
class Gated:
    """relu(exp(r) * pre + b_mag) where pre + b_gate is positive (gated SAEs, Rajamanoharan et al. 2024); no encoder bias."""

    gate_bias: Tensor
    """float32 [L]."""
    scale: Tensor
    """float32 [L], exp(r)."""
    magnitude_bias: Tensor
    """float32 [L]."""
    name = "gated"
    needs_all_latents = False

    def apply(self, pre_NL: Tensor, first_latent: int, /) -> Acts:
        part = slice(first_latent, first_latent + pre_NL.shape[1])
        rows, latents = (pre_NL + self.gate_bias[part] > 0).nonzero(as_tuple=True)
        values = pre_NL[rows, latents] * self.scale[part][latents] + self.magnitude_bias[part][latents]
        kept = values > 0
        return Acts(rows=rows[kept], latents=latents[kept] + first_latent, values=values[kept])

    def to(self, device: torch.device) -> Gated:
        return Gated(self.gate_bias.to(device), self.scale.to(device), self.magnitude_bias.to(device))


@dataclass(frozen=True)
class MatchingPursuit:
    """One latent after another: the one that points most along what is left, which then loses that part of it.

    Needs the vectors themselves rather than pre-activations: the coder calls :meth:`pursue`. A row ends after `max_iterations`,
    when the norm of what is left is below `residual_threshold` (0: never), or, with `stop_on_repeat`, when a step adds no new
    latent.
    """

    residual_threshold: float
    max_iterations: int
    stop_on_repeat: bool
    name = "matching_pursuit"
    needs_all_latents = True

    def pursue(self, x_ND: Tensor, decoder_LD: Tensor, /) -> Acts:
        """Return the non-zeros of rows that are ready to be encoded."""
        live, left_ND = torch.arange(len(x_ND), device=x_ND.device), x_ND
        chosen_NI = torch.zeros(len(x_ND), 0, dtype=torch.int64, device=x_ND.device)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(self.max_iterations):
            best_N = (left_ND @ decoder_LD.T).argmax(dim=1)
            directions_ND = decoder_LD[best_N]
            values_N = (left_ND * directions_ND).sum(dim=1).relu()
            steps.append((live, best_N, values_N))
            left_ND = left_ND - values_N[:, None] * directions_ND
            goes_on = torch.ones_like(live, dtype=torch.bool)
            if self.stop_on_repeat:
                goes_on &= (values_N > 0) & (chosen_NI != best_N[:, None]).all(dim=1)
            if self.residual_threshold > 0:
                goes_on &= left_ND.norm(dim=1) >= self.residual_threshold
            chosen_NI = torch.cat([chosen_NI, best_N[:, None]], dim=1)[goes_on]
            live, left_ND = live[goes_on], left_ND[goes_on]
            if not len(live):
                break
        rows, latents, values = (torch.cat(parts) for parts in zip(*steps, strict=True))
        keys, inverse = torch.unique(rows * len(decoder_LD) + latents, return_inverse=True)
        sums = torch.zeros(len(keys), device=x_ND.device).index_add_(0, inverse, values)
        kept = sums != 0
        return Acts(rows=keys[kept] // len(decoder_LD), latents=keys[kept] % len(decoder_LD), values=sums[kept])

    def to(self, device: torch.device) -> MatchingPursuit:
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
