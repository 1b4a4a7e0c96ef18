"""What a scorer asks about, what is answered, and the verdict that is made of both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autointerp.records import Examples, Explanation, LatentExamples, Status, Verdict


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
    activations: np.ndarray | None = None
    """float32 [length], for scorers that compare by token."""
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
    value: float | None = None
    truths: tuple[float, ...] | None = None
    answers: tuple[float | None, ...] | None = None
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
        activations=examples.activations[row, :length],
        is_asked=is_asked,
    )


def items_of(positives: Examples, negatives: Examples) -> list[Item]:
    """Return every window as a question, positives first, numbered in order."""
    num = len(positives)
    return [
        *(item_of(positives, i, example_idx=i, truth=True) for i in range(num)),
        *(item_of(negatives, i, example_idx=num + i, truth=False) for i in range(len(negatives))),
    ]


def verdict_of(
    item: Item, answer: Answer | None, *, scorer: str, latent: LatentExamples, explanation: Explanation, control: str | None
) -> Verdict:
    """Return the verdict on an item; without an answer it was not asked about."""
    answer = answer or Answer(status="not_applicable")
    return Verdict(
        coder=latent.coder,
        latent=latent.latent,
        explanation_id=explanation.explanation_id,
        scorer=scorer,
        scorer_id="",
        control=control,
        example_idx=item.example_idx,
        position=item.position,
        document=item.document,
        source=item.source,
        quantile=item.quantile,
        truth=item.truth,
        answer=answer.answer,
        probability=answer.probability,
        status=answer.status,
        request_ids=answer.request_ids,
        prompt_idx=answer.prompt_idx,
        truths=answer.truths,
        answers=answer.answers,
        value=answer.value,
    )
