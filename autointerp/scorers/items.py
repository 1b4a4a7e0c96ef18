"""What a classifier asks about, and what is answered."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autointerp.records import Examples, Status


@dataclass(frozen=True, kw_only=True)
class Item:
    """One example as a question."""

    example_idx: int
    """Number among the latent's scored examples, positives first."""
    truth: bool
    position: int
    document: int
    source: str
    quantile: int
    padded: np.ndarray
    """uint32 [W], token ids."""
    length: int
    mask: np.ndarray | None = None
    """bool [length], highlighted tokens; None where nothing is highlighted."""
    is_asked: bool = True
    """False for an example that could not be made; its verdict is ``not_applicable``."""

    @property
    def tokens(self) -> np.ndarray:
        """uint32 [length], token ids without padding."""
        return self.padded[: self.length]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of one item."""

    status: Status
    answer: bool | None = None
    probability: float | None = None
    request_ids: tuple[str, ...] = ()
    prompt_idx: int = 0


def item_of(
    examples: Examples,
    row: int,
    *,
    example_idx: int,
    truth: bool,
    source: str | None = None,
    mask: np.ndarray | None = None,
    is_asked: bool = True,
) -> Item:
    """Return row `row` of `examples` as a question; `mask` may be longer than the window."""
    length = int(examples.lengths[row])
    return Item(
        example_idx=example_idx,
        truth=truth,
        position=int(examples.positions[row]),
        document=int(examples.documents[row]),
        source=source if source is not None else examples.sources[row],
        quantile=int(examples.quantiles[row]),
        padded=examples.tokens[row],
        length=length,
        mask=None if mask is None else mask[:length],
        is_asked=is_asked,
    )
