"""Llama Scope coders (Llama 3.1 8B), the first format: ``hyperparams.json`` and ``checkpoints/final.safetensors``.

He et al. 2024, arXiv:2410.20526. As its authors' code loads them (November 2024): the data set's norm is folded into the
biases and the decoder, then the decoder's norms into the encoder, and one threshold is applied to the result, with the
subject's vectors as they are. ``reading=saelens`` is what SAELens computes from the same files: the norm folded into the
encoder and the threshold scaled with it, decoder norms left out, so that another set of latents is active.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autointerp.coders.activations import Activation, JumpRelu, Relu, TopK
from autointerp.coders.assemble import BOS_NOTE, assemble, length, number, read_config
from autointerp.coders.coder import Coder
from autointerp.coders.tensors import read_safetensors, take
from autointerp.errors import InputError, StoreError, nearest

DESCRIPTION = "Llama Scope: hyperparams.json and checkpoints/final.safetensors"
MARKER = "hyperparams.json"
IS_FILE = False
OPTIONS: Mapping[str, str] = {"reading": "official (as the authors' code reads the files) or saelens"}
_WEIGHTS = Path("checkpoints") / "final.safetensors"


def matches(folder: Path) -> bool:
    """Return whether `folder` holds a coder of this format."""
    return (folder / MARKER).is_file() and (folder / _WEIGHTS).is_file()


def published_name(folder: Path) -> str:
    """Return the folder's name, such as ``Llama3_1-8B-Base-L15R-8x``."""
    return folder.name


def load(folder: Path, options: Mapping[str, str]) -> Coder:
    """Return the coder in `folder`.

    Raises: InputError for an unknown reading; StoreError when a file is missing, damaged, or says what no release does.
    """
    config_path, path = folder / MARKER, folder / _WEIGHTS
    rule = options.get("reading", "official")
    if rule not in ("official", "saelens"):
        raise InputError(f"{folder}: reading={rule} is not known; {nearest(rule, ['official', 'saelens'])}")
    config = read_config(config_path)
    if config.get("use_glu_encoder"):
        raise StoreError(f"{config_path}: use_glu_encoder is true, which no published coder has and this package does not read")
    found = read_safetensors(path)
    width = length(found, "encoder.bias", path)
    d = number(config, "d_model", config_path)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (width, d), "encoder.bias": (width,), "decoder.weight": (d, width),
    }  # fmt: skip
    if config.get("use_decoder_bias", True):
        shapes["decoder.bias"] = (d,)
    tensors = take(found, shapes, path)
    tensors.setdefault("decoder.bias", torch.zeros(d))
    scale_in, scale_out = _scales(config, d, config_path)
    read, written = (config.get(key) for key in ("hook_point_in", "hook_point_out"))
    is_transcoder = written is not None and written != read
    fold = _as_authors if rule == "official" else _as_saelens
    encoder, bias, decoder, decoder_bias, factor = fold(tensors, config, scale_in, scale_out)
    activation, k = _activation(config, config_path, width, factor)
    return assemble(
        format="llama_scope",
        path=folder,
        stored={name: found[name] for name in shapes},
        encoder_LD=encoder,
        encoder_bias_L=bias,
        decoder_LE=decoder,
        decoder_bias_E=decoder_bias,
        activation=activation,
        hookpoint=read if isinstance(read, str) else None,
        target=str(written) if is_transcoder else None,
        is_transcoder=is_transcoder,
        subtract=bool(config.get("apply_decoder_bias_to_pre_encoder")),
        k=k,
        reading={"rule": rule, "scale_in": scale_in, "scale_out": scale_out},
        model="meta-llama/Llama-3.1-8B",
        inferred={"model": "the release"},
        notes=(BOS_NOTE,),
    )


_Parts = tuple[Tensor, Tensor, Tensor, Tensor, float]
"""Encoder [L, D], its bias, decoder [L, E], its bias, and what the published threshold is multiplied by."""


def _as_authors(tensors: Mapping[str, Tensor], config: Mapping[str, Any], scale_in: float, scale_out: float) -> _Parts:
    decoder_LE = tensors["decoder.weight"].T * (scale_in / scale_out)
    norm_L = torch.ones(len(decoder_LE))
    if config.get("sparsity_include_decoder_norm", True):
        norm_L = decoder_LE.norm(dim=1)
    encoder_LD = tensors["encoder.weight"] * norm_L[:, None]
    bias_L = tensors["encoder.bias"] / scale_in * norm_L
    return encoder_LD, bias_L, decoder_LE / norm_L[:, None], tensors["decoder.bias"] / scale_out, 1.0


def _as_saelens(tensors: Mapping[str, Tensor], config: Mapping[str, Any], scale_in: float, scale_out: float) -> _Parts:
    encoder_LD, decoder_LE = tensors["encoder.weight"] * scale_in, tensors["decoder.weight"].T / scale_in
    return encoder_LD, tensors["encoder.bias"], decoder_LE, tensors["decoder.bias"] / scale_in, scale_in


def _scales(config: Mapping[str, Any], d: int, path: Path) -> tuple[float, float]:
    """Return what brings the vectors read and written to a mean norm of sqrt(d)."""
    mode = config.get("norm_activation")
    if mode in (None, "inference"):
        return 1.0, 1.0
    norms = config.get("dataset_average_activation_norm")
    if mode != "dataset-wise" or not isinstance(norms, dict):
        raise StoreError(
            f"{path}: norm_activation = {mode!r} with dataset_average_activation_norm = {norms!r}; "
            "expected 'dataset-wise' and the two norms"
        )
    return d**0.5 / number(norms, "in", path, whole=False), d**0.5 / number(norms, "out", path, whole=False)


def _activation(config: Mapping[str, Any], path: Path, width: int, factor: float) -> tuple[Activation, int | None]:
    name, threshold = config.get("act_fn"), config.get("jump_relu_threshold") or 0
    if name == "jumprelu" or (name == "topk" and threshold > 0):
        value = number(config, "jump_relu_threshold", path, whole=False) * factor
        return JumpRelu(torch.full((width,), value)), None
    if name == "relu":
        return Relu(), None
    if name == "topk":
        k = number(config, "top_k", path)
        return TopK(k), k
    raise StoreError(f"{path}: act_fn = {name!r} is not one that Llama Scope has; expected 'jumprelu', 'topk' or 'relu'")
