"""Qwen Scope coders (Qwen 3 and 3.5): one torch file ``layerN.sae.pt`` a layer; k stands in the repository's name alone.

The k largest pre-activations, those that are positive; no b_dec subtraction, no normalisation, on a block's output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from autointerp.coders.activations import TopK
from autointerp.coders.assemble import assemble, chosen_k, length, tensors_of
from autointerp.coders.coder import Coder
from autointerp.coders.tensors import pickle_shapes, read_pickle, take
from autointerp.errors import InputError

DESCRIPTION = "Qwen Scope: layerN.sae.pt"
MARKER = "*.sae.pt"
IS_FILE = True
OPTIONS: Mapping[str, str] = {"k": "number of active latents, where the repository's name does not tell"}
_LAYER = re.compile(r"layer(\d+)\.sae\.pt")
_RELEASE = re.compile(r"SAE-Res-(?P<model>[\w.-]+?)-W\d+K-L0_(?P<k>\d+)")


def matches(path: Path) -> bool:
    """Return whether the file holds a coder of this format."""
    return path.name.endswith(".sae.pt") and {"W_enc", "W_dec", "b_enc", "b_dec"} <= pickle_shapes(path).keys()


def published_name(path: Path) -> str:
    """Return the file's name without its endings, such as ``layer5``."""
    return path.name.removesuffix(".sae.pt")


def load(path: Path, options: Mapping[str, str]) -> Coder:
    """Return the coder in the file.

    Raises: InputError when k is neither given nor in the path; StoreError when the file is damaged or its shapes do not agree.
    """
    found = tensors_of(read_pickle(path), path)
    width, d = length(found, "b_enc", path), length(found, "b_dec", path)
    shapes = {"W_enc": (width, d), "W_dec": (d, width), "b_enc": (width,), "b_dec": (d,)}
    tensors = take(found, shapes, path)
    release, layer = _RELEASE.search(path.as_posix()), _LAYER.fullmatch(path.name)
    k = chosen_k(options, path)
    inferred = {} if k is None else {"k": "the reading k, as given"}
    if k is None:
        if release is None:
            raise InputError(f"{path} does not say how many latents are active (the repository's name does: L0_50 is k=50); "
                             f"give it as {path}?k=NUMBER")  # fmt: skip
        k, inferred = int(release["k"]), {"k": "the repository's name"}
    if release is not None:
        inferred["model"] = "the repository's name"
    if layer is not None:
        inferred["hookpoint"] = "the file's name"
    return assemble(
        format="qwen_scope",
        path=path,
        stored={name: found[name] for name in shapes},
        encoder_LD=tensors["W_enc"],
        encoder_bias_L=tensors["b_enc"],
        decoder_LE=tensors["W_dec"].T,
        decoder_bias_E=tensors["b_dec"],
        activation=TopK(k),
        hookpoint=f"layers.{layer[1]}@out" if layer else None,
        k=k,
        model=f"Qwen/{release['model']}" if release else None,
        inferred=inferred,
    )
