"""dictionary_learning coders: ``ae.pt``, usually with ``config.json`` beside it.

Seven classes, told apart by ``dict_class``, else by ``trainer_class``, else by the tensors' names. All read a module's raw
output (input where ``io`` is "in"); what training divided its inputs by is folded into the biases before they are saved, except
in a backup of the middle of training, which says by how much. BatchTopK and Matryoshka coders are read by the threshold that
training fitted. As the library does, an AutoEncoder's decoder is brought to unit norm and its activations to that scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autointerp.coders.activations import Activation, Gated, JumpRelu, Relu, TopK
from autointerp.coders.assemble import assemble, chosen_number, length, peek_config, read_config, tensors_of
from autointerp.coders.coder import Coder
from autointerp.coders.tensors import read_pickle, take
from autointerp.errors import InputError, StoreError, nearest

DESCRIPTION = "dictionary_learning: ae.pt and config.json"
MARKER = "ae.pt"
IS_FILE = False
OPTIONS: Mapping[str, str] = {
    "class": "the dictionary's class, where the files do not tell TopK from BatchTopK",
    "threshold": "the activation threshold, in place of the file's (BatchTopK, Matryoshka) or of k (TopK)",
    "renormalise": "no: leave an AutoEncoder's decoder and activations on the scale that they are saved on",
}

_CLASSES = {
    "AutoEncoder": {"bias", "encoder.weight", "encoder.bias", "decoder.weight"},
    "AutoEncoderNew": {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"},
    "GatedAutoEncoder": {"decoder_bias", "r_mag", "gate_bias", "mag_bias", "encoder.weight", "decoder.weight"},
    "AutoEncoderTopK": {"b_dec", "k", "encoder.weight", "encoder.bias", "decoder.weight"},
    "BatchTopKSAE": {"b_dec", "k", "encoder.weight", "encoder.bias", "decoder.weight"},
    "MatryoshkaBatchTopKSAE": {"W_enc", "b_enc", "W_dec", "b_dec", "k", "group_sizes"},
    "JumpReluAutoEncoder": {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"},
}
"""Class -> the tensors that give it away."""
_TRAINERS = {
    "StandardTrainer": "AutoEncoder",
    "StandardTrainerAprilUpdate": "AutoEncoder",
    "PAnnealTrainer": "AutoEncoder",
    "GatedSAETrainer": "GatedAutoEncoder",
    "GatedAnnealTrainer": "GatedAutoEncoder",
    "TopKTrainer": "AutoEncoderTopK",
    "TrainerTopK": "AutoEncoderTopK",
    "BatchTopKTrainer": "BatchTopKSAE",
    "MatryoshkaBatchTopKTrainer": "MatryoshkaBatchTopKSAE",
    "JumpReluTrainer": "JumpReluAutoEncoder",
}
_BIASES = {"bias", "encoder.bias", "decoder.bias", "decoder_bias", "gate_bias", "mag_bias", "b_enc", "b_dec", "threshold"}
"""What is in units of the inputs, so that a factor on these scales it."""
_SITE = re.compile(r"(resid_post|mlp_out|attn_out|resid_out)_?layer_?(\d+)")
_SITES = {"resid_post": "", "resid_out": "", "mlp_out": ".mlp", "attn_out": ".attention"}


def matches(folder: Path) -> bool:
    """Return whether `folder` holds a coder of this format."""
    return (folder / MARKER).is_file()


def published_name(folder: Path) -> str:
    """Return the module that the configuration or the folders' names give, else the folder's name."""
    hookpoint, _ = _hookpoints(folder, peek_config(folder / "config.json"))
    return hookpoint or folder.name


def load(folder: Path, options: Mapping[str, str]) -> Coder:
    """Return the coder in `folder`.

    Raises: StoreError when the file is damaged, would run code, or fits no class; InputError when the activations of one token
    depend on the batch and no threshold is known.
    """
    path, config_path = folder / MARKER, folder / "config.json"
    config = read_config(config_path) if config_path.exists() else {}
    held = read_pickle(path)
    backup = held if isinstance(held, Mapping) and isinstance(held.get("ae"), Mapping) else {}
    stored = tensors_of(backup.get("ae", held), path)
    trainer = _table(config, "trainer") or _table(backup, "config")
    inferred: dict[str, str] = {}
    name = _class(folder, trainer, stored, options, inferred)
    tensors, norm_factor = _take(stored, name, path), _norm_factor(backup, path)
    if norm_factor != 1:
        tensors = {key: value * norm_factor if key in _BIASES else value for key, value in tensors.items()}
    encoder, decoder = _matrices(tensors)
    encoder_bias = tensors.get("encoder.bias", tensors.get("b_enc", torch.zeros(len(encoder))))
    decoder_bias = next(tensors[key] for key in ("bias", "decoder.bias", "decoder_bias", "b_dec") if key in tensors)
    reading: dict[str, Any] = {"class": name}
    if name == "AutoEncoder" and _renormalised(options, folder, decoder):
        norms = decoder.norm(dim=1)
        encoder, encoder_bias, decoder = encoder * norms[:, None], encoder_bias * norms, decoder / norms[:, None]
        reading["renormalised"] = True
    activation, k = _activation(folder, name, stored, tensors, trainer, norm_factor, options, reading)
    hookpoint, target = _hookpoints(folder, config | ({"trainer": trainer} if trainer else {}))
    model = trainer.get("lm_name")
    return assemble(
        format="dictionary_learning",
        path=folder,
        stored=stored,
        encoder_LD=encoder,
        encoder_bias_L=encoder_bias,
        decoder_LE=decoder,
        decoder_bias_E=decoder_bias,
        activation=activation,
        hookpoint=hookpoint,
        target=target,
        is_transcoder=target is not None,
        subtract=name not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
        k=k,
        reading=reading | ({"norm_factor": norm_factor} if norm_factor != 1 else {}),
        model=model if isinstance(model, str) else None,
        inferred=inferred,
        notes=_notes(backup),
    )


def _table(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = settings.get(name)
    return dict(value) if isinstance(value, Mapping) else {}


def _class(
    folder: Path, trainer: Mapping[str, Any], stored: Mapping[str, Tensor], options: Mapping[str, str], inferred: dict[str, str]
) -> str:
    """Return the name of the dictionary's class."""
    if "class" in options:
        if options["class"] not in _CLASSES:
            raise InputError(f"{folder}: class={options['class']} is not known; {nearest(options['class'], _CLASSES)}")
        return options["class"]
    name = trainer.get("dict_class")
    if name is not None:
        if name not in _CLASSES:
            raise StoreError(f"{folder}: a coder of the class {name!r} cannot be read; {nearest(str(name), _CLASSES)}")
        return str(name)
    if trainer.get("trainer_class") in _TRAINERS:
        inferred["class"] = "trainer_class"
        return _TRAINERS[trainer["trainer_class"]]
    found = [name for name, names in _CLASSES.items() if set(stored) - {"threshold"} == names - {"threshold"}]
    if found == ["JumpReluAutoEncoder"] and "threshold" not in stored:
        found = []
    if len(found) > 1:
        raise InputError(
            f"{folder}: config.json does not say the class, and the tensors fit {' and '.join(found)}, which read them "
            f"differently; add ?class={found[0]} or ?class={found[1]} after the source"
        )
    if not found:
        raise StoreError(
            f"{folder / MARKER} holds {', '.join(sorted(stored)) or 'no tensors'}, which is none of {', '.join(_CLASSES)}"
        )
    inferred["class"] = "the names of the tensors"
    return found[0]


def _take(stored: Mapping[str, Tensor], name: str, path: Path) -> dict[str, Tensor]:
    """Return the floating tensors of a class as float32."""
    shapes: dict[str, tuple[int, ...]] = {}
    if "W_enc" in _CLASSES[name]:
        width, d = length(stored, "b_enc", path), length(stored, "b_dec", path)
        shapes = {"W_enc": (d, width), "b_enc": (width,), "W_dec": (width, d), "b_dec": (d,)}
        shapes |= {"threshold": (width,)} if name == "JumpReluAutoEncoder" else {}
    else:
        bias = next(key for key in ("bias", "decoder.bias", "decoder_bias", "b_dec") if key in _CLASSES[name])
        wide = ("gate_bias", "mag_bias", "r_mag") if name == "GatedAutoEncoder" else ("encoder.bias",)
        width, d = length(stored, wide[0], path), length(stored, bias, path)
        shapes = {"encoder.weight": (width, d), "decoder.weight": (d, width), bias: (d,)} | dict.fromkeys(wide, (width,))
    return take(stored, shapes, path)


def _matrices(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the encoder [L, D] and the decoder [L, D]."""
    if "W_enc" in tensors:
        return tensors["W_enc"].T, tensors["W_dec"]
    return tensors["encoder.weight"], tensors["decoder.weight"].T


def _norm_factor(backup: Mapping[str, Any], path: Path) -> float:
    """Return what the inputs were divided by when a backup was written: its biases are still of inputs divided by that."""
    factor = backup.get("norm_factor")
    factor = factor.item() if isinstance(factor, Tensor) and factor.numel() == 1 else factor
    if factor is None:
        return 1.0
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < float("inf"):
        raise StoreError(f"{path}: norm_factor = {factor!r}; expected a number above 0")
    return float(factor)


def _renormalised(options: Mapping[str, str], folder: Path, decoder: Tensor) -> bool:
    value = options.get("renormalise", "yes")
    if value not in ("yes", "no"):
        raise InputError(f"{folder}: renormalise={value} is not possible; expected yes or no")
    norms = decoder.norm(dim=1)
    return value == "yes" and bool((norms > 0).all()) and not torch.allclose(norms, torch.ones_like(norms))


def _activation(
    folder: Path,
    name: str,
    stored: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    trainer: Mapping[str, Any],
    norm_factor: float,
    options: Mapping[str, str],
    reading: dict[str, Any],
) -> tuple[Activation, int | None]:
    """Return the activation and its k; add the threshold that is used to `reading`."""
    chosen = chosen_number(options, "threshold", folder, least=0)
    if name == "JumpReluAutoEncoder":
        return JumpRelu(tensors["threshold"]), None
    if name == "GatedAutoEncoder":
        return Gated(tensors["gate_bias"], tensors["r_mag"].exp(), tensors["mag_bias"]), None
    if name in ("AutoEncoder", "AutoEncoderNew"):
        return Relu(), None
    if name == "AutoEncoderTopK" and chosen is None:
        k = _k(folder, stored, trainer)
        return TopK(k), k
    threshold = chosen if chosen is not None else _scalar(folder, stored, "threshold", is_whole=False) * norm_factor
    if threshold < 0:
        raise InputError(
            f"{folder}: the threshold of this {name} was never fitted (it is {threshold:g}), and without one its activations "
            "depend on the batch; add ?threshold=NUMBER after the source"
        )
    reading |= {"threshold": threshold, "threshold_from": "file" if chosen is None else "option"}
    width = len(tensors["b_enc"] if "b_enc" in tensors else tensors["encoder.bias"])
    return JumpRelu(torch.full((width,), threshold)), None


def _scalar(folder: Path, stored: Mapping[str, Tensor], name: str, *, is_whole: bool) -> float:
    if name not in stored:
        raise StoreError(f"{folder / MARKER} lacks the tensor {name!r}; it holds {', '.join(sorted(stored))}")
    tensor = stored[name]
    if tensor.numel() != 1 or tensor.is_floating_point() == is_whole or not bool(torch.isfinite(tensor).all()):
        raise StoreError(
            f"{folder / MARKER}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected one "
            f"{'whole' if is_whole else 'finite floating'} number"
        )
    return tensor.item()


def _k(folder: Path, stored: Mapping[str, Tensor], trainer: Mapping[str, Any]) -> int:
    k = int(_scalar(folder, stored, "k", is_whole=True))
    if trainer.get("k") not in (None, k):
        raise StoreError(
            f"{folder}: config.json says k = {trainer['k']!r} and {MARKER} {k}; one of the files is of another coder"
        )
    return k


def _hookpoints(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return (hookpoint, target or None), from the configuration, else from the folders' names."""
    trainer, io = _table(config, "trainer"), _table(config, "buffer").get("io", "out")
    module = None
    name = trainer.get("submodule_name")
    names = [name] if isinstance(name, str) else list(reversed(folder.parts))
    for part in names:
        if match := _SITE.fullmatch(part):
            blocks = "h" if "gpt2" in str(trainer.get("lm_name")) else "layers"
            module = f"{blocks}.{match[2]}{_SITES[match[1]]}"
        elif part == "embed":
            module = "embed_in"
        elif part is name and "." in part:
            module = part
        if module is not None:
            break
    if module is None:
        return None, None
    if io == "out":
        return f"{module}@out", None
    return f"{module}@in", f"{module}@out" if io == "in_and_out" else None


def _notes(backup: Mapping[str, Any]) -> tuple[str, ...]:
    if not backup:
        return ()
    step = backup.get("step")
    note = f"A backup from the middle of training (step {step if isinstance(step, int) else 'unknown'})."
    if backup.get("norm_factor") is None:
        note += " Where training normalised its inputs, the biases are still of normalised ones."
    return (note,)
