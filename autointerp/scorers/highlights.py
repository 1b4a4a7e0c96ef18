"""Which tokens of a window are shown as highlighted, so that marks alone never tell a positive from a negative.

A positive shows the tokens above a share of its own maximum. A silent window is lent the pattern of some positive: numbers of
tokens, lengths of runs and positions then have the positives' distribution by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from autointerp.examples.render import above
from autointerp.records import Examples, LatentExamples


def own_masks(examples: Examples, threshold: float) -> np.ndarray:
    """Return bool [E, W]: tokens above `threshold` of their window's greatest activation."""
    return above(examples.activations, examples.lengths, ratio=threshold)


def lent_masks(lengths: Sequence[int] | np.ndarray, masks: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
    """Return one of `masks` for a silent window of each length; a window too short for its mask gets the next that fits.

    Every mask is lent once before any is lent again.
    """
    if len(masks) == 0:
        return [np.zeros(masks.shape[1], bool)] * len(lengths)
    ends = masks.shape[1] - np.argmax(masks[:, ::-1], axis=1)
    queue: list[int] = []
    lent = []
    for length in lengths:
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

    So a window has marks of the same kind wherever it stands, also after :func:`dealt_anew`.
    """
    everything = latent.positives.joined(latent.negatives)
    masks = own_masks(everything, threshold)
    is_active = masks.any(axis=1)
    masks[~is_active] = lent_masks(everything.lengths[~is_active], masks[is_active], random)
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
