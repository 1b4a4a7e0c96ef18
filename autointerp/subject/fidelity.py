"""How well a coder fits its subject: activity, reconstruction, loss when spliced in, and readings that would fit better.

A coder read wrongly (its bias subtracted once too often, a norm's gain left in, the wrong side of a module) encodes without
an error and explains nothing. Reconstruction shows it: the reading that a coder was trained with fits better than its
neighbours. :func:`measure` tries those neighbours on the same vectors and reports how each one fits.

FVU is the fraction of variance unexplained, sum |target - prediction|^2 / sum |target - mean|^2, over all kept tokens.
"""

# Shapes: B contexts, T tokens, V vocabulary, N kept tokens, D width read, E width predicted.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autointerp.coders.coder import Coder
from autointerp.coders.inputs import Standardise, UnitNorm
from autointerp.errors import InputError
from autointerp.subject.corpus import Context
from autointerp.subject.hooks import read_hookpoints, split
from autointerp.subject.model import Subject

BRIEF_TOKENS = 256
"""Enough to tell what no trained coder gives; with wide coders more would take seconds."""
_MAX_ROWS = 2048
"""Vectors on which other readings are tried."""
_SCALES = tuple(2.0**power for power in range(-5, 6) if power)


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """What :func:`measure` found; losses in nats per token, None where the coder was not spliced in."""

    num_tokens: int
    l0: float
    """Mean number of active latents per token."""
    live_frac: float
    """Share of the latents that fired at least once on these tokens."""
    fvu: float
    """0 is perfect, 1 is no better than the mean."""
    others: Mapping[str, float] = field(default_factory=dict)
    """FVU of other readings of the same coder: ``KIND: what is different`` -> FVU, all on the same few vectors."""
    fvu_of_few: float = float("nan")
    """FVU as read, on the vectors that `others` were tried on."""
    loss_clean: float | None = None
    loss_spliced: float | None = None
    loss_with_error: float | None = None
    """With the coder's output and its error term in place: the clean loss again, or the splice is at fault."""
    loss_zeroed: float | None = None
    """With zeros in place of what the coder predicts."""
    kl: float | None = None
    """KL(clean || spliced), mean per token."""

    @property
    def loss_recovered(self) -> float | None:
        """(zeroed - spliced) / (zeroed - clean): 1 is as good as the original, 0 as good as zeros."""
        if self.loss_clean is None or self.loss_spliced is None or self.loss_zeroed is None:
            return None
        gap = self.loss_zeroed - self.loss_clean
        return (self.loss_zeroed - self.loss_spliced) / gap if gap > 0 else None


@dataclass(frozen=True)
class Site:
    """Where a coder reads and what it predicts, by their full names; equal for an SAE."""

    hookpoint: str
    target: str


def measure(
    subject: Subject,
    coder: Coder,
    site: Site,
    contexts: Sequence[Context],
    *,
    batch_tokens: int,
    is_brief: bool = False,
) -> Fidelity:
    """Measure `coder` at `site` over `contexts`, BOS left out.

    `is_brief`: L0, FVU and the live share alone, over some `BRIEF_TOKENS` tokens spread over the contexts.

    Raises: InputError when a hookpoint does not fit the coder, or there is nothing to read.
    """
    hookpoints = list(dict.fromkeys((site.hookpoint, site.target)))
    totals, kept_rows = _Totals(coder.spec.width, coder.spec.d_out), _Rows(0 if is_brief else _MAX_ROWS)
    extra = [] if is_brief else _neighbours(subject, coder, site)
    every = max(1, sum(len(context.tokens) for context in contexts) // BRIEF_TOKENS) if is_brief else 1
    for tokens_BT, kept_BT in _batches(subject, contexts, batch_tokens):
        seen = read_hookpoints(subject.model, tokens_BT, [*hookpoints, *(name for name in extra if name not in hookpoints)])
        # Not from the first on: the first token of a context is unlike all others, and its norm would outweigh theirs.
        rows = {name: _kept(value, kept_BT)[every // 2 :: every] for name, value in seen.items()}
        x_ND, target_NE = rows[site.hookpoint], rows[site.target]
        acts = coder.encode(x_ND)
        totals.add(acts, _aim(coder, x_ND, target_NE), coder.decode(acts, x_ND))
        kept_rows.add(rows)
    if totals.num_tokens < 2:
        raise InputError("there is no token to check a coder on; give a longer corpus or keep more tokens")
    found = Fidelity(num_tokens=totals.num_tokens, l0=totals.l0, live_frac=totals.live_frac, fvu=totals.fvu)
    if is_brief:
        return found
    few = kept_rows.joined()
    return replace(
        found,
        others=_others(subject, coder, site, few),
        fvu_of_few=_fit(coder, few[site.hookpoint], few[site.target]),
        **_losses(subject, coder, site, contexts, batch_tokens),
    )


class _Totals:
    """Sums over batches, in float64."""

    def __init__(self, width: int, d_out: int) -> None:
        self.num_tokens = self._num_active = 0
        self._fired = torch.zeros(width, dtype=torch.bool)
        self._error = 0.0
        self._sum_E = torch.zeros(d_out, dtype=torch.float64)
        self._squares = 0.0

    def add(self, acts: Any, target_NE: Tensor, prediction_NE: Tensor) -> None:
        self.num_tokens += len(target_NE)
        self._num_active += len(acts)
        self._fired[acts.latents.cpu()] = True
        wide = target_NE.double()
        self._error += float((wide - prediction_NE.double()).pow(2).sum())
        self._sum_E += wide.sum(0).cpu()
        self._squares += float(wide.pow(2).sum())

    @property
    def l0(self) -> float:
        return self._num_active / self.num_tokens

    @property
    def live_frac(self) -> float:
        return float(self._fired.float().mean())

    @property
    def fvu(self) -> float:
        variance = self._squares - float(self._sum_E.pow(2).sum()) / self.num_tokens
        return self._error / variance if variance > 0 else float("inf")


class _Rows:
    """The first vectors of each hookpoint, up to a number."""

    def __init__(self, limit: int) -> None:
        self._limit, self._num, self._parts = limit, 0, list[dict[str, Tensor]]()

    def add(self, rows: Mapping[str, Tensor]) -> None:
        if self._num < self._limit:
            self._parts.append(dict(rows))
            self._num += len(next(iter(rows.values())))

    def joined(self) -> dict[str, Tensor]:
        return {name: torch.cat([part[name] for part in self._parts])[: self._limit] for name in self._parts[0]}


def _fit(coder: Coder, x_ND: Tensor, target_NE: Tensor) -> float:
    """Return the FVU of a reading; an SAE is held to the very vectors it is given, on their own scale."""
    wide = _aim(coder, x_ND, target_NE).double()
    variance = float((wide - wide.mean(0)).pow(2).sum())
    error = float((wide - coder.decode(coder.encode(x_ND), x_ND).double()).pow(2).sum())
    return error / variance if variance > 0 else float("inf")


def _aim(coder: Coder, x_ND: Tensor, target_NE: Tensor) -> Tensor:
    """Return what the coder predicts: its target, or for an SAE the vector it reads, as its hook gives it."""
    return target_NE if coder.spec.is_transcoder else coder.hooked(x_ND)


def _neighbours(subject: Subject, coder: Coder, site: Site) -> list[str]:
    """Return further hookpoints to read: the other side of the module, and the norms around it."""
    module, side = split(site.hookpoint)
    names = [f"{module}@{'in' if side == 'out' else 'out'}", *_norms(subject, module)]
    widths = subject.widths()
    return [name for name in names if widths.get(name) == coder.spec.d_in]


def _norms(subject: Subject, module: str) -> list[str]:
    """Return the outputs of the norms in the module's own block: those whose weight is a gain on each component."""
    block = module.rpartition(".")[0]
    found = []
    for name, child in subject.model.named_modules():
        weight = getattr(child, "weight", None)
        if name.startswith(block + ".") and isinstance(weight, Tensor) and weight.ndim == 1 and not any(child.children()):
            found.append(f"{name}@out")
    return found


def _others(subject: Subject, coder: Coder, site: Site, rows: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the FVU of readings next to the one in use, on the vectors `rows`."""
    x_ND, target_NE = rows[site.hookpoint], rows[site.target]

    def fit(x: Tensor, *, using: Coder = coder) -> float:
        return _fit(using, x, target_NE)

    def shifted(sign: float) -> float:
        # Moves the vector the encoder sees, whatever the coder's own rules are.
        shift = sign * coder.decoder_bias_E
        seen = shift if coder.encoder_LD is None else coder.encoder_LD @ shift
        moved = replace(coder, encoder_bias_L=coder.encoder_bias_L + seen)
        return fit(x_ND, using=moved)

    found: dict[str, float] = {}
    if coder.spec.d_in == coder.spec.d_out and bool(coder.decoder_bias_E.any()):
        found["bias: b_dec subtracted once more"] = shifted(-1.0)
        found["bias: b_dec subtracted once less"] = shifted(+1.0)
    for scale in _SCALES:
        found[f"scale: input times {scale:.3g}"] = fit(x_ND * scale)
    if not coder.inputs:
        found["scale: every input at unit norm"] = fit(x_ND, using=replace(coder, inputs=(UnitNorm(),)))
        found["scale: every input standardised"] = fit(x_ND, using=replace(coder, inputs=(Standardise(),)))
    else:
        found["scale: without its input rules"] = fit(x_ND, using=replace(coder, inputs=()))
    module, side = split(site.hookpoint)
    other = f"{module}@{'in' if side == 'out' else 'out'}"
    if other in rows:
        found[f"side: {other}"] = fit(rows[other])
    gain_D = _gain(subject, x_ND, rows)
    if gain_D is not None:
        found["gain: the input before the norm's gain"] = fit(x_ND / gain_D)
        found["gain: the norm's gain once more"] = fit(x_ND * gain_D)
    return found


def _gain(subject: Subject, x_ND: Tensor, rows: Mapping[str, Tensor]) -> Tensor | None:
    """Return float32 [D], the gain of the norm whose output the coder reads, or None when it reads no norm's output."""
    for name, value in rows.items():
        module = subject.model.get_submodule(split(name)[0])
        weight = getattr(module, "weight", None)
        if not name.endswith("@out") or not isinstance(weight, Tensor) or weight.shape != x_ND.shape[1:]:
            continue
        if not torch.equal(value, x_ND):
            continue
        gain_D = weight.detach().to(x_ND.device, torch.float32)
        # Gemma stores the gain minus one; before the right one, every row's root mean square is 1.
        return min((gain_D, gain_D + 1), key=lambda g: float(((x_ND / _safe(g)).pow(2).mean(1).sqrt() - 1).abs().mean()))
    return None


def _safe(gain_D: Tensor) -> Tensor:
    return torch.where(gain_D.abs() > 1e-6, gain_D, torch.ones_like(gain_D))


def _batches(subject: Subject, contexts: Sequence[Context], batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield token ids int64 [B, T] with BOS, and which of them count bool [B, T] (not BOS, not padding)."""
    bos = [] if subject.bos_id is None else [subject.bos_id]
    order = sorted(contexts, key=lambda context: -len(context.tokens))
    start = 0
    while start < len(order):
        longest = len(order[start].tokens) + len(bos)
        chosen = order[start : start + max(1, batch_tokens // longest)]
        start += len(chosen)
        tokens = np.zeros((len(chosen), longest), dtype=np.int64)
        kept = np.zeros((len(chosen), longest), dtype=bool)
        for row, context in enumerate(chosen):
            length = len(bos) + len(context.tokens)
            tokens[row, :length] = [*bos, *context.tokens]
            kept[row, len(bos) : length] = True
        yield torch.from_numpy(tokens).to(subject.device), torch.from_numpy(kept)


def _kept(value_BTD: Tensor, kept_BT: Tensor) -> Tensor:
    return value_BTD[kept_BT.to(value_BTD.device)].float()


def _losses(subject: Subject, coder: Coder, site: Site, contexts: Sequence[Context], batch_tokens: int) -> dict[str, Any]:
    """Return the losses and the KL of splicing the coder in."""
    totals = dict.fromkeys(("clean", "spliced", "with_error", "zeroed"), 0.0)
    kl, count = 0.0, 0
    for tokens_BT, kept_BT in _batches(subject, contexts, batch_tokens):
        inputs: dict[str, Tensor] = {}

        def predicted(target: Tensor, inputs: dict[str, Tensor] = inputs) -> Tensor:
            x_ND = inputs.get("x", target)
            out = coder.decode(coder.encode(x_ND), x_ND)
            # An SAE on a centred residual leaves what centring took away as it is.
            return out if coder.spec.is_transcoder else out + (target - coder.hooked(target))

        clean = _forward(subject, site, tokens_BT, kept_BT, inputs, None)
        scored = kept_BT[:, 1:].to(clean.device)
        wanted = tokens_BT[:, 1:].to(clean.device)[scored]
        logits = {"clean": clean[:, :-1][scored]}
        for name, change in (
            ("spliced", predicted),
            ("with_error", lambda target: (prediction := predicted(target)) + (target - prediction)),
            ("zeroed", torch.zeros_like),
        ):
            logits[name] = _forward(subject, site, tokens_BT, kept_BT, inputs, change)[:, :-1][scored]
        for name, value in logits.items():
            totals[name] += float(F.cross_entropy(value.float(), wanted, reduction="sum"))
        kl += float(
            F.kl_div(
                F.log_softmax(logits["spliced"].float(), dim=-1),
                F.log_softmax(logits["clean"].float(), dim=-1),
                log_target=True,
                reduction="sum",
            )
        )
        count += int(scored.sum())
    if count == 0:
        return {}
    return {f"loss_{name}": total / count for name, total in totals.items()} | {"kl": kl / count}


@torch.inference_mode()
def _forward(
    subject: Subject,
    site: Site,
    tokens_BT: Tensor,
    kept_BT: Tensor,
    inputs: dict[str, Tensor],
    change: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Return logits [B, T, V] with the kept rows at the target replaced by ``change(rows)``.

    `inputs` receives what a transcoder reads, at each pass anew.
    """

    def note(rows: Tensor) -> Tensor:
        inputs["x"] = rows
        return rows

    with _replacing(subject.model, site.hookpoint, kept_BT, note if site.hookpoint != site.target else None):
        with _replacing(subject.model, site.target, kept_BT, change):
            logits: Tensor = subject.model(input_ids=tokens_BT, use_cache=False).logits
    return logits


@contextmanager
def _replacing(model: nn.Module, hookpoint: str, kept_BT: Tensor, change: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Within: the kept rows of the tensor at `hookpoint` are what `change` makes of them."""
    if change is None:
        yield
        return
    path, side = split(hookpoint)
    module = model.get_submodule(path)

    def changed(value: Tensor) -> Tensor:
        kept = kept_BT.to(value.device)
        new = value.clone()
        new[kept] = change(value[kept].float()).to(value.device, value.dtype)
        return new

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else changed(output)

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (changed(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": changed(kwargs["hidden_states"])}

    handle = (
        module.register_forward_hook(after) if side == "out" else module.register_forward_pre_hook(before, with_kwargs=True)
    )
    try:
        yield
    finally:
        handle.remove()
