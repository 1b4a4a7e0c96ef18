"""The attention coders of ckkissane and Conmy (GPT-2 small, all layers): ``NAME.pt`` and ``NAME_cfg.json``.

Kissane et al. 2024, arXiv:2406.17759. ReLU with b_dec subtracted, on the concatenated head outputs (``hook_z``).
TransformerLens moves value biases out of them when it rewrites a model, so that its vectors differ from the subject's by a
constant for each head.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from autointerp.coders.activations import Relu
from autointerp.coders.assemble import assemble, number, read_config, tensors_of
from autointerp.coders.coder import Coder
from autointerp.coders.tensors import pickle_shapes, read_pickle, take

DESCRIPTION = "attention coders of ckkissane: NAME.pt and NAME_cfg.json"
MARKER = "*.pt"
IS_FILE = True
OPTIONS: Mapping[str, str] = {}

NOTE = (
    "Trained on TransformerLens's rewritten GPT-2, where hook_z lacks a constant that the model's own heads put out: "
    "the value biases and what the norm's bias adds to the values."
)


def matches(path: Path) -> bool:
    """Return whether the file holds a coder of this format."""
    return path.suffix == ".pt" and _config_path(path).is_file() and {"W_enc", "W_dec"} <= pickle_shapes(path).keys()


def published_name(path: Path) -> str:
    """Return the file's name without its ending."""
    return path.stem


def load(path: Path, options: Mapping[str, str]) -> Coder:
    """Return the coder in the file.

    Raises: StoreError when a file is missing or damaged, or the shapes do not agree.
    """
    config_path = _config_path(path)
    config = read_config(config_path)
    found = tensors_of(read_pickle(path), path)
    width, d = number(config, "dict_size", config_path), number(config, "act_size", config_path)
    shapes = {"W_enc": (d, width), "W_dec": (width, d), "b_enc": (width,), "b_dec": (d,)}
    tensors = take(found, shapes, path)
    hookpoint, model = config.get("act_name"), config.get("model_name")
    return assemble(
        format="attn_saes",
        path=path,
        stored={name: found[name] for name in shapes},
        encoder_LD=tensors["W_enc"].T,
        encoder_bias_L=tensors["b_enc"],
        decoder_LE=tensors["W_dec"],
        decoder_bias_E=tensors["b_dec"],
        activation=Relu(),
        hookpoint=hookpoint if isinstance(hookpoint, str) else None,
        subtract=True,
        model=model if isinstance(model, str) else "openai-community/gpt2",
        inferred={} if isinstance(model, str) else {"model": "the release"},
        notes=(NOTE,),
    )


def _config_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}_cfg.json")
