"""OpenAI's coders of GPT-2 small: one torch file ``LOCATION/autoencoders/LAYER.pt``.

Gao et al. 2024, arXiv:2406.04093, and the library sparse_autoencoder. ``pre = (x - pre_bias) W + latent_bias``; ReLU, or the k
largest and ReLU of them. TopK files, and only they, normalise: (x - mean) / (sample deviation + 1e-5), undone on the output.
The residual stream is as it is, not centred.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autointerp.coders.activations import Activation, Relu, TopK
from autointerp.coders.assemble import assemble, length, number, tensors_of
from autointerp.coders.coder import Coder
from autointerp.coders.inputs import InputRule, Standardise
from autointerp.coders.tensors import pickle_shapes, read_pickle, take
from autointerp.errors import StoreError

DESCRIPTION = "OpenAI GPT-2: LOCATION/autoencoders/LAYER.pt"
MARKER = "*.pt"
IS_FILE = True
OPTIONS: Mapping[str, str] = {}
_LOCATIONS = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
}
_LOCATION = re.compile(r"({})(?:_v\d+\w*)?".format("|".join(_LOCATIONS)))


def matches(path: Path) -> bool:
    """Return whether the file holds a coder of this format."""
    return path.suffix == ".pt" and {"pre_bias", "latent_bias", "encoder.weight"} <= pickle_shapes(path).keys()


def published_name(path: Path) -> str:
    """Return the published name, such as ``resid_post_mlp_v5_32k/autoencoders/8``."""
    parts = path.with_suffix("").parts
    first = next((i for i, part in enumerate(parts) if _LOCATION.fullmatch(part)), len(parts) - 1)
    return "/".join(parts[first:])


def load(path: Path, options: Mapping[str, str]) -> Coder:
    """Return the coder in the file.

    Raises: StoreError when it is damaged, its shapes do not agree, or its activation is not known.
    """
    content = read_pickle(path)
    found = tensors_of(content, path)
    width, d = length(found, "latent_bias", path), length(found, "pre_bias", path)
    shapes: dict[str, tuple[int, ...]] = {"encoder.weight": (width, d), "latent_bias": (width,), "pre_bias": (d,)}
    # Tied, the decoder is stored as what it is tied to.
    shapes |= {"decoder.linear.weight": (width, d)} if "decoder.linear.weight" in found else {"decoder.weight": (d, width)}
    tensors = take(found, shapes, path)
    activation, k = _activation(content, path)
    inputs: tuple[InputRule, ...] = () if k is None else (Standardise(eps=1e-5),)
    hookpoint = _hookpoint(path)
    return assemble(
        format="openai_gpt2",
        path=path,
        stored={name: found[name] for name in shapes},
        encoder_LD=tensors["encoder.weight"],
        encoder_bias_L=tensors["latent_bias"],
        decoder_LE=tensors["decoder.weight"].T if "decoder.weight" in tensors else tensors["decoder.linear.weight"],
        decoder_bias_E=tensors["pre_bias"],
        activation=activation,
        hookpoint=hookpoint,
        subtract=True,
        inputs=inputs,
        k=k,
        model="openai-community/gpt2",
        inferred={"model": "the release"} | ({"hookpoint": "the path"} if hookpoint else {}),
        notes=("Trained on contexts of 64 tokens without BOS.",),
    )


def _activation(content: Mapping[str, Any], path: Path) -> tuple[Activation, int | None]:
    name, state = content.get("activation", "ReLU"), content.get("activation_state_dict") or {}
    if name == "ReLU":
        return Relu(), None
    if name == "TopK" and isinstance(state, Mapping) and state.get("postact_fn", "ReLU") in ("ReLU", "Identity"):
        k = int(number(state, "k", path))
        return TopK(k, is_rectified=state.get("postact_fn", "ReLU") == "ReLU"), k
    raise StoreError(
        f"{path}: activation = {name!r} with {state!r} is not known; expected 'ReLU', or 'TopK' with k and postact_fn"
    )


def _hookpoint(path: Path) -> str | None:
    location = next((match for part in reversed(path.parts[:-1]) if (match := _LOCATION.fullmatch(part))), None)
    if location is None or not path.stem.isdigit():
        return None
    return f"blocks.{path.stem}.{_LOCATIONS[location[1]]}"
