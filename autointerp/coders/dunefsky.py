"""Dunefsky's GPT-2 transcoders and the first coders of jbloom: one torch file with ``cfg``, an object, and ``state_dict``.

Dunefsky et al. 2024, arXiv:2406.11944. ``relu((x - b_dec) W_enc + b_enc) W_dec`` + b_dec_out for a transcoder, + b_dec for an
SAE. The object is read as an empty class that holds its attributes; nothing of it runs. Trained on TransformerLens's
rewritten GPT-2: transcoders read ``ln2.hook_normalized``, before the norm's gain; the residual stream of SAEs is centred
before it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autointerp.coders.activations import Relu
from autointerp.coders.assemble import assemble, length, tensors_of
from autointerp.coders.coder import Coder
from autointerp.coders.inputs import CENTRED_HOOK, Centre
from autointerp.coders.tensors import pickle_shapes, read_pickle, take
from autointerp.errors import StoreError

DESCRIPTION = "Dunefsky transcoders: *.pt with cfg and state_dict"
MARKER = "*.pt"
IS_FILE = True
OPTIONS: Mapping[str, str] = {}


def matches(path: Path) -> bool:
    """Return whether the file holds a coder of this format."""
    return path.suffix == ".pt" and {"state_dict.W_enc", "state_dict.W_dec"} <= pickle_shapes(path).keys()


def published_name(path: Path) -> str:
    """Return the file's name without its ending."""
    return path.stem


def load(path: Path, options: Mapping[str, str]) -> Coder:
    """Return the coder in the file.

    Raises: StoreError when it is damaged or its shapes do not agree.
    """
    content = read_pickle(path)
    if not isinstance(content, Mapping) or "state_dict" not in content:
        raise StoreError(f"{path} holds no state_dict; expected one beside cfg")
    found = tensors_of(content["state_dict"], path)
    config: Mapping[str, Any] = getattr(content.get("cfg"), "__dict__", {})
    width, d = length(found, "b_enc", path), length(found, "b_dec", path)
    is_transcoder = "b_dec_out" in found
    d_out = length(found, "b_dec_out", path) if is_transcoder else d
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, width), "W_dec": (width, d_out), "b_enc": (width,), "b_dec": (d,)}
    if is_transcoder:
        shapes["b_dec_out"] = (d_out,)
    tensors = take(found, shapes, path)
    read, written, model = (config.get(key) for key in ("hook_point", "out_hook_point", "model_name"))
    inputs = (Centre(),) if isinstance(read, str) and CENTRED_HOOK.fullmatch(read) else ()
    is_predicted_centred = is_transcoder and isinstance(written, str) and CENTRED_HOOK.fullmatch(written) is not None
    encoder_LD, bias_L = tensors["W_enc"].T, tensors["b_enc"]
    return assemble(
        format="dunefsky",
        path=path,
        stored={name: found[name] for name in shapes},
        encoder_LD=encoder_LD,
        # A transcoder's b_dec is not what it adds to its output, so its subtraction goes into the encoder's bias.
        encoder_bias_L=bias_L - encoder_LD @ tensors["b_dec"] if is_transcoder else bias_L,
        decoder_LE=tensors["W_dec"],
        decoder_bias_E=tensors["b_dec_out"] if is_transcoder else tensors["b_dec"],
        activation=Relu(),
        hookpoint=read if isinstance(read, str) else None,
        target=written if is_transcoder and isinstance(written, str) else None,
        is_transcoder=is_transcoder,
        subtract=not is_transcoder,
        inputs=inputs,
        reading={"subtract_b_dec": True},
        model=model if isinstance(model, str) else None,
        inferred={"inputs": "TransformerLens centres what GPT-2 writes"} if inputs else {},
        notes=("What it decodes is the centred vector.",) if is_predicted_centred or (inputs and not is_transcoder) else (),
    )
