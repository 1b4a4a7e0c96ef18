"""Coders of the BatchTopK and Matryoshka reference code (bartbussmann): ``sae.pt`` and ``config.json`` in a folder.

Bussmann et al. 2024, arXiv:2412.06410, and 2025, arXiv:2503.17547. ``input_unit_norm`` is (x - mean) / (sample deviation +
1e-5), undone on the output. TopK, BatchTopK and Matryoshka coders store an encoder bias that they do not use. BatchTopK keeps
the largest activations of a whole batch while training; a coder is read with a fixed threshold instead, which newer files
hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autointerp.coders.activations import Activation, JumpRelu, Relu, TopK
from autointerp.coders.assemble import assemble, chosen_number, length, number, peek_config, read_config, tensors_of
from autointerp.coders.coder import Coder
from autointerp.coders.inputs import InputRule, Standardise
from autointerp.coders.tensors import read_pickle, take
from autointerp.errors import InputError

DESCRIPTION = "BatchTopK and Matryoshka (bartbussmann): config.json and sae.pt"
MARKER = "sae.pt"
IS_FILE = False
OPTIONS: Mapping[str, str] = {"threshold": "for BatchTopK: the activation above which a latent is active"}
_BATCH = ("batchtopk", "global-matryoshka-topk")


def matches(folder: Path) -> bool:
    """Return whether `folder` holds a coder of this format."""
    return (folder / MARKER).is_file() and {"act_size", "sae_type"} <= peek_config(folder / "config.json").keys()


def published_name(folder: Path) -> str:
    """Return the folder's name."""
    return folder.name


def load(folder: Path, options: Mapping[str, str]) -> Coder:
    """Return the coder in `folder`.

    Raises: InputError for BatchTopK without a threshold, or an unknown type; StoreError when a file is missing or damaged.
    """
    config_path, path = folder / "config.json", folder / MARKER
    config = read_config(config_path)
    found = tensors_of(read_pickle(path), path)
    width, d = length(found, "b_enc", path), number(config, "act_size", config_path)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, width), "W_dec": (width, d), "b_enc": (width,), "b_dec": (d,)}
    kind = config["sae_type"]
    if kind == "jumprelu":
        shapes["jumprelu.log_threshold"] = (width,)
    tensors = take(found, shapes, path)
    activation, k, threshold = _activation(config, config_path, tensors, found.get("threshold"), options)
    inputs: tuple[InputRule, ...] = (Standardise(eps=1e-5),) if config.get("input_unit_norm") else ()
    hookpoint, model = config.get("hook_point"), config.get("model_name")
    return assemble(
        format="batch_topk",
        path=folder,
        stored={name: found[name] for name in shapes},
        encoder_LD=tensors["W_enc"].T,
        encoder_bias_L=tensors["b_enc"] if kind in ("vanilla", "jumprelu") else torch.zeros(width),
        decoder_LE=tensors["W_dec"],
        decoder_bias_E=tensors["b_dec"],
        activation=activation,
        hookpoint=hookpoint if isinstance(hookpoint, str) else None,
        subtract=kind != "jumprelu",
        inputs=inputs,
        k=k,
        reading={} if threshold is None else {"threshold": threshold},
        model=model if isinstance(model, str) else None,
        inferred={"threshold": "the reading threshold, as given"} if "threshold" in options else {},
    )


def _activation(
    config: Mapping[str, Any], path: Path, tensors: Mapping[str, Tensor], stored: Tensor | None, options: Mapping[str, str]
) -> tuple[Activation, int | None, float | None]:
    """Return (rule, k, fixed threshold)."""
    kind, folder, width = config["sae_type"], path.parent, len(tensors["b_enc"])
    given = chosen_number(options, "threshold", folder, least=0)
    if given is not None and kind not in _BATCH:
        raise InputError(f"{folder}: threshold is for BatchTopK coders, and this one is {kind!r}")
    if kind == "vanilla":
        return Relu(), None, None
    if kind == "jumprelu":
        return JumpRelu(tensors["jumprelu.log_threshold"].exp()), None, None
    if kind == "topk":
        k = int(number(config, "top_k", path))
        return TopK(k), k, None
    if kind not in _BATCH:
        raise InputError(f"{path}: sae_type = {kind!r} is not read; expected vanilla, topk, jumprelu, {' or '.join(_BATCH)}")
    threshold = given
    if threshold is None and stored is not None and stored.numel() == 1 and 0 < stored.item() < float("inf"):
        threshold = float(stored)
    if threshold is None:
        raise InputError(
            f"{folder} keeps the largest activations of a whole batch ({kind}) and stores no threshold, so that what is active "
            f"depends on what else is in the batch; give one as {folder}?threshold=NUMBER (see autointerp.coders.calibrate)"
        )
    return JumpRelu(torch.full((width,), threshold)), None, threshold
