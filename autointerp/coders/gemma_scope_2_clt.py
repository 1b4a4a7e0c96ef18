"""Gemma Scope 2's cross-layer transcoders: one ``params_layer_N.safetensors`` for each layer, each read as a coder by itself.

The coder of layer N reads what the MLP of layer N reads and writes to the MLP outputs of layers N, N + 1, ...: its output is
what it adds to each of them, side by side, [F, (layers - N) * d]. The layers' output biases belong to the sum over all coders
and are left out. The skip connection writes to the own layer alone. No published file has been opened: names and shapes are
those that two loaders of other projects expect. The crosscoders of the release have the same files and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from autointerp.coders.activations import JumpRelu
from autointerp.coders.assemble import BOS_NOTE, assemble, length, peek_config, read_config
from autointerp.coders.coder import Coder
from autointerp.coders.gemma_scope_2 import model_of
from autointerp.coders.tensors import read_safetensors, safetensors_shapes, take
from autointerp.errors import InputError, StoreError

DESCRIPTION = "Gemma Scope 2 cross-layer transcoders: params_layer_N.safetensors"
MARKER = "params_layer_*.safetensors"
IS_FILE = True
OPTIONS: Mapping[str, str] = {}
_NAME = re.compile(r"params_layer_(\d+)\.safetensors")


def matches(path: Path) -> bool:
    """Return whether the file holds one layer of this format."""
    return _NAME.fullmatch(path.name) is not None and {"w_enc", "w_dec", "threshold"} <= safetensors_shapes(path).keys()


def published_name(path: Path) -> str:
    """Return the file's name without its ending, below its folder's."""
    return f"{path.parent.name}/{path.stem}"


def load(path: Path, options: Mapping[str, str]) -> Coder:
    """Return the coder of one layer.

    Raises: InputError for a crosscoder; StoreError when the file is damaged or its shapes do not agree.
    """
    config_path = path.parent / "config.json"
    config = read_config(config_path) if config_path.exists() else {}
    found = read_safetensors(path)
    width, d = length(found, "b_enc", path), length(found, "b_dec", path)
    if _is_crosscoder(path) or ("w_dec" in found and found["w_dec"].ndim != 3):
        raise InputError(
            f"{path} is one layer of a Gemma Scope 2 crosscoder, whose latents read several layers at once; "
            "this package reads coders of one hookpoint, choose one of the release's resid_post coders"
        )
    match = _NAME.fullmatch(path.name)
    assert match is not None
    layer = int(match[1])
    num_layers = found["w_dec"].shape[1] if "w_dec" in found else 0
    shapes: dict[str, tuple[int, ...]] = {
        "w_enc": (d, width), "w_dec": (width, num_layers, d), "b_enc": (width,), "b_dec": (d,), "threshold": (width,),
    }  # fmt: skip
    if "affine_skip_connection" in found or config.get("affine_connection"):
        shapes["affine_skip_connection"] = (d, d)
    tensors = take(found, shapes, path)
    if layer >= num_layers:
        raise StoreError(f"{path}: w_dec writes to {num_layers} layers, and the file's name says layer {layer}")
    d_out = (num_layers - layer) * d
    skip = None
    if "affine_skip_connection" in tensors:
        skip = torch.zeros(d_out, d)
        skip[:d] = tensors["affine_skip_connection"].T
    hookpoint = config.get("hf_hook_point_in")
    is_named = isinstance(hookpoint, str) and f".{layer}." in hookpoint
    return assemble(
        format="gemma_scope_2_clt",
        path=path,
        stored={name: found[name] for name in shapes},
        encoder_LD=tensors["w_enc"].T,
        encoder_bias_L=tensors["b_enc"],
        decoder_LE=tensors["w_dec"][:, layer:].reshape(width, d_out),
        decoder_bias_E=torch.zeros(d_out),
        activation=JumpRelu(tensors["threshold"]),
        hookpoint=str(hookpoint) if is_named else f"model.layers.{layer}.pre_feedforward_layernorm.output",
        is_transcoder=True,
        skip_ED=skip,
        reading={"output_layers": [layer, num_layers - 1]},
        model=model_of(path.parent, config),
        inferred={"layer": "the file's name"} | ({} if is_named else {"hookpoint": "the release's other transcoders"}),
        notes=(BOS_NOTE, "The output is what this layer's latents add to the MLP outputs of its own and all later layers."),
    )


def _is_crosscoder(path: Path) -> bool:
    return (
        "crosscoder" in (path.parent.name, path.parent.parent.name)
        or re.match(r"layer_\d+_\d+", path.parent.name) is not None
        or peek_config(path.parent / "config.json").get("type") == "crosscoder"
    )
