"""Input rules: what happens to a vector of the subject before a coder's bias and encoder see it.

A coder has a sequence of them, usually none. Some are part of the hook (a tensor that no module emits, such as a norm before
its gain); some belong to the coder, and these are undone on what it decodes. All in float32.
"""

# Shapes: N rows, D width.

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

CENTRED_HOOK = re.compile(r"(?:.*\.)?hook_(?:resid_pre|resid_mid|resid_post|attn_out|mlp_out|embed)")
"""What TransformerLens centres: everything that a LayerNorm model's blocks read from and write to their residual stream."""


@dataclass(frozen=True)
class Undo:
    """Takes a reconstruction back to the scale of the input: ``out * scale + shift``."""

    scale_N1: Tensor
    shift_N1: Tensor | float = 0.0


class InputRule(Protocol):
    """One step from the vectors read to the vectors encoded."""

    name: ClassVar[str]

    def apply(self, x_ND: Tensor, /) -> tuple[Tensor, Undo | None]:
        """Return float32 [N, D] and how to undo the step on the output, None where that is not done."""


@dataclass(frozen=True)
class Centre:
    """x minus its mean: the residual stream of a LayerNorm model whose writing weights were centred; not undone."""

    name: ClassVar[str] = "centre"

    def apply(self, x_ND: Tensor, /) -> tuple[Tensor, None]:
        return x_ND - x_ND.mean(dim=1, keepdim=True), None


@dataclass(frozen=True)
class Rms:
    """x over its root mean square: an RMSNorm before its gain; not undone."""

    eps: float = 1e-6
    name: ClassVar[str] = "rms"

    def apply(self, x_ND: Tensor, /) -> tuple[Tensor, None]:
        return x_ND * torch.rsqrt(x_ND.pow(2).mean(dim=1, keepdim=True) + self.eps), None


@dataclass(frozen=True)
class LayerNorm:
    """x centred, over its population standard deviation: a LayerNorm before its gain and bias; not undone."""

    eps: float = 1e-5
    name: ClassVar[str] = "layer_norm"

    def apply(self, x_ND: Tensor, /) -> tuple[Tensor, None]:
        centred = x_ND - x_ND.mean(dim=1, keepdim=True)
        return centred * torch.rsqrt(centred.pow(2).mean(dim=1, keepdim=True) + self.eps), None


@dataclass(frozen=True)
class Standardise:
    """(x - mean) / (sample standard deviation + eps); undone by that deviation, without eps, and the mean."""

    eps: float = 1e-5
    name: ClassVar[str] = "standardise"

    def apply(self, x_ND: Tensor, /) -> tuple[Tensor, Undo]:
        mean = x_ND.mean(dim=1, keepdim=True)
        std = (x_ND - mean).std(dim=1, keepdim=True)
        return (x_ND - mean) / (std + self.eps), Undo(std, mean)


@dataclass(frozen=True)
class Matched:
    """x moved and scaled to another mean and spread, all coordinates by one factor; not undone."""

    mean_D: Tensor
    """What `x` has."""
    wanted_mean_D: Tensor
    scale: float
    """Wanted spread over the one `x` has."""
    name: ClassVar[str] = "matched"

    def apply(self, x_ND: Tensor, /) -> tuple[Tensor, None]:
        return (x_ND - self.mean_D.to(x_ND.device)) * self.scale + self.wanted_mean_D.to(x_ND.device), None


@dataclass(frozen=True)
class UnitNorm:
    """x scaled to a norm of sqrt(D); the output is scaled back. A zero vector stays zero."""

    name: ClassVar[str] = "unit_norm"

    def apply(self, x_ND: Tensor, /) -> tuple[Tensor, Undo]:
        norm = x_ND.norm(dim=1, keepdim=True) / x_ND.shape[1] ** 0.5
        safe = torch.where(norm > 0, norm, torch.ones_like(norm))
        return x_ND / safe, Undo(safe)
