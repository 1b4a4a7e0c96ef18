"""circuit-tracer's cross-layer transcoders: ``W_enc_N.safetensors`` and ``W_dec_N.safetensors`` for each layer N.

The latents of each layer are read as a coder by themselves: ReLU, or JumpReLU where there are thresholds, of ``x W_enc.T +
b_enc``. They write to the MLP outputs of layers N, N + 1, ...: the output is what they add to each of them, side by side, [F,
(layers - N) * d]. The layers' output biases belong to the sum over all coders and are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from autointerp.coders.activations import Activation, JumpRelu, Relu
from autointerp.coders.assemble import assemble, length
from autointerp.coders.circuit_tracer import NOTE, config_of, hooks_of
from autointerp.coders.coder import Coder
from autointerp.coders.tensors import read_safetensors, safetensors_shapes, take
from autointerp.errors import StoreError

DESCRIPTION = "circuit-tracer cross-layer transcoders: W_enc_N.safetensors and W_dec_N.safetensors"
MARKER = "W_enc_*.safetensors"
IS_FILE = True
OPTIONS: Mapping[str, str] = {}
_LAYER = re.compile(r"W_enc_(\d+)\.safetensors")


def matches(path: Path) -> bool:
    """Return whether the file holds the encoder of one layer of this format."""
    match = _LAYER.fullmatch(path.name)
    return match is not None and {f"W_enc_{match[1]}", f"b_enc_{match[1]}"} <= safetensors_shapes(path).keys()


def published_name(path: Path) -> str:
    """Return ``layer_N``."""
    return path.stem.replace("W_enc_", "layer_")


def load(path: Path, options: Mapping[str, str]) -> Coder:
    """Return the coder of one layer.

    Raises: StoreError when a file is missing, damaged or its shapes do not agree.
    """
    match = _LAYER.fullmatch(path.name)
    assert match is not None
    layer = int(match[1])
    decoder_path = path.with_name(f"W_dec_{layer}.safetensors")
    found, decoders = read_safetensors(path), read_safetensors(decoder_path)
    names = {name: f"{name}_{layer}" for name in ("W_enc", "b_enc", "b_dec", "threshold")}
    width, d = length(found, names["b_enc"], path), length(found, names["b_dec"], path)
    shapes: dict[str, tuple[int, ...]] = {names["W_enc"]: (width, d), names["b_enc"]: (width,), names["b_dec"]: (d,)}
    if names["threshold"] in found:
        shapes[names["threshold"]] = (width,)
    tensors = take(found, shapes, path)
    name = f"W_dec_{layer}"
    stored = decoders.get(name)
    if stored is None or stored.ndim != 3:
        raise StoreError(
            f"{decoder_path} lacks {name} with three dimensions; it holds {', '.join(sorted(decoders)) or 'nothing'}"
        )
    num_written = stored.shape[1]
    decoder = take(decoders, {name: (width, num_written, d)}, decoder_path)[name]
    threshold = tensors.get(names["threshold"])
    activation: Activation = Relu() if threshold is None else JumpRelu(threshold, is_rectified=False)
    config = config_of(path)
    hookpoint, _ = hooks_of(config, layer)
    model = config.get("model_name")
    return assemble(
        format="circuit_tracer_clt",
        path=path,
        stored={**{key: found[key] for key in shapes}, name: stored},
        encoder_LD=tensors[names["W_enc"]],
        encoder_bias_L=tensors[names["b_enc"]],
        decoder_LE=decoder.reshape(width, num_written * d),
        decoder_bias_E=torch.zeros(num_written * d),
        activation=activation,
        hookpoint=hookpoint,
        is_transcoder=True,
        reading={"output_layers": [layer, layer + num_written - 1]},
        model=model if isinstance(model, str) else None,
        inferred={"layer": "the file's name"},
        notes=(NOTE, "The output is what this layer's latents add to the MLP outputs of its own and all later layers."),
    )
