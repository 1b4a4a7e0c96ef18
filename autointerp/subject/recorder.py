"""From contexts to activations: one forward pass for all coders, the token filter, and flat non-zeros on the host.

Owns the batches, BOS and the filter. Tokens go to the device, indices and values come back; nothing is sorted and no array of
(tokens x latents) exists beyond what a coder holds at a time.
"""

# Shapes: B contexts, T tokens, D width, N kept tokens, M activations.

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from autointerp.coders.coder import Coder
from autointerp.errors import ConfigError, InputError, nearest
from autointerp.subject.corpus import Context
from autointerp.subject.hooks import read_hookpoints
from autointerp.subject.host import HostCopy
from autointerp.subject.model import Subject

_FIRST = re.compile(r"first:(\d+)")
_NAMES = ("bos", "special", "template", "first:N", "none")


@dataclass(frozen=True)
class TokenFilter:
    """Which corpus tokens' activations are dropped. The BOS that is prepended has no position and never has any."""

    bos: bool = False
    special: bool = False
    template: bool = False
    first: int = 0

    @staticmethod
    def parse(text: str) -> TokenFilter:
        """Return the filter named ``bos``, ``special``, ``template``, ``first:N``, several of them with commas, or ``none``.

        Raises: ConfigError for any other name.
        """
        names = [name.strip() for name in text.split(",")]
        if names == ["none"]:
            return TokenFilter()
        first = [int(match[1]) for name in names if (match := _FIRST.fullmatch(name))]
        for name in names:
            if name not in ("bos", "special", "template") and not _FIRST.fullmatch(name):
                raise ConfigError(f"token_filter = {text!r} cannot be used: {name!r} is no filter; {nearest(name, _NAMES)}")
        # BOS is the one token that every filter but "none" drops.
        return TokenFilter(bos=True, special="special" in names, template="template" in names, first=max(first, default=0))

    @property
    def name(self) -> str:
        """The one way to write this filter, for the store's identity."""
        parts = [name for name, is_on in (("special", self.special), ("template", self.template)) if is_on]
        parts += [f"first:{self.first}"] if self.first else []
        return ",".join(parts) or ("bos" if self.bos else "none")


@dataclass(frozen=True)
class Reading:
    """A coder and the hookpoint it reads, by its full name."""

    coder: Coder
    hookpoint: str
    subject: Subject | None = None
    """The model it reads where that is not the recorder's: a control with the same tokenizer and other weights."""


@dataclass(frozen=True)
class Activations:
    """Non-zeros of one coder, in no particular order; who asks for the arrays waits until they are on the host."""

    coder: str
    _copy: HostCopy

    @property
    def latents(self) -> np.ndarray:
        """uint32 [M]."""
        return self._copy.arrays()[0].view(np.uint32)

    @property
    def positions(self) -> np.ndarray:
        """int64 [M], counted from the first context that was given."""
        return self._copy.arrays()[1]

    @property
    def values(self) -> np.ndarray:
        """float32 [M]."""
        return self._copy.arrays()[2]


class Recorder:
    """Runs the subject over contexts and encodes what the coders read."""

    def __init__(
        self, subject: Subject, readings: Mapping[str, Reading], *, ctx_len: int, token_filter: TokenFilter, batch_tokens: int
    ) -> None:
        """Check that the coders fit their hookpoints and the contexts the subject.

        Raises: InputError when one does not, with both numbers.
        """
        self._subject = subject
        self._groups: list[tuple[Subject, dict[str, Reading]]] = []
        for name, reading in readings.items():
            self._group(reading.subject or subject)[name] = reading
        self._ctx_len = ctx_len
        self._filter = token_filter
        self._batch_tokens = batch_tokens
        bos = subject.bos_id
        self._bos = [] if bos is None else [bos]
        self._dropped = self._dropped_ids()
        self.seconds = dict.fromkeys(readings, 0.0)
        """Time spent encoding, by coder."""
        longest = subject.max_context
        if longest is not None and ctx_len + len(self._bos) > longest:
            raise InputError(
                f"contexts of {ctx_len} tokens{' and BOS' if self._bos else ''} do not fit {subject.name}, which has positions "
                f"for {longest}; use a ctx_len of at most {longest - len(self._bos)}"
            )
        for read, group in self._groups:
            for name, reading in group.items():
                read.check_width(reading.hookpoint, reading.coder.spec.d_in, what=f"coder {name!r}")

    def _group(self, subject: Subject) -> dict[str, Reading]:
        """Return the readings of one model."""
        for other, group in self._groups:
            if other is subject:
                return group
        self._groups.append((subject, {}))
        return self._groups[-1][1]

    def _dropped_ids(self) -> np.ndarray:
        ids: set[int] = set()
        if self._filter.bos:
            ids.update(self._bos)
        if self._filter.special:
            tokenizer = self._subject.tokenizer
            ids.update(int(index) for index in tokenizer.all_special_ids)
            ids.update(int(index) for index, token in tokenizer.added_tokens_decoder.items() if token.special)
        return np.array(sorted(ids), dtype=np.int64)

    def batches(self, contexts: Sequence[Context]) -> Iterator[tuple[int, Iterator[Activations]]]:
        """Yield for each batch the number of corpus tokens in it and its activations, to be taken before the next batch.

        Contexts of like length share a batch, so that little is padded; which ones depends on nothing but `contexts`.
        """
        for num_tokens, chosen in self._chosen(contexts):
            yield num_tokens, self._run(contexts, chosen)

    def _chosen(self, contexts: Sequence[Context]) -> Iterator[tuple[int, list[int]]]:
        """Yield the number of corpus tokens and the contexts of each batch."""
        order = sorted(range(len(contexts)), key=lambda index: -len(contexts[index].tokens))
        start = 0
        while start < len(order):
            longest = len(contexts[order[start]].tokens) + len(self._bos)
            stop = start + max(1, self._batch_tokens // longest)
            chosen = order[start:stop]
            yield sum(len(contexts[index].tokens) for index in chosen), chosen
            start = stop

    def num_kept(self, contexts: Sequence[Context]) -> int:
        """Return how many tokens of `contexts` the filter keeps."""
        return int(self._arrays(contexts, list(range(len(contexts))))[1].sum())

    def moments(self, contexts: Sequence[Context]) -> dict[str, tuple[Tensor, float]]:
        """Return for each coder the mean float32 [D] of the vectors it reads, and their root mean square distance from it."""
        sums: dict[str, tuple[Tensor, float, int]] = {}
        for _, chosen in self._chosen(contexts):
            tokens_BT, kept_BT = self._arrays(contexts, chosen)
            for subject, readings in self._groups:
                vectors = self._vectors(subject, [reading.hookpoint for reading in readings.values()], tokens_BT, kept_BT)
                for name, reading in readings.items():
                    x_ND = vectors[reading.hookpoint].double().cpu()
                    total, squares, num = sums.get(name, (torch.zeros(x_ND.shape[1], dtype=torch.float64), 0.0, 0))
                    sums[name] = total + x_ND.sum(dim=0), squares + float(x_ND.pow(2).sum()), num + len(x_ND)
        found = {}
        for name, (total, squares, num) in sums.items():
            mean = total / num
            found[name] = mean.float(), max(0.0, squares / num - float(mean.pow(2).sum())) ** 0.5
        return found

    def _run(self, contexts: Sequence[Context], chosen: list[int]) -> Iterator[Activations]:
        tokens_BT, kept_BT = self._arrays(contexts, chosen)
        rows, offsets = kept_BT.nonzero()
        positions_N = np.array(chosen, dtype=np.int64)[rows] * self._ctx_len + offsets
        for subject, readings in self._groups:
            yield from self._encode(subject, readings, tokens_BT, kept_BT, positions_N)

    def _encode(
        self,
        subject: Subject,
        readings: dict[str, Reading],
        tokens_BT: np.ndarray,
        kept_BT: np.ndarray,
        positions_N: np.ndarray,
    ) -> Iterator[Activations]:
        """Yield what the coders of one model find; `positions_N` are those of the kept tokens, row by row."""
        vectors = self._vectors(subject, [reading.hookpoint for reading in readings.values()], tokens_BT, kept_BT)
        all_positions = torch.from_numpy(positions_N)
        for name, reading in readings.items():
            x_ND = vectors[reading.hookpoint]
            positions = all_positions.to(x_ND.device)
            if reading.coder.device != x_ND.device:
                readings[name] = reading = replace(reading, coder=reading.coder.to(x_ND.device))
            started = time.perf_counter()
            for acts in reading.coder.encode_chunks(x_ND):
                found = Activations(name, HostCopy(acts.latents.to(torch.int32), positions[acts.rows], acts.values))
                self.seconds[name] += time.perf_counter() - started
                yield found
                started = time.perf_counter()

    def _vectors(
        self, subject: Subject, hookpoints: Sequence[str], tokens_BT: np.ndarray, kept_BT: np.ndarray
    ) -> dict[str, Tensor]:
        """Return float32 [N, D] of the kept tokens, row by row, at each hookpoint."""
        # Padding is on the right of causal attention, where no kept token can see it: no mask is needed.
        device_tokens = torch.from_numpy(tokens_BT).to(subject.device)
        wanted = list(dict.fromkeys(hookpoints))
        seen = read_hookpoints(subject.model, device_tokens, wanted)
        kept = torch.from_numpy(kept_BT)
        vectors = {}
        for hookpoint in wanted:
            hidden_BTD = seen.pop(hookpoint)[:, len(self._bos) :]
            vectors[hookpoint] = x_ND = hidden_BTD[kept.to(hidden_BTD.device)].float()
            _check_finite(x_ND, hookpoint, subject)
        return vectors

    def _arrays(self, contexts: Sequence[Context], chosen: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids with BOS int64 [B, T+1] and which corpus tokens are kept bool [B, T]."""
        longest = max(len(contexts[index].tokens) for index in chosen)
        num_bos = len(self._bos)
        tokens_BT = np.zeros((len(chosen), num_bos + longest), dtype=np.int64)
        kept_BT = np.zeros((len(chosen), longest), dtype=bool)
        tokens_BT[:, :num_bos] = self._bos
        for row, index in enumerate(chosen):
            context = contexts[index]
            length = len(context.tokens)
            tokens_BT[row, num_bos : num_bos + length] = context.tokens
            kept_BT[row, self._filter.first : length] = True
            if self._filter.template and context.is_template is not None:
                kept_BT[row, :length] &= ~context.is_template
        if len(self._dropped):
            kept_BT &= ~np.isin(tokens_BT[:, num_bos:], self._dropped)
        return tokens_BT, kept_BT


def _check_finite(x_ND: Tensor, hookpoint: str, subject: Subject) -> None:
    # A finite sum has finite terms, and is several times cheaper than a look at each of them.
    if not bool(torch.isfinite(x_ND.sum())) and not bool(torch.isfinite(x_ND).all()):
        raise InputError(
            f"hookpoint {hookpoint} gave values that are not finite with dtype {subject.dtype}; "
            "the subject overflows in it, use --dtype float32 or bfloat16"
        )
