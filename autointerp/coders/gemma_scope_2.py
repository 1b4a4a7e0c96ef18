"""Gemma Scope 2 coders (Gemma 3), but for its cross-layer ones: ``params.safetensors`` and ``config.json`` in a folder.

JumpReLU, no b_dec subtraction, no normalisation; ``affine_skip_connection`` is used as ``x @ affine``. Unlike Gemma Scope 1's,
transcoders read the norm's output, after its gain. Where the configuration is missing the path tells the hooks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autointerp.coders.activations import JumpRelu
from autointerp.coders.assemble import BOS_NOTE, assemble, length, read_config
from autointerp.coders.coder import Coder
from autointerp.coders.tensors import read_safetensors, safetensors_shapes, take
from autointerp.errors import StoreError

DESCRIPTION = "Gemma Scope 2: config.json and params.safetensors"
MARKER = "params.safetensors"
IS_FILE = False
OPTIONS: Mapping[str, str] = {}
_SITES = {
    "resid_post": ("model.layers.{}.output", None),
    "attn_out": ("model.layers.{}.self_attn.o_proj.input", None),
    "mlp_out": ("model.layers.{}.post_feedforward_layernorm.output", None),
    "transcoder": (
        "model.layers.{}.pre_feedforward_layernorm.output",
        "model.layers.{}.post_feedforward_layernorm.output",
    ),
}
_SITE = re.compile(r"(resid_post|attn_out|mlp_out|transcoder)(?:_all)?")
_LAYER = re.compile(r"layer_(\d+)_width")
_RELEASE = re.compile(r"gemma-scope-2-(\w+)-(pt|it)")


def matches(folder: Path) -> bool:
    """Return whether `folder` holds a coder of this format."""
    shapes = safetensors_shapes(folder / MARKER)
    return {"w_enc", "w_dec", "threshold"} <= shapes.keys() and len(shapes["w_dec"]) == 2


def published_name(folder: Path) -> str:
    """Return the published name of the folder within its repository, such as ``resid_post/layer_17_width_16k_l0_big``."""
    return f"{folder.parent.name}/{folder.name}" if _SITE.fullmatch(folder.parent.name) else folder.name


def load(folder: Path, options: Mapping[str, str]) -> Coder:
    """Return the coder in `folder`.

    Raises: StoreError when a file is damaged or the parts do not agree.
    """
    path, config_path = folder / MARKER, folder / "config.json"
    config = read_config(config_path) if config_path.exists() else {}
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise StoreError(f"{config_path}: architecture = {config['architecture']!r}; Gemma Scope 2 coders are 'jump_relu'")
    found = read_safetensors(path)
    width, d_out = length(found, "b_enc", path), length(found, "b_dec", path)
    d_in = next((size for size in found["w_enc"].shape if size != width), d_out) if "w_enc" in found else d_out
    shapes = {"w_enc": (d_in, width), "w_dec": (width, d_out), "b_enc": (width,), "b_dec": (d_out,), "threshold": (width,)}
    if "affine_skip_connection" in found or config.get("affine_connection"):
        shapes["affine_skip_connection"] = (d_in, d_out)
    tensors = take(found, shapes, path)
    hookpoint, target, inferred = hooks_of(folder, config)
    affine = tensors.get("affine_skip_connection")
    l0 = config.get("l0")
    return assemble(
        format="gemma_scope_2",
        path=folder,
        stored={name: found[name] for name in shapes},
        encoder_LD=tensors["w_enc"].T,
        encoder_bias_L=tensors["b_enc"],
        decoder_LE=tensors["w_dec"],
        decoder_bias_E=tensors["b_dec"],
        activation=JumpRelu(tensors["threshold"]),
        hookpoint=hookpoint,
        target=target,
        is_transcoder=target is not None,
        skip_ED=None if affine is None else affine.T,
        model=model_of(folder, config),
        l0=float(l0) if isinstance(l0, (int, float)) and not isinstance(l0, bool) else None,
        inferred=inferred,
        notes=(BOS_NOTE,),
    )


def hooks_of(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, str | None, dict[str, str]]:
    """Return (hookpoint, target, what of it no file states)."""
    read, written = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    if isinstance(read, str):
        is_transcoder = config.get("type", "transcoder") != "sae" and isinstance(written, str) and written != read
        return read, written if is_transcoder else None, {}
    site = _SITE.fullmatch(folder.parent.name)
    layer = _LAYER.match(folder.name)
    if site is None or layer is None:
        return None, None, {}
    read, written = _SITES[site[1]]
    why = {"hookpoint": "the path"} | ({"target": "the path"} if written else {})
    return read.format(layer[1]), written and written.format(layer[1]), why


def model_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the subject's name on the hub; the configuration and the repository spell it in ways of their own."""
    name = config.get("model_name")
    if isinstance(name, str):
        name = name.rpartition("/")[2].replace("-v3", "-3")
    elif release := _RELEASE.search(folder.as_posix()):
        name = f"gemma-3-{release[1]}-{release[2]}"
    else:
        return None
    return "google/" + ("gemma-3-270m" if name == "gemma-3-270m-pt" else name)
