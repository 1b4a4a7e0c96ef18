"""Published coders that are not read, and why: so that one who names such a release gets an answer, and never a wrong reading.

What belongs to a format that is read in other cases (BatchTopK without a threshold, crosscoders beside transcoders) is refused
by that format's module.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from autointerp.coders.assemble import peek_config
from autointerp.coders.tensors import safetensors_shapes

_DEPTH = 3


def _two_model_crosscoder(folder: Path) -> bool:
    config = peek_config(folder / "cfg.json")
    return (folder / "cc_weights.pt").is_file() or {"enc_dtype", "dict_size", "hook_point", "d_in"} <= config.keys()


def _joint_crosscoder(folder: Path) -> bool:
    shapes = safetensors_shapes(folder / "model.safetensors")
    names = {name.removeprefix("_orig_mod."): shape for name, shape in shapes.items()}
    config = peek_config(folder / "config.json")
    return len(names.get("encoder.weight", ())) == 3 or {"activation_dim", "dict_size", "num_layers"} <= config.keys()


def _temporal(folder: Path) -> bool:
    return (folder / "latest_ckpt.safetensors").is_file() and (folder / "conf.yaml").is_file()


def _joint_topk(folder: Path) -> bool:
    # The files have the names of circuit-tracer's, with norms to score by and without biases.
    return (folder / "W_dec_norm.safetensors").is_file() or any(
        f"W_dec_norm_{path.stem.removeprefix('W_dec_')}" in safetensors_shapes(path)
        for path in folder.glob("W_dec_*.safetensors")
    )


def _crosslayer_coding(folder: Path) -> bool:
    config = peek_config(folder / "cfg.json")
    return any("->" in name for path in folder.glob("*.safetensors") for name in safetensors_shapes(path)) or (
        {"num_layers", "num_features", "normalization_method"} <= config.keys()
    )


def _pointers(folder: Path) -> bool:
    listed = peek_config(folder / "config.yaml").get("transcoders")
    return isinstance(listed, list) and any(str(item).startswith("hf://") for item in listed)


REFUSED: dict[str, tuple[Callable[[Path], bool], str]] = {
    "crosscoder of two models (ckkissane)": (
        _two_model_crosscoder,
        "each latent reads two models at once, each scaled by a constant that no file holds",
    ),
    "crosscoder (science-of-finetuning)": (
        _joint_crosscoder,
        "each latent reads two models at once; this package reads coders of one hookpoint of one model",
    ),
    "temporal coder (temporalSAEs)": (
        _temporal,
        "its latents come out of attention over the tokens before, so that one vector does not tell them",
    ),
    "joint top-k cross-layer transcoder (ByteDance Cross-Layer-TopK-CLT)": (
        _joint_topk,
        "the largest activations are chosen over all layers at once, so that one layer does not tell which latents are active",
    ),
    "cross-layer transcoder of crosslayer-coding": (
        _crosslayer_coding,
        "its normalisation statistics are not in the files; convert it to circuit-tracer's format",
    ),
    "list of other repositories' files (circuit-tracer config.yaml)": (
        _pointers,
        "it holds no weights; load the files that its config.yaml names, each as OWNER/REPO:FOLDER",
    ),
}
"""Name -> (whether a folder holds it, why it is not read)."""


def refusal(path: Path) -> str | None:
    """Return what a folder holds, or a file is part of, and why it is not read; None when it is nothing that is known here."""
    folder = path if path.is_dir() else path.parent
    for depth in range(_DEPTH + 1):
        for place in [folder] if depth == 0 else sorted(folder.glob("/".join("*" * depth))):
            if place.is_dir():
                for name, (holds, why) in REFUSED.items():
                    if holds(place):
                        return f"{place} is a {name}, which is not read: {why}"
    return None
