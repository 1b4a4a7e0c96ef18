"""The untrained twin of a subject: the same architecture with every weight drawn anew.

Explanations of what a trained coder reads in it say how much of a score is owed to the text alone (the control of
arXiv 2501.17727).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from autointerp.digest import digest, seed_of
from autointerp.errors import InputError
from autointerp.subject.model import Subject


def reinitialised(subject: Subject, *, seed: int) -> Subject:
    """Return `subject` with all weights, embeddings included, drawn by the model's own initialisation.

    Drawn in float32 on the CPU and then moved, so that neither the device nor the dtype decides which weights come out.

    Raises: InputError for a quantised subject or one that is split over devices.
    """
    if subject.quantization is not None or getattr(subject.model, "hf_device_map", None) is not None:
        raise InputError(
            f"the weights of {subject.name} cannot be drawn anew while it is quantised or split over devices; cache without "
            "--quantization and --device-map, or without --control reinit-subject"
        )
    trained: Any = subject.model
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed_of("reinitialised subject", seed))
        model = type(trained)(deepcopy(trained.config))
    model.to(subject.device, getattr(torch, subject.dtype))
    model.eval()
    model.requires_grad_(False)
    recipe = {"reinitialised": subject.weights_digest, "seed": seed}
    return replace(subject, model=model, name=f"{subject.name} with new weights", weights_digest=digest(recipe))
