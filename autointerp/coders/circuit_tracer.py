"""circuit-tracer's per-layer transcoders: ``config.yaml`` and one ``layer_N.safetensors`` a layer, each a coder by itself.

``act(x W_enc.T + b_enc) W_dec + b_dec (+ x W_skip.T)``, no b_dec subtraction. The activation is JumpReLU where the file has
thresholds, TopK (the k largest, positive or not) where the configuration says so, else ReLU. Repositories differ in the memory
order of W_enc and W_dec: the shapes tell, which is why width must not equal the vectors' width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from autointerp.coders.activations import Activation, JumpRelu, Relu, TopK
from autointerp.coders.assemble import assemble, chosen_k, length, number, read_config
from autointerp.coders.coder import Coder
from autointerp.coders.tensors import read_safetensors, safetensors_shapes, take
from autointerp.errors import InputError, StoreError

DESCRIPTION = "circuit-tracer transcoders: config.yaml and layer_N.safetensors"
MARKER = "layer_*.safetensors"
IS_FILE = True
OPTIONS: Mapping[str, str] = {"k": "number of active latents of a TopK transcoder, where the configuration does not tell"}
NOTE = "circuit-tracer zeroes position 0 (0 to 3 for gemma-3 instruction models): leave it out."
_LAYER = re.compile(r"layer_(\d+)\.safetensors")
_THRESHOLDS = ("activation_function.threshold", "threshold")


def matches(path: Path) -> bool:
    """Return whether the file holds a coder of this format."""
    return _LAYER.fullmatch(path.name) is not None and {"W_enc", "W_dec", "b_enc", "b_dec"} <= safetensors_shapes(path).keys()


def published_name(path: Path) -> str:
    """Return the file's name without its ending."""
    return path.stem


def load(path: Path, options: Mapping[str, str]) -> Coder:
    """Return the transcoder in the file.

    Raises: InputError for TopK without k; StoreError when a file is damaged or its shapes do not agree.
    """
    config = config_of(path)
    found = read_safetensors(path)
    width, d_out = length(found, "b_enc", path), length(found, "b_dec", path)
    threshold = next((name for name in _THRESHOLDS if name in found), None)
    encoder, d_in = _orientation(found, "W_enc", width, path)
    decoder, _ = _orientation(found, "W_dec", width, path)
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (width, d_in)[::encoder], "W_dec": (width, d_out)[::decoder], "b_enc": (width,), "b_dec": (d_out,),
    }  # fmt: skip
    if threshold is not None:
        shapes[threshold] = (width,)
    if "W_skip" in found:
        shapes["W_skip"] = (d_out, d_in)
    tensors = take(found, shapes, path)
    activation, k = _activation(config, tensors.get(threshold or ""), found.get("k"), path, options)
    match = _LAYER.fullmatch(path.name)
    assert match is not None
    hookpoint, target = hooks_of(config, int(match[1]))
    model = config.get("model_name")
    return assemble(
        format="circuit_tracer",
        path=path,
        stored={name: found[name] for name in shapes},
        encoder_LD=tensors["W_enc"] if encoder == 1 else tensors["W_enc"].T,
        encoder_bias_L=tensors["b_enc"],
        decoder_LE=tensors["W_dec"] if decoder == 1 else tensors["W_dec"].T,
        decoder_bias_E=tensors["b_dec"],
        activation=activation,
        hookpoint=hookpoint,
        target=target,
        is_transcoder=True,
        skip_ED=tensors.get("W_skip"),
        k=k,
        model=model if isinstance(model, str) else None,
        inferred={"layer": "the file's name"},
        notes=(NOTE,),
    )


def config_of(path: Path) -> dict[str, Any]:
    """Return the settings in the nearest ``config.yaml``: of the file's folder, or the one above; none where there is none."""
    for folder in (path.parent, path.parent.parent):
        if (folder / "config.yaml").is_file():
            return read_config(folder / "config.yaml")
    return {}


def hooks_of(config: Mapping[str, Any], layer: int) -> tuple[str | None, str | None]:
    """Return (hookpoint, target) of a layer; the settings hold names without a block, such as ``hook_resid_mid``."""
    names = (config.get("feature_input_hook"), config.get("feature_output_hook"))
    read, written = (f"blocks.{layer}.{name}" if isinstance(name, str) and name else None for name in names)
    return read, written


def _orientation(found: Mapping[str, Tensor], name: str, width: int, path: Path) -> tuple[int, int]:
    """Return (1 where latents come first in the matrix, -1 where last; its other size)."""
    shape = tuple(found[name].shape) if name in found else ()
    if len(shape) != 2 or width not in shape or shape[0] == shape[1]:
        raise StoreError(
            f"{path}: {name} has shape {shape}, and b_enc says {width} latents; "
            "expected a matrix with them on one side and another size on the other"
        )
    return (1, shape[1]) if shape[0] == width else (-1, shape[0])


def _activation(
    config: Mapping[str, Any], threshold: Tensor | None, stored_k: Tensor | None, path: Path, options: Mapping[str, str]
) -> tuple[Activation, int | None]:
    name, given = config.get("activation"), chosen_k(options, path)
    if name == "topk" or (name is None and threshold is None and (given is not None or stored_k is not None)):
        if given is None and "k" not in config and stored_k is not None and stored_k.numel() == 1:
            given = int(stored_k)
        if given is None and "k" not in config:
            raise InputError(
                f"{path}: config.yaml says topk and not how many; give it as {path}?k=NUMBER "
                "(128 for facebook/crv-8b-instruct-transcoders)"
            )
        k = int(number(config, "k", path.with_name("config.yaml"))) if given is None else given
        return TopK(k, is_rectified=False), k
    if given is not None:
        raise InputError(f"{path}: k is for TopK transcoders, and this one is not")
    if name not in (None, "relu", "jump_relu", "jumprelu"):
        raise StoreError(f"{path}: config.yaml has activation = {name!r}; expected 'relu' or 'topk', or thresholds in the file")
    if (name == "relu" and threshold is not None) or (name not in (None, "relu") and threshold is None):
        raise StoreError(f"{path}: config.yaml has activation = {name!r}, and the file has {'no ' if threshold is None else ''}"
                         "thresholds; they belong to different coders")  # fmt: skip
    return (Relu(), None) if threshold is None else (JumpRelu(threshold, is_rectified=False), None)
