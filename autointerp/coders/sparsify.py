"""sparsify / eai-sparsify coders: ``cfg.json`` and ``sae.safetensors`` in a folder named after the module.

Encode: x - b_dec unless ``transcode`` (also with a skip connection: older skip transcoders lack the key and were trained so),
linear, TopK or GroupMax of the positive part; with the legacy ``signed``, TopK by magnitude. Decode: + b_dec (+ x @ W_skip.T,
x as it came in). Reads a module's input iff ``transcode`` or ``skip_connection``; the target is the same module's output.
Unknown keys are ignored, as the library that writes them does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autointerp.coders.activations import Activation, GroupMax, TopK
from autointerp.coders.coder import Coder, CoderSpec
from autointerp.coders.tensors import digest_tensors, read_safetensors, take
from autointerp.errors import StoreError
from autointerp.files import read_json

DESCRIPTION = "sparsify: cfg.json and sae.safetensors"
MARKER = "cfg.json"
IS_FILE = False
OPTIONS: Mapping[str, str] = {}
_VARIANT = re.compile(r"seed\d+|best")


def matches(folder: Path) -> bool:
    """Return whether `folder` holds a coder of this format."""
    return (folder / MARKER).is_file() and (folder / "sae.safetensors").is_file()


def published_name(folder: Path) -> str:
    """Return the module path that the folder's name gives; ``seed0`` and ``best`` are variants inside such a folder."""
    return folder.parent.name if _VARIANT.fullmatch(folder.name) else folder.name


def load(folder: Path, options: Mapping[str, str]) -> Coder:
    """Return the coder in `folder`.

    Raises: StoreError when a file is missing, damaged, or does not fit the configuration.
    """
    config_path, weights_path = folder / MARKER, folder / "sae.safetensors"
    config = read_json(config_path)
    if not isinstance(config, dict):
        raise StoreError(f"{config_path} holds {type(config).__name__}; expected a table of settings")
    d_in, width, k = _sizes(config, config_path)
    activation = _activation(config, k, width, config_path)
    transcode, has_skip = bool(config.get("transcode")), bool(config.get("skip_connection"))
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (width, d_in), "encoder.bias": (width,), "W_dec": (width, d_in), "b_dec": (d_in,),
    }  # fmt: skip
    if has_skip:
        shapes["W_skip"] = (d_in, d_in)
    stored = read_safetensors(weights_path)
    tensors = take(stored, shapes, weights_path)
    module, reads_input = published_name(folder), transcode or has_skip
    return Coder(
        spec=CoderSpec(
            format="sparsify",
            source=str(folder),
            digest=digest_tensors({name: stored[name] for name in shapes}),
            width=width,
            d_in=d_in,
            d_out=d_in,
            activation=activation.name,
            k=k,
            hookpoint=f"{module}@{'in' if reads_input else 'out'}",
            target=f"{module}@out" if reads_input else None,
            is_transcoder=reads_input,
            reading={
                "activation": activation.name,
                "k": k,
                "subtract_b_dec": not transcode,
                "signed": isinstance(activation, TopK) and activation.signed,
            },
        ),
        encoder_LD=tensors["encoder.weight"],
        encoder_bias_L=tensors["encoder.bias"],
        decoder_LE=tensors["W_dec"],
        decoder_bias_E=tensors["b_dec"],
        activation=activation,
        skip_ED=tensors.get("W_skip"),
        subtract_decoder_bias=not transcode,
    )


def _sizes(config: dict[str, Any], path: Path) -> tuple[int, int, int]:
    """Return (d_in, number of latents, k)."""

    def number(key: str, default: int) -> int:
        value = config.get(key, default)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise StoreError(f"{path}: {key} = {value!r}; expected a whole number")
        return value

    d_in, k = number("d_in", 0), number("k", 0)
    for key, value in (("d_in", d_in), ("k", k)):
        if value == 0:
            raise StoreError(f"{path} lacks {key!r}, without which a sparsify coder cannot be read")
    width = number("num_latents", 0) or d_in * number("expansion_factor", 32)
    if k > width:
        raise StoreError(f"{path}: k = {k} is larger than the number of latents {width}")
    return d_in, width, k


def _activation(config: dict[str, Any], k: int, width: int, path: Path) -> Activation:
    name = config.get("activation") or "topk"
    if name == "topk":
        return TopK(k, signed=bool(config.get("signed")))
    if name == "groupmax":
        if width % k:
            raise StoreError(f"{path}: groupmax needs a number of latents divisible by k; found {width} and k = {k}")
        return GroupMax(k)
    raise StoreError(f"{path}: activation = {name!r} is not one that sparsify writes; expected 'topk' or 'groupmax'")
