"""Gemma Scope 1 coders (Gemma 2): one ``params.npz`` per folder; the path is the only configuration.

JumpReLU, no b_dec subtraction, no normalisation. Repository names end in res, mlp, att or transcoders; a path holds
``layer_L/width_W/average_l0_N``. Transcoders read the middle of the residual stream divided by its root mean square, without
the norm's gain (it was folded into their training input), which no module gives out: it is computed here from the norm's input.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from autointerp.coders.activations import JumpRelu
from autointerp.coders.assemble import BOS_NOTE
from autointerp.coders.coder import Coder, CoderSpec
from autointerp.coders.inputs import InputRule, Rms
from autointerp.coders.tensors import digest_tensors, read_npz, take
from autointerp.errors import StoreError

DESCRIPTION = "Gemma Scope: params.npz"
MARKER = "params.npz"
IS_FILE = False
OPTIONS: Mapping[str, str] = {}
_LAYER = re.compile(r"layer_(\d+)")
_SITE = re.compile(r"gemma-scope-(?:2b|9b|27b)-(?:pt|it)-(res|mlp|att|transcoders)\b")
_MODEL = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-")
_L0 = re.compile(r"average_l0_(\d+)")
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def matches(folder: Path) -> bool:
    """Return whether `folder` holds a coder of this format."""
    return (folder / MARKER).is_file()


def published_name(folder: Path) -> str:
    """Return the published name of the folder within its repository."""
    parts = folder.parts
    first = next((i for i, part in enumerate(parts) if _LAYER.fullmatch(part) or part == "embedding"), len(parts) - 1)
    return "/".join(parts[first:])


def load(folder: Path, options: Mapping[str, str]) -> Coder:
    """Return the coder in `folder`.

    Raises: StoreError when the file is missing, damaged or its shapes do not agree.
    """
    path = folder / MARKER
    found = read_npz(path)
    stored = {name: found[key] for name in _NAMES for key in (name, name.lower()) if key in found}
    if "b_enc" not in stored or "b_dec" not in stored:
        raise StoreError(f"{path} lacks b_enc or b_dec; a Gemma Scope file holds {', '.join(_NAMES)}, this one {sorted(found)}")
    width, d = stored["b_enc"].numel(), stored["b_dec"].numel()
    shapes = {"W_enc": (d, width), "W_dec": (width, d), "b_enc": (width,), "b_dec": (d,), "threshold": (width,)}
    tensors = take(stored, shapes, path)
    hookpoint, target, site = _hookpoint(folder)
    inputs: tuple[InputRule, ...] = (Rms(),) if site == "transcoders" else ()
    encoder, decoder, decoder_bias = tensors["W_enc"], tensors["W_dec"], tensors["b_dec"]
    if site == "embedding":
        # The subject's first block is fed embeddings times sqrt(d); the coder was trained on the table's rows.
        encoder, decoder, decoder_bias = encoder / d**0.5, decoder * d**0.5, decoder_bias * d**0.5
    return Coder(
        spec=CoderSpec(
            format="gemma_scope",
            source=str(folder),
            digest=digest_tensors(stored),
            width=width,
            d_in=d,
            d_out=d,
            activation="jumprelu",
            hookpoint=hookpoint,
            target=target,
            is_transcoder=site == "transcoders",
            reading={
                "activation": "jumprelu",
                "subtract_b_dec": False,
                "inputs": [rule.name for rule in inputs],
                "embedding_scaled": site == "embedding",
            },
            model=_model(folder),
            l0=float(l0[1]) if (l0 := _L0.fullmatch(folder.name)) else None,
            inferred=dict.fromkeys(("hookpoint", "model", "l0"), "the path") if hookpoint else {},
            notes=(BOS_NOTE,),
        ),
        encoder_LD=encoder.T.contiguous(),
        encoder_bias_L=tensors["b_enc"],
        decoder_LE=decoder.contiguous(),
        decoder_bias_E=decoder_bias,
        activation=JumpRelu(tensors["threshold"]),
        inputs=inputs,
    )


def _model(folder: Path) -> str | None:
    match = _MODEL.search(folder.as_posix())
    return f"google/gemma-2-{match[1]}{'-it' if match[2] == 'it' else ''}" if match else None


def _hookpoint(folder: Path) -> tuple[str | None, str | None, str | None]:
    """Return (hookpoint, target, site) as far as the path tells them."""
    text = folder.as_posix()
    sites = _SITE.findall(text)
    if "embedding" in folder.parts:
        return "layers.0@in", None, "embedding"
    layers = [match.group(1) for part in folder.parts if (match := _LAYER.fullmatch(part))]
    if not sites or not layers:
        return None, None, sites[-1] if sites else None
    site, block = sites[-1], f"layers.{layers[-1]}"
    hookpoints = {
        "res": f"{block}@out",
        "mlp": f"{block}.post_feedforward_layernorm@out",
        "att": f"{block}.self_attn.o_proj@in",
        "transcoders": f"{block}.pre_feedforward_layernorm@in",
    }
    target = f"{block}.post_feedforward_layernorm@out" if site == "transcoders" else None
    return hookpoints[site], target, site
