"""The sparse coder: what it reads, how it encodes, how it decodes. Always float32, whatever comes in.

Owns the equation that all formats share: x -> input rule -> minus b_dec or not -> linear -> activation, and back. Only matching
pursuit has no linear step: it is given the vectors.
Formats (one module each) decide the tensors and the rules; nothing here opens a file.
"""

# Shapes: N rows, D input width, E output width, L latents, M non-zeros.

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autointerp.coders.activations import Activation, Acts, MatchingPursuit, TopK
from autointerp.coders.inputs import InputRule, Undo
from autointerp.coders.top_of_rows import BLOCK_ROWS, TopOfRows, is_worthwhile
from autointerp.errors import InputError

CHUNK_BYTES = 2 << 20
"""Pre-activations held at a time on a CPU, so that they stay in its cache; 256 times that on an accelerator."""
MAX_CHUNK_BYTES = 256 << 20
_MIN_ROWS = 256
"""Rows below which a matrix product mostly waits for the weights; wide coders get so many, within MAX_CHUNK_BYTES."""
_LATENTS_PER_CHUNK = 2048
"""Where latents can be taken apart, on a CPU; 8 times that on an accelerator."""
_BLOCKS_PER_CHUNK = 8


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
        chunks = list(self.encode_chunks(x_ND))
        if len(chunks) == 1:
            return chunks[0]
        empty = torch.zeros(0, dtype=torch.int64, device=self.device)
        return Acts(
            rows=torch.cat([acts.rows for acts in chunks]) if chunks else empty,
            latents=torch.cat([acts.latents for acts in chunks]) if chunks else empty,
            values=torch.cat([acts.values for acts in chunks]) if chunks else empty.float(),
        )

    @torch.no_grad()
    def encode_chunks(self, x_ND: Tensor, /) -> Iterator[Acts]:
        """Yield :meth:`encode` in pieces bounded by memory: of rows where the rule needs all latents, else also of latents."""
        if x_ND.ndim != 2 or x_ND.shape[1] != self.spec.d_in:
            raise InputError(
                f"coder {self.spec.source} reads vectors of width {self.spec.d_in} and was given {tuple(x_ND.shape)}; "
                "name the hookpoint it was trained on"
            )
        width, is_cpu = self.spec.width, self.device.type == "cpu"
        rule = self.activation
        if is_cpu and self.encoder_LD is not None and isinstance(rule, TopK) and is_worthwhile(rule, width):
            yield from self._top_chunks(x_ND, TopOfRows(self.encoder_LD, self.encoder_bias_L, rule.k))
            return
        latents = width if self.activation.needs_all_latents else min(width, _LATENTS_PER_CHUNK * (1 if is_cpu else 8))
        fitting = CHUNK_BYTES * (1 if is_cpu else 256) // (4 * latents)
        rows = max(1, fitting, min(_MIN_ROWS, MAX_CHUNK_BYTES // (4 * latents)))
        for first_row in range(0, len(x_ND), rows):
            ready_ND = self._ready(x_ND[first_row : first_row + rows])
            for first in range(0, width, latents):
                stop = min(first + latents, width)
                if isinstance(self.activation, MatchingPursuit):
                    acts = self.activation.pursue(ready_ND, self.decoder_LE)
                else:
                    acts = self.activation.apply(self._pre_activations(ready_ND, first, stop), first)
                yield Acts(rows=acts.rows + first_row, latents=acts.latents, values=acts.values) if first_row else acts

    def _top_chunks(self, x_ND: Tensor, top: TopOfRows) -> Iterator[Acts]:
        step = BLOCK_ROWS * _BLOCKS_PER_CHUNK
        for first_chunk in range(0, len(x_ND), step):
            blocks = []
            for first_row in range(first_chunk, min(first_chunk + step, len(x_ND)), BLOCK_ROWS):
                rows, latents, values = top.find(self._ready(x_ND[first_row : first_row + BLOCK_ROWS]))
                blocks.append((rows + first_row, latents, values))
            rows, latents, values = (torch.cat(column) for column in zip(*blocks, strict=True))
            yield Acts(rows=rows, latents=latents, values=values)

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
        step = max(1, CHUNK_BYTES // (4 * self.spec.d_out))
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

    def _pre_activations(self, ready_ND: Tensor, first: int, stop: int) -> Tensor:
        """Return new float32 [N, stop - first]."""
        bias = self.encoder_bias_L[first:stop]
        if self.encoder_LD is None:
            return ready_ND[:, first:stop] + bias
        return F.linear(ready_ND, self.encoder_LD[first:stop], bias)

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
