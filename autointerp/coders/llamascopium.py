"""Coders of OpenMOSS's llamascopium 2 (Language-Model-SAEs): ``config.json`` with ``sae_type``, ``sae_weights.safetensors``.

Read are those of type ``sae``, SAEs and transcoders alike: x times sqrt(d) / norm (``dataset-wise``: the norm stored for the
hook; ``token-wise``: the row's own; ``inference``: folded already), linear, activation on pre-activations times the latent's
decoder norm where ``sparsity_include_decoder_norm``, divided by it afterwards; the output is scaled back. The other types are
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autointerp.coders.activations import Activation, JumpRelu, Relu, ScaledTopK, TopK
from autointerp.coders.assemble import assemble, chosen_number, length, number, peek_config, read_config
from autointerp.coders.coder import Coder
from autointerp.coders.inputs import InputRule, UnitNorm
from autointerp.coders.llama_scope_r1 import NORM
from autointerp.coders.tensors import read_safetensors, safetensors_shapes, take
from autointerp.errors import InputError, StoreError

DESCRIPTION = "llamascopium 2: config.json and sae_weights.safetensors"
MARKER = "sae_weights.safetensors"
IS_FILE = False
OPTIONS: Mapping[str, str] = {"threshold": "for BatchTopK: the activation above which a latent is active"}
_LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
REFUSED = {
    "clt": "its latents of all layers are trained together and stored in one file",
    "crosscoder": "its latents read several hookpoints at once",
    "lorsa": "it is an attention layer, whose latents depend on the tokens before",
    "molt": "its latents are low-rank maps, not directions",
}
"""Type of coder -> why it is not read."""


def matches(folder: Path) -> bool:
    """Return whether `folder` holds a coder of this format."""
    shapes = safetensors_shapes(folder / MARKER)
    # Their predecessors, such as Llama Scope R1-Distill's, say sae_type too and have an encoder and a decoder.
    return bool(shapes) and "encoder.weight" not in shapes and "sae_type" in peek_config(folder / "config.json")


def published_name(folder: Path) -> str:
    """Return the folder's name."""
    return folder.name


def load(folder: Path, options: Mapping[str, str]) -> Coder:
    """Return the coder in `folder`.

    Raises: InputError for a type of coder that is not read, or BatchTopK without a threshold; StoreError for damage.
    """
    config_path, path = folder / "config.json", folder / MARKER
    config = read_config(config_path)
    kind = config.get("sae_type")
    if kind != "sae":
        why = REFUSED.get(str(kind), "it is a type that this package does not know")
        raise InputError(f"{folder} is a llamascopium coder of type {kind!r}, which is not read: {why}")
    if config.get("use_glu_encoder"):
        raise InputError(f"{folder} has a gated linear encoder (use_glu_encoder), which is not read")
    found = read_safetensors(path)
    width, d = length(found, "b_E", path), number(config, "d_model", config_path)
    shapes: dict[str, tuple[int, ...]] = {"W_E": (d, width), "b_E": (width,), "W_D": (width, d)}
    if config.get("use_decoder_bias", True):
        shapes["b_D"] = (d,)
    if config.get("act_fn") == "jumprelu":
        shapes[_LOG_THRESHOLD] = (width,)
    tensors = take(found, shapes, path)
    read, written = (config.get(key) for key in ("hook_point_in", "hook_point_out"))
    is_transcoder = written is not None and written != read
    inputs: tuple[InputRule, ...] = ()
    scale_in = scale_out = 1.0
    mode = config.get("norm_activation")
    if mode == "dataset-wise":
        scale_in, scale_out = (_scale(found, hook, d, path) for hook in (read, written or read))
    elif mode == "token-wise":
        inputs = (UnitNorm(),)
    elif mode != "inference":
        raise InputError(
            f"{folder}: norm_activation = {mode!r} depends on the batch, or is unknown; "
            "expected 'dataset-wise', 'token-wise' or 'inference'"
        )
    norm_L = tensors["W_D"].norm(dim=1) if config.get("sparsity_include_decoder_norm", True) else None
    activation, k = _activation(config, config_path, tensors, norm_L, options)
    notes = ("A prediction is on the scale of vectors of norm sqrt(d).",) if is_transcoder and inputs else ()
    return assemble(
        format="llamascopium",
        path=folder,
        stored={name: found[name] for name in shapes},
        encoder_LD=tensors["W_E"].T * scale_in,
        encoder_bias_L=tensors["b_E"],
        decoder_LE=tensors["W_D"] / scale_out,
        decoder_bias_E=tensors.get("b_D", torch.zeros(d)) / scale_out,
        activation=activation,
        hookpoint=read if isinstance(read, str) else None,
        target=str(written) if is_transcoder else None,
        is_transcoder=is_transcoder,
        inputs=inputs,
        k=k,
        reading={"scale_in": scale_in, "scale_out": scale_out, "decoder_norm_included": norm_L is not None}
        | ({"threshold": options["threshold"]} if "threshold" in options else {}),
        notes=notes,
    )


def _scale(found: Mapping[str, Tensor], hook: object, d: int, path: Path) -> float:
    norm = found.get(f"{NORM}{hook}")
    if norm is None or norm.numel() != 1 or not 0 < norm.item() < float("inf"):
        raise StoreError(f"{path} lacks {NORM}{hook}, a norm above 0, which norm_activation = 'dataset-wise' needs")
    return float(d**0.5 / norm.item())


def _activation(
    config: Mapping[str, Any], path: Path, tensors: Mapping[str, Tensor], norm_L: Tensor | None, options: Mapping[str, str]
) -> tuple[Activation, int | None]:
    name, width = config.get("act_fn"), len(tensors["b_E"])
    factor_L = torch.ones(width) if norm_L is None else norm_L
    threshold = chosen_number(options, "threshold", path.parent, least=0)
    if name == "batchtopk" and threshold is None:
        raise InputError(
            f"{path.parent} keeps the largest activations of a whole batch (batchtopk) and stores no threshold, so that what "
            f"is active depends on what else is in the batch; give one as {path.parent}?threshold=NUMBER"
        )
    if threshold is not None:
        if name != "batchtopk":
            raise InputError(f"{path.parent}: threshold is for BatchTopK coders, and this one has act_fn = {name!r}")
        return JumpRelu(torch.full((width,), threshold) / factor_L), None
    if name == "relu":
        return Relu(), None
    if name == "jumprelu":
        return JumpRelu(tensors[_LOG_THRESHOLD].exp() / factor_L), None
    if name == "topk":
        k = number(config, "top_k", path)
        return TopK(k) if norm_L is None else ScaledTopK(TopK(k), norm_L), k
    raise InputError(f"{path}: act_fn = {name!r} is not read; expected 'relu', 'jumprelu', 'topk' or 'batchtopk'")
