"""Goodfire's coders (Llama 3.1 8B, Llama 3.3 70B): one torch file, ``encoder_linear`` and ``decoder_linear``.

ReLU, no b_dec subtraction, no normalisation, on a block's output; the file's name tells model and layer (``...-SAE-l19.pth``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from autointerp.coders.activations import Relu
from autointerp.coders.assemble import assemble, length, tensors_of
from autointerp.coders.coder import Coder
from autointerp.coders.tensors import pickle_shapes, read_pickle, take

DESCRIPTION = "Goodfire: MODEL-SAE-lN.pt or .pth"
MARKER = "*.pt*"
IS_FILE = True
OPTIONS: Mapping[str, str] = {}
_NAME = re.compile(r"(?P<model>.+)-SAE-l(?P<layer>\d+)")


def matches(path: Path) -> bool:
    """Return whether the file holds a coder of this format."""
    return path.suffix in (".pt", ".pth") and {"encoder_linear.weight", "decoder_linear.weight"} <= pickle_shapes(path).keys()


def published_name(path: Path) -> str:
    """Return the file's name without its ending."""
    return path.stem


def load(path: Path, options: Mapping[str, str]) -> Coder:
    """Return the coder in the file.

    Raises: StoreError when it is damaged or its shapes do not agree.
    """
    found = tensors_of(read_pickle(path), path)
    width, d = length(found, "encoder_linear.bias", path), length(found, "decoder_linear.bias", path)
    shapes = {
        "encoder_linear.weight": (width, d), "encoder_linear.bias": (width,),
        "decoder_linear.weight": (d, width), "decoder_linear.bias": (d,),
    }  # fmt: skip
    tensors = take(found, shapes, path)
    match = _NAME.fullmatch(path.stem)
    return assemble(
        format="goodfire",
        path=path,
        stored={name: found[name] for name in shapes},
        encoder_LD=tensors["encoder_linear.weight"],
        encoder_bias_L=tensors["encoder_linear.bias"],
        decoder_LE=tensors["decoder_linear.weight"].T,
        decoder_bias_E=tensors["decoder_linear.bias"],
        activation=Relu(),
        hookpoint=f"layers.{match['layer']}@out" if match else None,
        model=f"meta-llama/{match['model']}" if match else None,
        inferred=dict.fromkeys(("hookpoint", "model"), "the file's name") if match else {},
    )
