"""Whether a coder is read right: limits fixed beforehand, and a sentence for each that is broken.

The limits are wide: they are there to catch a coder that is read wrongly, not to rank coders. `coder check` applies all of
them; `cache` only refuses what no trained coder gives.
"""

from __future__ import annotations

from dataclasses import dataclass

from autointerp.coders.coder import CoderSpec
from autointerp.subject.fidelity import Fidelity

MAX_FVU = 0.9
L0_FACTOR = 2.0
"""L0 may be off the declared one by this factor."""
MAX_L0_FRAC = 0.25
"""Share of the latents that may be active at a token, where no L0 is declared."""
MAX_DEAD_FRAC = 0.9
MIN_FIRINGS = 10.0
"""Firings per latent, on average, below which latents that never fired say nothing."""
MIN_LOSS_RECOVERED = 0.5
MIN_LOSS_GAP = 0.02
"""Nats between zeroed and clean below which there is no loss to recover."""
MAX_SPLICE_ERROR = 0.01
"""Nats by which the loss may change with the error term in place."""
BETTER = {"bias": 0.8, "scale": 0.8, "gain": 0.8, "side": 0.95}
"""Kind of another reading -> the share of the FVU as read below which that reading is the right one. The two sides of a block
are much alike, hence the narrow margin."""
ABSURD_FVU = 1.0
ABSURD_L0_FACTOR = 5.0


@dataclass(frozen=True)
class Check:
    """One limit and how it was met."""

    name: str
    """``l0``, ``fvu``, ``dead``, ``bias``, ``scale``, ``gain``, ``side``, ``loss`` or ``splice``."""
    is_passed: bool | None
    """None: it does not apply, and `finding` says why."""
    finding: str


def coder_checks(spec: CoderSpec, found: Fidelity) -> list[Check]:
    """Return every check, in a fixed order."""
    return [_l0(spec, found), _fvu(found), _dead(spec, found), *(_reading(kind, found) for kind in BETTER), *_losses(found)]


def absurd(spec: CoderSpec, found: Fidelity) -> str | None:
    """Return what no trained coder gives, as a clause, or None: FVU of 1 or more, or an L0 far off the declared one."""
    wanted = spec.l0 or (float(spec.k) if spec.k else None)
    if found.fvu >= ABSURD_FVU:
        return f"it reconstructs worse than the mean (FVU {found.fvu:.3g}, over {found.num_tokens:,} tokens)"
    if wanted and not wanted / ABSURD_L0_FACTOR <= found.l0 <= wanted * ABSURD_L0_FACTOR:
        return f"{found.l0:.1f} latents are active per token, where {wanted:g} are declared"
    if wanted is None and (found.l0 == 0 or found.l0 > MAX_L0_FRAC * spec.width):
        return f"{found.l0:.1f} of its {spec.width:,} latents are active per token"
    return None


def _l0(spec: CoderSpec, found: Fidelity) -> Check:
    wanted = spec.l0 or (float(spec.k) if spec.k else None)
    if wanted:
        fits = wanted / L0_FACTOR <= found.l0 <= wanted * L0_FACTOR
        return Check("l0", fits, f"L0 {found.l0:.1f}, declared {wanted:g}, within a factor of {L0_FACTOR:g}")
    limit = MAX_L0_FRAC * spec.width
    return Check("l0", 0 < found.l0 <= limit, f"L0 {found.l0:.1f}, none declared, above 0 and at most {limit:g}")


def _fvu(found: Fidelity) -> Check:
    return Check("fvu", found.fvu <= MAX_FVU, f"FVU {found.fvu:.3f}, at most {MAX_FVU:g}")


def _dead(spec: CoderSpec, found: Fidelity) -> Check:
    dead = 1 - found.live_frac
    firings = found.num_tokens * found.l0 / spec.width
    text = f"{dead:.1%} of the latents never fired in {found.num_tokens:,} tokens, at most {MAX_DEAD_FRAC:.0%}"
    if firings < MIN_FIRINGS:
        return Check("dead", None, f"{text}; too few tokens to tell ({firings:.1f} firings per latent)")
    return Check("dead", dead <= MAX_DEAD_FRAC, text)


def _reading(kind: str, found: Fidelity) -> Check:
    others = {name.partition(": ")[2]: fvu for name, fvu in found.others.items() if name.startswith(f"{kind}: ")}
    if not others:
        return Check(kind, None, "no other reading to compare with")
    name, best = min(others.items(), key=lambda item: item[1])
    limit = BETTER[kind] * found.fvu_of_few
    text = f"the next best reading is {name!r}: FVU {best:.3f} against {found.fvu_of_few:.3f}, not below {limit:.3f}"
    return Check(kind, best >= limit, text)


def _losses(found: Fidelity) -> list[Check]:
    if found.loss_clean is None or found.loss_zeroed is None or found.loss_with_error is None:
        return [Check(name, None, "not spliced in") for name in ("loss", "splice")]
    gap, recovered = found.loss_zeroed - found.loss_clean, found.loss_recovered
    text = f"loss {found.loss_clean:.3f} clean, {found.loss_spliced:.3f} spliced, {found.loss_zeroed:.3f} with zeros"
    if gap < MIN_LOSS_GAP or recovered is None:
        loss = Check("loss", None, f"{text}; zeros cost too little to tell")
    else:
        wanted = f"recovered {recovered:.3f}, at least {MIN_LOSS_RECOVERED:g}"
        loss = Check("loss", recovered >= MIN_LOSS_RECOVERED, f"{text}; {wanted}")
    change = abs(found.loss_with_error - found.loss_clean)
    finding = f"with its error term added the loss changes by {change:.2g} nats, at most {MAX_SPLICE_ERROR:g}"
    return [loss, Check("splice", change <= MAX_SPLICE_ERROR, finding)]
