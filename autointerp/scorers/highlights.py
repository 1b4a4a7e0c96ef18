"""Which tokens of a window are shown as highlighted, so that marks alone never tell a positive from a negative.

A positive shows the tokens above a share of its own maximum. A silent window is lent the pattern of some positive: numbers of
tokens, lengths of runs and positions then have the positives' distribution by construction. A window that a neighbouring latent
lent shows the tokens that the neighbour fires on.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from autointerp.examples.render import above
from autointerp.records import Examples, LatentExamples


def own_masks(examples: Examples, threshold: float) -> np.ndarray:
    """Return bool [E, W]: tokens above `threshold` of their window's greatest activation."""
    return above(examples.activations, examples.lengths, ratio=threshold)


def lent_masks(negatives: Examples, masks: np.ndarray, random: np.random.Generator, *, threshold: float) -> list[np.ndarray]:
    """Return for each silent window the mask of the neighbour that lent it, else one of `masks`.

    A window too short for a mask gets the next that fits. Every mask is lent once before any is lent again.
    """
    own = own_masks(negatives, threshold)
    is_own = own.any(axis=1) & (own.sum(axis=1) < negatives.lengths)
    if len(masks) == 0:
        return [mask if is_kept else np.zeros_like(mask) for mask, is_kept in zip(own, is_own, strict=True)]
    ends = masks.shape[1] - np.argmax(masks[:, ::-1], axis=1)
    queue: list[int] = []
    lent = []
    for i, length in enumerate(negatives.lengths):
        if is_own[i]:
            lent.append(own[i])
            continue
        if not any(ends[row] <= length for row in queue):
            queue += random.permutation(len(masks)).tolist()
        fits = next((row for row in queue if ends[row] <= length), None)
        if fits is None:
            # Shorter than every pattern: its tail, moved to where the window ends.
            row = queue.pop(0)
            lent.append(np.roll(masks[row], int(length) - int(ends[row])) & (np.arange(masks.shape[1]) < length))
        else:
            queue.remove(fits)
            lent.append(masks[fits])
    return lent


def shown_masks(latent: LatentExamples, threshold: float, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the masks of positives and of negatives, bool [E, W] each: a window's own where it is active, else a lent one.

    A negative that is active everywhere gets a lent one too, or its marks would tell. So a window has marks of the same kind
    wherever it stands, also after :func:`dealt_anew`.
    """
    everything = latent.positives.joined(latent.negatives)
    masks = own_masks(everything, threshold)
    is_positive = np.arange(len(masks)) < len(latent.positives)
    is_active = masks.any(axis=1) & (is_positive | (masks.sum(axis=1) < everything.lengths))
    silent = np.flatnonzero(~is_active)
    if len(silent):
        # A pattern of a positive, not one that a neighbour gave another negative.
        lenders = is_active & is_positive
        patterns = masks[lenders if lenders.any() else is_active]
        masks[silent] = lent_masks(everything.take(silent), patterns, random, threshold=threshold)
    return masks[: len(latent.positives)], masks[len(latent.positives) :]


def dealt_anew(latent: LatentExamples, random: np.random.Generator) -> LatentExamples:
    """Return the latent with its scored windows dealt anew into positives and negatives.

    The control of scorers that need no explanation: quantiles and sources stay where they are, which window stands there is
    chance.
    """
    positives, negatives = latent.positives, latent.negatives
    num = len(positives)
    order = random.permutation(num + len(negatives))
    everything = positives.joined(negatives)
    return replace(
        latent,
        positives=replace(everything.take(order[:num]), quantiles=positives.quantiles, sources=positives.sources),
        negatives=replace(everything.take(order[num:]), quantiles=negatives.quantiles, sources=negatives.sources),
    )
