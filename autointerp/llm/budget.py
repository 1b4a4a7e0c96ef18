"""What a run may send and spend: counted over all shards, reserved before a request leaves, settled when its reply is in."""

from __future__ import annotations

from dataclasses import dataclass, field

from autointerp.errors import EngineStopped
from autointerp.llm.settings import Prices
from autointerp.records import Chat, Request, Text, Usage

_MESSAGE_TOKENS = 8
"""Tokens that a chat template adds around a message; a round figure, used only to reserve."""


class BudgetReached(EngineStopped):
    """The next request would exceed `max_requests` or `max_cost`; finished work is kept."""


def estimate_usage(request: Request) -> Usage:
    """Return the most that `request` is likely to use: 3 characters a token, all of `max_tokens` written."""
    if isinstance(request.prompt, Chat):
        tokens = sum(len(content) // 3 + _MESSAGE_TOKENS for _, content in request.prompt.messages)
    elif isinstance(request.prompt, Text):
        tokens = len(request.prompt.text) // 3 + 1
    else:
        tokens = len(request.prompt.ids)
    return Usage(prompt_tokens=tokens, output_tokens=request.max_tokens)


def cost_of(usage: Usage, prices: Prices) -> float:
    """Return what `usage` costs, in the currency of `prices`."""
    cached = prices.input if prices.cached is None else prices.cached
    fresh = max(0, usage.prompt_tokens - usage.cached_tokens)
    return (fresh * prices.input + usage.cached_tokens * cached + usage.output_tokens * prices.output) / 1e6


@dataclass(kw_only=True)
class Budget:
    """Limits of a run and what it has used of them; one object shared by all shards of one engine.

    Not thread-safe: used from one event loop.
    """

    prices: Prices = field(default_factory=Prices)
    max_requests: int | None = None
    max_cost: float | None = None
    requests: int = 0
    """Requests sent, replies of the log not counted."""
    failures: int = 0
    """Requests sent that came back as an error."""
    usage: Usage = field(default_factory=Usage)
    """Tokens of the replies that came back."""
    reserved: float = 0.0
    """Estimated cost of the requests in flight."""

    @property
    def cost(self) -> float:
        """What the replies so far cost."""
        return cost_of(self.usage, self.prices)

    def reserve(self, request: Request) -> float:
        """Count a request that is about to leave; return the cost reserved for it.

        Raises: BudgetReached when a limit does not allow it.
        """
        if self.max_requests is not None and self.requests >= self.max_requests:
            raise BudgetReached(
                f"stopped before request {self.requests + 1}: max_requests = {self.max_requests} are sent; "
                "finished work is kept, raise the limit and run the same command to go on"
            )
        estimate = cost_of(estimate_usage(request), self.prices)
        if self.max_cost is not None and self.cost + self.reserved + estimate > self.max_cost:
            raise BudgetReached(
                f"stopped at a cost of {self.cost:.4f} with {self.reserved:.4f} in flight: the next request, about "
                f"{estimate:.4f}, could exceed max_cost = {self.max_cost}; finished work is kept, raise the limit and run the "
                "same command to go on"
            )
        self.requests += 1
        self.reserved += estimate
        return estimate

    def settle(self, reserved: float, usage: Usage | None) -> None:
        """Give back what `reserve` returned and count what was used; `usage` is None for a request that failed."""
        self.reserved = max(0.0, self.reserved - reserved)
        if usage is None:
            self.failures += 1
        else:
            self.usage += usage
