"""The sparse coder: what it reads, how it encodes, how it decodes. Always float32, whatever comes in.

Owns the equation that all formats share: x -> input rule -> minus b_dec or not -> linear -> activation, and back. Only matching
pursuit has no linear step: it is given the vectors.
Formats (one module each) decide the tensors and the rules; nothing here opens a file.
"""

# Shapes: N rows, D input width, E output width, L latents, M non-zeros.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from autointerp.coders.activations import Activation, Acts, MatchingPursuit, TopK
from autointerp.coders.inputs import InputRule, Undo
from autointerp.coders.top_of_rows import BLOCK_ROWS, TopOfRows, is_worthwhile
from autointerp.errors import InputError

ACTS_PER_CHUNK = 1 << 16
"""Activations that are given away at a time, or a few more: so many that who takes them is not busy with many small arrays."""
PIECE_BYTES = 2 << 20
"""Pre-activations held at a time on a CPU, so that they stay in its cache; 256 times that on an accelerator."""
MAX_PIECE_BYTES = 256 << 20
_MIN_ROWS = 256
"""Rows below which a matrix product mostly waits for the weights; wide coders get so many, within MAX_PIECE_BYTES."""
_LATENTS_PER_PIECE = 2048
"""Where latents can be taken apart, on a CPU; 8 times that on an accelerator."""


@dataclass(frozen=True, kw_only=True)
class CoderSpec:
    """What is known of a coder besides its tensors."""

    format: str
    source: str
    revision: str | None = None
    digest: str
    """Digest of the tensors as they are in the file."""
    width: int
    d_in: int
    d_out: int
    activation: str
    k: int | None = None
    hookpoint: str | None = None
    """``MODULE.PATH@in|@out`` as published (resolved against the subject later), or None when the files do not say."""
    target: str | None = None
    """Hookpoint that a transcoder predicts; None for an SAE."""
    is_transcoder: bool = False
    reconstructs: bool = True
    """Whether it was made to reconstruct or predict; neurons, given directions and random ones were not."""
    reading: Mapping[str, Any] = field(default_factory=dict)
    """Rules that change the activations (``subtract_b_dec``, ``signed``, ``inputs``), as JSON values: part of the identity."""
    model: str | None = None
    """The subject as the files name it, or None when they do not."""
    l0: float | None = None
    """Mean number of active latents per token, as published."""
    inferred: Mapping[str, str] = field(default_factory=dict)
    """Fields that no file states -> what they were taken from, such as ``{"k": "the repository's name"}``."""
    notes: tuple[str, ...] = ()
    """What a user should know about the release, one sentence each."""
    labels: tuple[str, ...] = ()
    """A name for each latent, where the source gives names; else empty."""


@dataclass(frozen=True, kw_only=True)
class Coder:
    """A sparse coder on one hookpoint."""

    spec: CoderSpec
    encoder_LD: Tensor | None
    """None is the identity: latent l is coordinate l of what comes in, and nothing is multiplied."""
    encoder_bias_L: Tensor
    decoder_LE: Tensor
    decoder_bias_E: Tensor
    activation: Activation | MatchingPursuit
    skip_ED: Tensor | None = None
    """Added to the output as ``x @ skip.T``, with x as the hook gives it (:meth:`hooked`), before the coder's own rules."""
    subtract_decoder_bias: bool = False
    inputs: tuple[InputRule, ...] = ()
    """Applied in this order, before the bias is subtracted; `spec.reading` names them."""
    decoded_shift_L: Tensor | None = None
    """Added to each activation when it is decoded, never to what :meth:`encode` gives: a bias behind the encoder."""

    @property
    def device(self) -> torch.device:
        return self.decoder_LE.device

    def to(self, device: str | torch.device) -> Coder:
        """Return the coder with its tensors on `device`; itself when they are there."""
        target = torch.device(device)
        if target == self.device:
            return self
        return replace(
            self,
            encoder_LD=None if self.encoder_LD is None else self.encoder_LD.to(target),
            encoder_bias_L=self.encoder_bias_L.to(target),
            decoder_LE=self.decoder_LE.to(target),
            decoder_bias_E=self.decoder_bias_E.to(target),
            activation=self.activation.to(target),
            skip_ED=None if self.skip_ED is None else self.skip_ED.to(target),
            decoded_shift_L=None if self.decoded_shift_L is None else self.decoded_shift_L.to(target),
        )

    def reading_through(self, *rules: InputRule) -> Coder:
        """Return the coder with the rules of its hook put before its own, and recorded in its reading."""
        if not rules:
            return self
        inputs = (*rules, *self.inputs)
        reading = {**self.spec.reading, "inputs": [rule.name for rule in inputs]}
        return replace(self, inputs=inputs, spec=replace(self.spec, reading=reading))

    def hooked(self, x_ND: Tensor, /) -> Tensor:
        """Return float32 [N, D] after the leading rules that are never undone: the tensor that the hook stands for."""
        ready = x_ND.to(self.device, torch.float32)
        for rule in self.inputs:
            changed, undo = rule.apply(ready)
            if undo is not None:
                break
            ready = changed
        return ready

    @torch.no_grad()
    def encode(self, x_ND: Tensor, /) -> Acts:
        """Return the non-zero activations of each row; `x_ND` of any floating type.

        Raises: InputError when the rows are not `spec.d_in` wide.
        """
        return _joined(list(self.encode_chunks(x_ND)), self.device)

    @torch.no_grad()
    def encode_chunks(self, x_ND: Tensor, /) -> Iterator[Acts]:
        """Yield :meth:`encode` in chunks of some `ACTS_PER_CHUNK`, made from pieces bounded by memory."""
        if x_ND.ndim != 2 or x_ND.shape[1] != self.spec.d_in:
            raise InputError(
                f"coder {self.spec.source} reads vectors of width {self.spec.d_in} and was given {tuple(x_ND.shape)}; "
                "name the hookpoint it was trained on"
            )
        pieces, num_acts = list[Acts](), 0
        for piece in self._pieces(x_ND):
            pieces.append(piece)
            num_acts += len(piece)
            if num_acts >= ACTS_PER_CHUNK:
                yield _joined(pieces, self.device)
                pieces, num_acts = [], 0
        if pieces:
            yield _joined(pieces, self.device)

    def _pieces(self, x_ND: Tensor) -> Iterator[Acts]:
        """Yield the activations of a few rows where the rule needs all latents, else also of a few latents."""
        width, is_cpu = self.spec.width, self.device.type == "cpu"
        rule = self.activation
        if is_cpu and self.encoder_LD is not None and isinstance(rule, TopK) and is_worthwhile(rule, width):
            top = TopOfRows(self.encoder_LD, self.encoder_bias_L, rule.k)
            for first_row in range(0, len(x_ND), BLOCK_ROWS):
                rows, latents, values = top.find(self._ready(x_ND[first_row : first_row + BLOCK_ROWS]))
                yield Acts(rows=rows + first_row, latents=latents, values=values)
            return
        num_latents = width if rule.needs_all_latents else min(width, _LATENTS_PER_PIECE * (1 if is_cpu else 8))
        fitting = PIECE_BYTES * (1 if is_cpu else 256) // (4 * num_latents)
        num_rows = max(1, fitting, min(_MIN_ROWS, MAX_PIECE_BYTES // (4 * num_latents)))
        # One buffer for all products: fresh ones, each between results that stay, would leave as many holes in memory.
        rows_multiplied = 0 if isinstance(rule, MatchingPursuit) else min(num_rows, len(x_ND))
        pre_NL = torch.empty(rows_multiplied, num_latents, device=self.device)
        for first_row in range(0, len(x_ND), num_rows):
            ready_ND = self._ready(x_ND[first_row : first_row + num_rows])
            for first in range(0, width, num_latents):
                stop = min(first + num_latents, width)
                if isinstance(rule, MatchingPursuit):
                    acts = rule.pursue(ready_ND, self.decoder_LE)
                else:
                    acts = rule.apply(self._pre_activations(ready_ND, first, stop, out=pre_NL), first)
                yield Acts(rows=acts.rows + first_row, latents=acts.latents, values=acts.values) if first_row else acts

    def encode_dense(self, x_ND: Tensor, /) -> Tensor:
        """Return float32 [N, L], zeros included: for a few rows at a time."""
        acts = self.encode(x_ND)
        dense = torch.zeros(len(x_ND), self.spec.width, device=self.device)
        dense[acts.rows, acts.latents] = acts.values
        return dense

    @torch.no_grad()
    def decode(self, acts: Acts, x_ND: Tensor, /) -> Tensor:
        """Return the reconstruction (for a transcoder: the prediction) float32 [N, E]; `x_ND` as given to :meth:`encode`."""
        out_NE = self.decoder_bias_E.repeat(len(x_ND), 1)
        step = max(1, PIECE_BYTES // (4 * self.spec.d_out))
        for start in range(0, len(acts), step):
            part = slice(start, start + step)
            latents, values = acts.latents[part], acts.values[part]
            if self.decoded_shift_L is not None:
                values = values + self.decoded_shift_L[latents]
            out_NE.index_add_(0, acts.rows[part], self.decoder_LE[latents] * values[:, None])
        for undo in reversed(self._apply_inputs(x_ND)[1]):
            out_NE = out_NE * undo.scale_N1 + undo.shift_N1
        if self.skip_ED is not None:
            out_NE += self.hooked(x_ND) @ self.skip_ED.T
        return out_NE

    def decoder_rows(self) -> Tensor:
        """Return float32 [L, E], what each latent writes."""
        return self.decoder_LE

    def encoder_rows(self) -> Tensor:
        """Return float32 [L, D], what each latent reads.

        Raises: InputError when each latent is one coordinate of what comes in: those directions have nothing in common.
        """
        if self.encoder_LD is None:
            raise InputError(
                f"coder {self.spec.source} reads one coordinate per latent, so no two of its encoder rows are alike"
            )
        return self.encoder_LD

    def describe(self) -> dict[str, Any]:
        """Return the spec and whether there is a skip connection, as JSON values."""
        return asdict(self.spec) | {"reading": dict(self.spec.reading), "has_skip": self.skip_ED is not None}

    def _pre_activations(self, ready_ND: Tensor, first: int, stop: int, *, out: Tensor) -> Tensor:
        """Return float32 [N, stop - first], in the corner of `out`."""
        out_NL = out[: len(ready_ND), : stop - first]
        bias = self.encoder_bias_L[first:stop]
        if self.encoder_LD is None:
            return torch.add(ready_ND[:, first:stop], bias, out=out_NL)
        return torch.addmm(bias, ready_ND, self.encoder_LD[first:stop].T, out=out_NL)

    def _ready(self, x_ND: Tensor) -> Tensor:
        ready, _ = self._apply_inputs(x_ND)
        return ready - self.decoder_bias_E if self.subtract_decoder_bias else ready

    def _apply_inputs(self, x_ND: Tensor) -> tuple[Tensor, list[Undo]]:
        """Return the rows after the input rules, and what undoes them on the output: nothing, for a transcoder."""
        ready, undos = x_ND.to(self.device, torch.float32), []
        for rule in self.inputs:
            ready, undo = rule.apply(ready)
            if undo is not None and not self.spec.is_transcoder:
                undos.append(undo)
        return ready, undos


def _joined(pieces: Sequence[Acts], device: torch.device) -> Acts:
    if len(pieces) == 1:
        return pieces[0]
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    return Acts(
        rows=torch.cat([empty, *(acts.rows for acts in pieces)]),
        latents=torch.cat([empty, *(acts.latents for acts in pieces)]),
        values=torch.cat([empty.float(), *(acts.values for acts in pieces)]),
    )
