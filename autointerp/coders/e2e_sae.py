"""Apollo Research's end-to-end coders (e2e_sae): one torch file with the coders of one or several positions.

Braun et al. 2024, arXiv:2405.12241. ReLU, no b_dec subtraction; the stored decoder is divided by its rows' norms on every use.
Trained on TransformerLens's rewritten GPT-2, whose residual stream has mean 0: vectors are centred before they are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch.nn.functional import normalize

from autointerp.coders.activations import Relu
from autointerp.coders.assemble import assemble, length, peek_config, tensors_of
from autointerp.coders.coder import Coder
from autointerp.coders.inputs import CENTRED_HOOK, Centre
from autointerp.coders.tensors import pickle_shapes, read_pickle, take
from autointerp.errors import InputError, nearest

DESCRIPTION = "e2e_sae: *_NUMBER.pt"
MARKER = "*.pt"
IS_FILE = True
OPTIONS: Mapping[str, str] = {"position": "which coder of the file, such as blocks.6.hook_resid_pre"}
_KEY = re.compile(r"(?P<position>.+)\.encoder\.0\.weight")


def matches(path: Path) -> bool:
    """Return whether the file holds coders of this format."""
    return path.suffix == ".pt" and any(_KEY.fullmatch(name) for name in pickle_shapes(path))


def published_name(path: Path) -> str:
    """Return the name of the folder, that is of the run."""
    return path.parent.name


def load(path: Path, options: Mapping[str, str]) -> Coder:
    """Return the coder of one position in the file.

    Raises: InputError when it holds several and none is chosen; StoreError when it is damaged or its shapes do not agree.
    """
    content = tensors_of(read_pickle(path), path)
    positions = {match["position"].replace("-", "."): match["position"] for name in content if (match := _KEY.fullmatch(name))}
    position = options.get("position", next(iter(positions)) if len(positions) == 1 else None)
    if position is None:
        raise InputError(f"{path} holds {len(positions)} coders; choose one as {path}?position={sorted(positions)[0]} "
                         f"(there are {', '.join(sorted(positions))})")  # fmt: skip
    if position not in positions:
        raise InputError(f"{path} holds no coder of position {position}; {nearest(position, positions)}")
    prefix = positions[position] + "."
    found = {name.removeprefix(prefix): tensor for name, tensor in content.items() if name.startswith(prefix)}
    width, d = length(found, "encoder.0.bias", path), length(found, "decoder.bias", path)
    shapes = {"encoder.0.weight": (width, d), "encoder.0.bias": (width,), "decoder.weight": (d, width), "decoder.bias": (d,)}
    tensors = take(found, shapes, path)
    inputs = (Centre(),) if CENTRED_HOOK.fullmatch(position) else ()
    model = peek_config(path.parent / "final_config.yaml").get("tlens_model_name")
    return assemble(
        format="e2e_sae",
        path=path,
        stored={name: found[name] for name in shapes},
        encoder_LD=tensors["encoder.0.weight"],
        encoder_bias_L=tensors["encoder.0.bias"],
        decoder_LE=normalize(tensors["decoder.weight"].T, dim=1),
        decoder_bias_E=tensors["decoder.bias"],
        activation=Relu(),
        hookpoint=position,
        inputs=inputs,
        reading={"position": position},
        model=model if isinstance(model, str) else None,
        inferred={"inputs": "TransformerLens centres what GPT-2 writes"} if inputs else {},
        notes=("What it decodes is the centred vector.",) if inputs else (),
    )
