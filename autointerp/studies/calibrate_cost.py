"""What the judge of a calibration is asked, summed over its stages before anything is sent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from autointerp.jobs.cost import SAMPLE, Estimate, estimate_score
from autointerp.jobs.score import ScoreConfig, build_scorers
from autointerp.jobs.session import StoreSource
from autointerp.protocols import Engine
from autointerp.reports.terminal import table
from autointerp.stats import Interval


@dataclass(frozen=True, kw_only=True)
class Price:
    """What is left to do for one scorer, or for all: over roles, levels of noise, the control and both measurements.

    Intervals are over latents; their ends are sums of ends, since every stage is estimated from the same latents.
    """

    scorer: str
    """With its mode where that is not the usual one."""
    num_explanations: int
    """Explanations left to judge, those of the control too."""
    requests: Interval
    prompt_tokens: Interval
    output_tokens: Interval
    cost: Interval
    """0 without prices."""
    is_tokenized: bool
    """Whether the engine's tokenizer counted everywhere."""
    is_output_bound: bool
    """Whether output tokens are the most that requests allow, for want of earlier replies."""

    def sentence(self) -> str:
        """Return one line for people."""
        if not self.num_explanations:
            return "the judge has nothing left to do"
        cost = f"cost {_around(self.cost, 2)}" if self.cost.value else "cost unknown: set engine_options.prices"
        about = "" if self.is_tokenized else "about "
        return (
            f"the judge has {self.num_explanations:,} explanations left: {_around(self.requests)} requests, "
            f"{about}{_around(self.prompt_tokens)} prompt tokens, {'at most ' * self.is_output_bound}"
            f"{_around(self.output_tokens)} output tokens, {cost}"
        )


async def prices(scorings: Iterable[ScoreConfig], engine: Engine | None, *, sample: int = SAMPLE) -> list[Price]:
    """Return what the judge is asked in these runs of `score`, a row for each scorer that asks one, in order.

    The explanations must be there. `engine` is only asked to count tokens; None for one that is not opened: then four
    characters count as a token, and what such an engine has done before is not left out.
    """
    source = cache(StoreSource)
    found: dict[str, list[Estimate]] = {}
    for scoring in scorings:
        assert scoring.store is not None and scoring.selection is not None
        for scorer in build_scorers(scoring):
            if scorer.needs.engine:
                label = f"{scorer.name}, labels" if scorer.needs.labels else scorer.name
                opened = source(Path(scoring.store), scoring.selection)
                found.setdefault(label, []).extend(await estimate_score(scoring, opened, [scorer], engine, sample=sample))
    return [_price(label, estimates) for label, estimates in found.items()]


def total(found: Sequence[Price]) -> Price:
    """Return the sum over scorers."""
    return _sum("in all", sum(price.num_explanations for price in found), found)


def _price(label: str, estimates: Sequence[Estimate]) -> Price:
    left = [estimate for estimate in estimates if estimate.num_latents]
    return _sum(label, sum(estimate.num_latents for estimate in left), left)


def _sum(label: str, num_explanations: int, parts: Sequence[Estimate] | Sequence[Price]) -> Price:
    return Price(
        scorer=label,
        num_explanations=num_explanations,
        requests=_added(part.requests for part in parts),
        prompt_tokens=_added(part.prompt_tokens for part in parts),
        output_tokens=_added(part.output_tokens for part in parts),
        cost=_added(part.cost for part in parts),
        is_tokenized=all(part.is_tokenized for part in parts),
        is_output_bound=any(part.is_output_bound for part in parts),
    )


def _added(intervals: Iterable[Interval]) -> Interval:
    parts = list(intervals)
    value, low, high = (float(sum(getattr(part, name) for part in parts)) for name in ("value", "low", "high"))
    return Interval(value=value, low=low, high=high, method="sum")


def price_text(found: Sequence[Price]) -> str:
    """Return the prices for a terminal, a line for each scorer and the sum."""
    head = ["scorer", "explanations left", "requests", "prompt tokens", "output tokens", "cost"]
    lines = [
        [
            price.scorer,
            f"{price.num_explanations:,}",
            *(_around(n) for n in (price.requests, price.prompt_tokens, price.output_tokens)),
            _around(price.cost, 2) if price.cost.value else "-",
        ]
        for price in found
    ]
    return "\n".join([*table([head, *lines], right=set(range(1, len(head)))), "", total(found).sentence()])


def _around(interval: Interval, digits: int = 0) -> str:
    if interval.high - interval.low < 10**-digits:
        return f"{interval.value:,.{digits}f}"
    return f"{interval.value:,.{digits}f} ({interval.low:,.{digits}f} to {interval.high:,.{digits}f})"
