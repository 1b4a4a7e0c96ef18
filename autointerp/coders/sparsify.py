"""sparsify / eai-sparsify coders: ``cfg.json`` and ``sae.safetensors`` in a folder named after the module.

Encode: x - b_dec unless ``transcode`` (also with a skip connection: older skip transcoders lack the key and were trained so),
linear, TopK or GroupMax of the positive part; with the legacy ``signed``, TopK by magnitude. Decode: + b_dec (+ x @ W_skip.T,
x as it came in). Reads a module's input iff ``transcode`` or ``skip_connection``; the target is the same module's output.
Unknown keys are ignored, as the library that writes them does.

The fork clt-training writes the same files with more in them: ``normalize_io`` (x sqrt(d) / in_norm first, out_norm / sqrt(d)
last), biases and scales behind the encoder (``post_enc``), which change what is decoded and not what is active, and with
``n_targets`` one decoder for each layer written to, of which the one for the coder's own layer is taken. Where top-k runs over
several layers at once (``coalesce_topk``) no layer can be read alone, and it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autointerp.coders.activations import Activation, GroupMax, JumpRelu, TopK
from autointerp.coders.assemble import chosen_number
from autointerp.coders.coder import Coder, CoderSpec
from autointerp.coders.tensors import digest_tensors, read_safetensors, take
from autointerp.errors import InputError, StoreError
from autointerp.files import read_json

DESCRIPTION = "sparsify: cfg.json and sae.safetensors"
MARKER = "cfg.json"
IS_FILE = False
OPTIONS: Mapping[str, str] = {"threshold": "the activation threshold of a batchtopk coder, whose file has none"}
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
    _check_alone(config, config_path)
    activation = _activation(config, k, width, config_path, chosen_number(options, "threshold", folder, least=0))
    transcode, has_skip = bool(config.get("transcode")), bool(config.get("skip_connection"))
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (width, d_in), "encoder.bias": (width,), "W_dec": (width, d_in), "b_dec": (d_in,),
    }  # fmt: skip
    if has_skip:
        shapes["W_skip"] = (d_in, d_in)
    stored = read_safetensors(weights_path)
    given = _of_own_layer(stored)
    for name, is_used in (("post_enc", True), ("post_enc_scale", bool(config.get("post_encoder_scale")))):
        if is_used and any(key == name or key.startswith(f"{name}s.") for key in given):
            shapes[name] = (width,)
    if config.get("normalize_io"):
        shapes |= {"in_norm": (1,), "out_norm": (1,)}
    tensors = take(given, shapes, weights_path)
    encoder, encoder_bias, decoder = tensors["encoder.weight"], tensors["encoder.bias"], tensors["W_dec"]
    decoder_bias, skip, subtract = tensors["b_dec"], tensors.get("W_skip"), not transcode
    if "post_enc_scale" in tensors:
        decoder = decoder * tensors["post_enc_scale"][:, None]
    if config.get("normalize_io"):
        scale_in, scale_out = d_in**0.5 / tensors["in_norm"], tensors["out_norm"] / d_in**0.5
        if subtract:
            # The bias is in units of the scaled input: taken out behind the encoder instead.
            encoder_bias, subtract = encoder_bias - encoder @ decoder_bias, False
        encoder, decoder, decoder_bias = encoder * scale_in, decoder * scale_out, decoder_bias * scale_out
        skip = None if skip is None else skip * (scale_in * scale_out)
    module, reads_input = published_name(folder), transcode or has_skip
    shift = tensors.get("post_enc")
    rules: dict[str, Any] = {"activation": activation.name, "k": None if isinstance(activation, JumpRelu) else k}
    rules |= {"threshold": float(activation.threshold[0])} if isinstance(activation, JumpRelu) else {}
    return Coder(
        spec=CoderSpec(
            format="sparsify",
            source=str(folder),
            digest=digest_tensors({name: given[name] for name in shapes}),
            width=width,
            d_in=d_in,
            d_out=d_in,
            activation=activation.name,
            k=rules["k"],
            hookpoint=f"{module}@{'in' if reads_input else 'out'}",
            target=f"{module}@out" if reads_input else None,
            is_transcoder=reads_input,
            reading=rules
            | {
                "subtract_b_dec": not transcode,
                "signed": isinstance(activation, TopK) and activation.signed,
            },
            notes=_notes(config),
        ),
        encoder_LD=encoder,
        encoder_bias_L=encoder_bias,
        decoder_LE=decoder,
        decoder_bias_E=decoder_bias,
        activation=activation,
        skip_ED=skip,
        subtract_decoder_bias=subtract,
        decoded_shift_L=shift if shift is not None and bool(shift.any()) else None,
    )


def _check_alone(config: dict[str, Any], path: Path) -> None:
    """Raise InputError where the coder's activations depend on other layers."""
    joint = config.get("coalesce_topk") or "none"
    if joint != "none":
        raise InputError(
            f"{path}: coalesce_topk = {joint!r} takes the k largest over several layers at once, so that this layer's "
            "activations depend on the others; a coder of one layer alone is needed"
        )


def _of_own_layer(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names that a coder with one target has."""
    names = {
        "W_decs.0": "W_dec", "b_decs.0": "b_dec", "W_skips.0": "W_skip",
        "post_encs.0": "post_enc", "post_enc_scales.0": "post_enc_scale",
    }  # fmt: skip
    # Tensors of two names are saved under one of them.
    return {names.get(name, name): tensor for name, tensor in stored.items()}


def _notes(config: dict[str, Any]) -> tuple[str, ...]:
    targets = config.get("n_targets")
    if not config.get("transcode") or not isinstance(targets, int) or targets < 2:
        return ()
    return (
        f"Writes to {targets} layers; what is decoded here is its part of its own layer, to which earlier layers add theirs.",
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


def _activation(config: dict[str, Any], k: int, width: int, path: Path, threshold: float | None) -> Activation:
    name = config.get("activation") or "topk"
    if name == "topk":
        return TopK(k, signed=bool(config.get("signed")))
    if name == "groupmax":
        if width % k:
            raise StoreError(f"{path}: groupmax needs a number of latents divisible by k; found {width} and k = {k}")
        return GroupMax(k)
    if name == "batchtopk":
        if threshold is None:
            raise InputError(
                f"{path}: activation = 'batchtopk' keeps the largest over the whole batch, so that one token's activations "
                "depend on the others; add ?threshold=NUMBER after the source"
            )
        return JumpRelu(torch.full((width,), threshold))
    raise StoreError(f"{path}: activation = {name!r} is not one that sparsify writes; expected 'topk' or 'groupmax'")
