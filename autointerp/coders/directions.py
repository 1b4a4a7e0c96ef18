"""``directions:FILE``: given directions (probes, steering vectors) read as latents.

FILE is ``.safetensors`` or ``.npz`` with floats ``directions`` [N, D] (or any name, where it is the only matrix), and as far as
wanted ``bias`` [N], ``threshold`` [N] (at least 0) and names: in safetensors the metadata key ``names``, a JSON list; in npz a
text array ``names``. The safetensors metadata key ``hookpoint`` says where the directions live, else ``@@HOOKPOINT`` does.

Two signs of one direction are two latents: 2i is direction i, 2i + 1 its opposite. With p = x . direction + bias, 2i fires at
p > threshold with value p, and 2i + 1 at -p > threshold with value -p. A threshold of 0 makes one of the two fire on every
token; ``?threshold=T`` sets one for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import orjson
import torch
from safetensors import safe_open
from torch import Tensor

from autointerp.coders.activations import JumpRelu
from autointerp.coders.coder import Coder, CoderSpec
from autointerp.coders.tensors import digest_tensors, read_npz, read_safetensors, take
from autointerp.errors import InputError, StoreError, nearest

KIND = "directions"
OPTIONS: Mapping[str, str] = {"threshold": "fires above this, for all directions in place of the file's thresholds"}


def load(path: Path, options: Mapping[str, str], *, source: str) -> Coder:
    """Return the coder whose latents are the directions in `path`, each sign one.

    Raises: StoreError when the file is missing or damaged, or its shapes do not agree; InputError for an unknown option.
    """
    stored, names, hookpoint = _read(path)
    matrices = [name for name, tensor in stored.items() if tensor.ndim == 2]
    key = "directions" if "directions" in stored else matrices[0] if len(matrices) == 1 else None
    if key is None or stored[key].ndim != 2 or not stored[key].numel():
        raise StoreError(
            f"{path} has no matrix of directions; expected 'directions' of shape [number, width], found "
            + (", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(stored.items())) or "nothing")
        )
    num, d = stored[key].shape
    shapes: dict[str, tuple[int, ...]] = {key: (num, d)}
    shapes |= {name: (num,) for name in ("bias", "threshold") if name in stored}
    tensors = take(stored, shapes, path)
    if names and len(names) != num:
        raise StoreError(f"{path} has {len(names)} names for {num} directions; expected one for each")
    given = _threshold(options, source)
    threshold = tensors.get("threshold", torch.zeros(num)) if given is None else torch.full((num,), given)
    if bool((threshold < 0).any()):
        raise StoreError(f"{path}: threshold holds negative values; expected 0 or more, for either sign of a direction")
    both = _both_signs(tensors[key])
    return Coder(
        spec=CoderSpec(
            format=KIND,
            source=source,
            digest=digest_tensors({name: stored[name] for name in shapes}),
            width=2 * num,
            d_in=d,
            d_out=d,
            activation="jumprelu",
            hookpoint=hookpoint,
            reconstructs=False,
            reading={"activation": "jumprelu", "signs": "both", "threshold": given},
            labels=tuple(f"{sign}{name}" for name in names for sign in "+-"),
        ),
        encoder_LD=both,
        encoder_bias_L=_both_signs(tensors.get("bias", torch.zeros(num))),
        decoder_LE=both,
        decoder_bias_E=torch.zeros(d),
        activation=JumpRelu(threshold.repeat_interleave(2)),
    )


def _both_signs(values: Tensor) -> Tensor:
    """Return [2N, ...]: each entry, then its negative."""
    return torch.stack([values, -values], dim=1).flatten(0, 1).contiguous()


def _threshold(options: Mapping[str, str], source: str) -> float | None:
    for name in options:
        if name not in OPTIONS:
            raise InputError(f"coder {source}: directions have no option {name!r}; {nearest(name, OPTIONS)}")
    if "threshold" not in options:
        return None
    try:
        value = float(options["threshold"])
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise InputError(f"coder {source}: threshold = {options['threshold']!r}; expected a number of at least 0")
    return value


def _read(path: Path) -> tuple[dict[str, Tensor], list[str], str | None]:
    """Return (tensors, names, hookpoint) of a file."""
    if path.suffix == ".safetensors":
        tensors = read_safetensors(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        try:
            names = orjson.loads(metadata.get("names", "[]"))
        except orjson.JSONDecodeError:
            names = None
        if not isinstance(names, list):
            raise StoreError(f"{path}: the metadata key 'names' is no JSON list; expected one name for each direction")
        return tensors, [str(name) for name in names], metadata.get("hookpoint")
    if path.suffix == ".npz":
        tensors = read_npz(path, without=("names",))
        with np.load(path, allow_pickle=False) as file:
            try:
                names = file["names"].tolist() if "names" in file.files else []
            except ValueError as error:
                raise StoreError(f"{path}: names hold pickled objects; save them as a text array") from error
        return tensors, [str(name) for name in names], None
    raise InputError(f"directions {path} end in {path.suffix or 'nothing'}; expected a .safetensors or .npz file")
