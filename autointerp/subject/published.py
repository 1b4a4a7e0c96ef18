"""Where the activation that a published name stands for is found in a Hugging Face model.

Names are TransformerLens's (``blocks.5.hook_resid_mid``; alone, such as ``hook_resid_mid``, with the block's number beside it),
Gemma Scope 2's (``model.layers.5.mlp.output``) and plain module paths. One name means different modules in different
architectures, and some tensors no module gives out: those are read one step earlier, with the rule that makes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from autointerp.coders.inputs import InputRule, LayerNorm, Rms
from autointerp.errors import InputError, nearest
from autointerp.subject.hookpoints import resolve_hookpoint

_IN_BLOCK = re.compile(r"blocks\.(\d+)\.((?:\w+\.)*hook_.+)")


@dataclass(frozen=True)
class PublishedHook:
    """What to read, and what to do to it, to have the tensor that a published name stands for."""

    hookpoint: str
    """``MODULE.PATH@in`` or ``@out`` of the whole model."""
    inputs: tuple[InputRule, ...] = ()
    """What to apply to each vector, in order: nothing, or the model's own norm without its gain. Whether a coder was trained on
    centred vectors is no matter of the hook: its format says so."""


@dataclass(frozen=True)
class _Family:
    """Architectures whose blocks have the same parts."""

    blocks: str
    """The list of blocks, relative to the bare model."""
    embed: str | None
    """Hookpoint of ``hook_embed``, relative to the bare model, where that is known."""
    sites: Mapping[str, str]
    """Hookpoint of each name, relative to a block."""
    norms: Mapping[str, str]
    """The norm whose input, normalised without gain or bias, a name stands for."""
    rule: type[Rms] | type[LayerNorm] = Rms


def _family(
    blocks: str,
    embed: str,
    rule: type[Rms] | type[LayerNorm],
    *,
    attention: str,
    projection: str,
    down: str,
    ln1: str,
    ln2: str,
) -> _Family:
    """Return the family whose blocks have one norm before attention and one before the MLP."""
    sites = {
        "hook_resid_pre": "@in",
        "hook_resid_mid": f"{ln2}@in",
        "hook_resid_post": "@out",
        "hook_attn_out": f"{attention}@out",
        "hook_mlp_out": "mlp@out",
        "hook_mlp_in": f"{ln2}@in",
        "attn.hook_z": f"{attention}.{projection}@in",
        "mlp.hook_in": f"{ln2}@out",
        "mlp.hook_post": f"mlp.{down}@in",
        "mlp.hook_out": "mlp@out",
    }
    return _Family(blocks, embed, sites, {"ln1.hook_normalized": ln1, "ln2.hook_normalized": ln2}, rule)


_PARTS = {"attention": "self_attn", "projection": "o_proj", "down": "down_proj", "ln1": "input_layernorm"}
_LLAMA = _family("layers", "embed_tokens@out", Rms, **_PARTS, ln2="post_attention_layernorm")
_EXPERTS = replace(_LLAMA, sites={name: path for name, path in _LLAMA.sites.items() if name != "mlp.hook_post"})
# Whether Gemma's table of embeddings multiplies its rows by sqrt(d) itself depends on the version of transformers; what the
# first block gets is always multiplied.
_GEMMA = replace(_LLAMA, embed="layers.0@in")
# Gemma 2 and 3 have norms after attention and MLP as well, and add what those give to the residual stream.
_SANDWICH = _family("layers", "layers.0@in", Rms, **_PARTS, ln2="pre_feedforward_layernorm")
_POST = {"hook_attn_out": "post_attention_layernorm@out", "hook_mlp_out": "post_feedforward_layernorm@out"}
_GEMMA2 = replace(_SANDWICH, sites={**_SANDWICH.sites, **_POST})
# Coders on Gemma 3 were published with this name for what the MLP reads; elsewhere it is a copy of the residual stream.
_GEMMA3 = replace(_GEMMA2, sites={**_GEMMA2.sites, "hook_mlp_in": "pre_feedforward_layernorm@out"})
_PARTS = {"attention": "attn", "projection": "c_proj", "down": "c_proj", "ln1": "ln_1"}
_GPT2 = _family("h", "wte@out", LayerNorm, **_PARTS, ln2="ln_2")
_PARTS = {"attention": "attention", "projection": "dense", "down": "dense_4h_to_h", "ln1": "input_layernorm"}
_NEOX = _family("layers", "embed_in@out", LayerNorm, **_PARTS, ln2="post_attention_layernorm")
_ENDS = {name: _LLAMA.sites[name] for name in ("hook_resid_pre", "hook_resid_post")}
_MAMBA = _Family("layers", "embeddings@out", _ENDS, {})

_FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _EXPERTS,
    "gpt_oss": _EXPERTS,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "mamba": _MAMBA,
}
"""By the model type of the configuration of the text model."""


def published_hookpoint(name: str, model: nn.Module, *, layer: int | None = None, default_side: str = "out") -> PublishedHook:
    """Return where in `model` the activation is that a coder was published for.

    `name` is TransformerLens's, a path with ``.input`` or ``.output``, or a path with ``@in``, ``@out`` or neither (then
    `default_side`); `layer` is the block of a name that has none.

    Raises: InputError when the model has no such activation, with the nearest name.
    """
    if layer is not None:
        name = f"blocks.{layer}.{name}"
    modules = [path for path, _ in model.named_modules()]
    in_block = _IN_BLOCK.fullmatch(name)
    if in_block is None and name != "hook_embed":
        if name.startswith("hook_") or ".hook_" in name:
            raise InputError(f"hookpoint {name!r} has no number of a block; expected one such as 'blocks.5.{name}'")
        return PublishedHook(resolve_hookpoint(name, modules, default_side=default_side))
    config = _text_config(model)
    family = _FAMILIES.get(config.model_type) or _any(modules)
    block, site = (int(in_block[1]), in_block[2]) if in_block else (0, name)
    hookpoint = resolve_hookpoint(_find(name, block, site, family, config, modules), modules)
    if site in family.norms:
        return PublishedHook(hookpoint, (family.rule(_eps(model.get_submodule(hookpoint.removesuffix("@in")))),))
    return PublishedHook(hookpoint)


def _find(name: str, block: int, site: str, family: _Family, config: Any, modules: list[str]) -> str:
    """Return what to read for a name, relative to some part of the model."""
    sites = {**family.sites, **{key: f"{norm}@in" for key, norm in family.norms.items()}}
    is_parallel = config.model_type == "gpt_neox" and config.use_parallel_residual
    if is_parallel:
        del sites["hook_resid_mid"]  # attention and MLP read the same: nothing lies between them
    if site == "hook_embed" and family.embed is not None:
        return family.embed
    if site not in sites:
        known = [f"blocks.{block}.{key}" for key in sites] + ["hook_embed"] * (family.embed is not None)
        kind = f"{config.model_type} model" + (" with parallel attention and MLP" if is_parallel else "")
        raise InputError(
            f"no {name!r} is known of a {kind}, where a module's own path, as MODULE.PATH@in or @out, can be given; "
            f"{nearest(name, known)}"
        )
    if block >= config.num_hidden_layers:
        raise InputError(
            f"hookpoint {name!r} is of block {block}, and the subject has {config.num_hidden_layers}, counted from 0"
        )
    path = resolve_hookpoint(f"{family.blocks}.{block}", modules).removesuffix("@out")
    inside, _, side = sites[site].partition("@")
    return f"{path}.{inside}@{side}" if inside else f"{path}@{side}"


def _any(modules: list[str]) -> _Family:
    """Return what is known of any architecture: where its blocks begin and end."""
    lists = {path.split(".")[-2] for path in modules if path.endswith(".0")}
    return _Family(next((name for name in ("layers", "h", "blocks") if name in lists), "layers"), None, _ENDS, {})


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _eps(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
