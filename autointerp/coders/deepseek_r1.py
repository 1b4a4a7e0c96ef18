"""qresearch's coder of DeepSeek-R1-Distill-Llama-8B: one torch file, ``encoder`` and ``decoder``, the layer in its name.

ReLU, no b_dec subtraction, no normalisation, on a block's output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from autointerp.coders.activations import Relu
from autointerp.coders.assemble import assemble, length, tensors_of
from autointerp.coders.coder import Coder
from autointerp.coders.tensors import pickle_shapes, read_pickle, take

DESCRIPTION = "qresearch DeepSeek-R1: MODEL-SAE-lN.pt"
MARKER = "*.pt"
IS_FILE = True
OPTIONS: Mapping[str, str] = {}
_TENSORS = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
_LAYER = re.compile(r"(?:.*[-_])?l(\d+)")


def matches(path: Path) -> bool:
    """Return whether the file holds a coder of this format; dictionary_learning has the same tensors in files named ``ae``."""
    return path.suffix == ".pt" and _LAYER.fullmatch(path.stem) is not None and pickle_shapes(path).keys() == _TENSORS


def published_name(path: Path) -> str:
    """Return the file's name without its ending."""
    return path.stem


def load(path: Path, options: Mapping[str, str]) -> Coder:
    """Return the coder in the file.

    Raises: StoreError when it is damaged or its shapes do not agree.
    """
    found = tensors_of(read_pickle(path), path)
    width, d = length(found, "encoder.bias", path), length(found, "decoder.bias", path)
    shapes = {"encoder.weight": (width, d), "encoder.bias": (width,), "decoder.weight": (d, width), "decoder.bias": (d,)}
    tensors = take(found, shapes, path)
    match = _LAYER.fullmatch(path.stem)
    assert match is not None
    return assemble(
        format="deepseek_r1",
        path=path,
        stored={name: found[name] for name in shapes},
        encoder_LD=tensors["encoder.weight"],
        encoder_bias_L=tensors["encoder.bias"],
        decoder_LE=tensors["decoder.weight"].T,
        decoder_bias_E=tensors["decoder.bias"],
        activation=Relu(),
        hookpoint=f"layers.{match[1]}@out",
        model="deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        inferred={"hookpoint": "the file's name", "model": "the release"},
    )
