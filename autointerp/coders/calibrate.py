"""The fixed threshold of a coder that was trained to keep the largest activations of a whole batch (BatchTopK)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from autointerp.coders.activations import Relu
from autointerp.coders.coder import Coder
from autointerp.errors import InputError


def calibrate_threshold(coder: Coder, x_ND: Tensor, /, *, k: int) -> float:
    """Return the threshold above which k latents a row are active in the mean over `x_ND`, the vectors the coder reads.

    It lies in the middle between the last activation that is kept and the first that is not. Load the coder with
    ``?threshold=0`` to have one to calibrate, and with the result to use it.

    Raises: InputError when there are fewer positive pre-activations than k a row.
    """
    values = replace(coder, activation=Relu()).encode(x_ND).values
    wanted = k * len(x_ND)
    if not 0 < wanted < len(values):
        raise InputError(
            f"k = {k} for {len(x_ND)} rows means {wanted} activations, and {len(values)} are positive; "
            "expected more of them than wanted, give more rows or a smaller k"
        )
    largest = torch.topk(values, wanted + 1).values
    return float((largest[-2] + largest[-1]) / 2)
