"""Llama Scope R1-Distill coders: ``config.json`` and ``sae_weights.safetensors`` with the first format's tensor names.

As the authors' code of early 2025 runs them: ``z = x * s; pre = W z + b; f = pre where pre (times the decoder's norm, if the
settings say so) > exp(log threshold); out = (D f + b_D) / s`` with s = sqrt(d) / the data set's mean norm. Where the file
lacks that norm, s must be given: SAELens lists it for each coder as ``norm_scaling_factor``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from autointerp.coders.activations import JumpRelu
from autointerp.coders.assemble import BOS_NOTE, assemble, chosen_number, length, read_config
from autointerp.coders.coder import Coder
from autointerp.coders.tensors import read_safetensors, safetensors_shapes, take
from autointerp.errors import InputError

DESCRIPTION = "Llama Scope R1-Distill: config.json and sae_weights.safetensors"
MARKER = "sae_weights.safetensors"
IS_FILE = False
OPTIONS: Mapping[str, str] = {"norm_scaling_factor": "sqrt(d) over the mean norm of the vectors read, where the file lacks it"}
NORM = "dataset_average_activation_norm."


def matches(folder: Path) -> bool:
    """Return whether `folder` holds a coder of this format."""
    return {"encoder.weight", "log_jumprelu_threshold"} <= safetensors_shapes(folder / MARKER).keys()


def published_name(folder: Path) -> str:
    """Return the published name of the folder within its repository, such as ``0-OpenR1-Math-220k/L15R``."""
    return f"{folder.parent.name}/{folder.name}"


def load(folder: Path, options: Mapping[str, str]) -> Coder:
    """Return the coder in `folder`.

    Raises: InputError when the norm is neither stored nor given; StoreError when a file is missing or damaged.
    """
    path = folder / MARKER
    config = read_config(folder / "config.json")
    hookpoint = config.get("hook_point_in")
    if config.get("use_glu_encoder") or config.get("hook_point_out", hookpoint) != hookpoint:
        raise InputError(f"{folder} is a transcoder or has a gated linear encoder, which no published coder of this format is")
    found = read_safetensors(path)
    width, d = length(found, "encoder.bias", path), length(found, "decoder.bias", path)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (width, d), "encoder.bias": (width,), "decoder.weight": (d, width), "decoder.bias": (d,),
        "log_jumprelu_threshold": (width,),
    }  # fmt: skip
    tensors = take(found, shapes, path)
    decoder_LE = tensors["decoder.weight"].T
    threshold = tensors["log_jumprelu_threshold"].exp()
    if config.get("sparsity_include_decoder_norm"):
        threshold = threshold / decoder_LE.norm(dim=1)
    scale, source = _scale(found, config, d, options, folder)
    return assemble(
        format="llama_scope_r1",
        path=folder,
        stored={name: found[name] for name in shapes},
        encoder_LD=tensors["encoder.weight"] * scale,
        encoder_bias_L=tensors["encoder.bias"],
        decoder_LE=decoder_LE / scale,
        decoder_bias_E=tensors["decoder.bias"] / scale,
        activation=JumpRelu(threshold),
        hookpoint=hookpoint if isinstance(hookpoint, str) else None,
        subtract=bool(config.get("apply_decoder_bias_to_pre_encoder")),
        reading={"scale": scale},
        model="deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        inferred={"model": "the release"} | ({"scale": source} if source else {}),
        notes=(BOS_NOTE,),
    )


def _scale(
    found: Mapping[str, Tensor], config: Mapping[str, Any], d: int, options: Mapping[str, str], folder: Path
) -> tuple[float, str | None]:
    if config.get("norm_activation") == "inference":
        return 1.0, None
    given = chosen_number(options, "norm_scaling_factor", folder, least=1e-9)
    if given is not None:
        return given, "norm_scaling_factor, as given"
    norms = [tensor for name, tensor in found.items() if name == f"{NORM}{config.get('hook_point_in')}"]
    norms = norms or [tensor for name, tensor in found.items() if name.startswith(NORM)][:1]
    if norms and norms[0].numel() == 1 and 0 < norms[0].item() < float("inf"):
        return float(d**0.5 / norms[0].item()), None
    raise InputError(
        f"{folder} does not say the mean norm of the vectors that it was trained on; give sqrt({d}) over that norm as "
        f"{folder}?norm_scaling_factor=NUMBER (SAELens lists it under that name for each coder of the release)"
    )
