"""What most format modules do alike: read settings, find the sizes, and put tensors and rules together to a coder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from autointerp.coders.activations import Activation, MatchingPursuit
from autointerp.coders.coder import Coder, CoderSpec
from autointerp.coders.inputs import InputRule
from autointerp.coders.tensors import digest_tensors
from autointerp.errors import InputError, StoreError
from autointerp.files import read_json

BOS_NOTE = "Trained without BOS but on contexts that begin with it: prepend it and leave its position out."


def assemble(
    *,
    format: str,
    path: Path,
    stored: Mapping[str, Tensor],
    encoder_LD: Tensor,
    encoder_bias_L: Tensor,
    decoder_LE: Tensor,
    decoder_bias_E: Tensor,
    activation: Activation | MatchingPursuit,
    hookpoint: str | None,
    target: str | None = None,
    is_transcoder: bool = False,
    subtract: bool = False,
    inputs: tuple[InputRule, ...] = (),
    skip_ED: Tensor | None = None,
    k: int | None = None,
    reading: Mapping[str, Any] | None = None,
    model: str | None = None,
    l0: float | None = None,
    inferred: Mapping[str, str] | None = None,
    notes: tuple[str, ...] = (),
) -> Coder:
    """Return the coder; `stored` are the tensors as in the file, `reading` adds to the rules that every coder has.

    Raises: StoreError when k is larger than the number of latents.
    """
    width, d_in = encoder_LD.shape
    if k is not None and not 0 < k <= width:
        raise StoreError(f"{path}: k = {k} does not fit {width} latents; expected 1 to {width}")
    rules = {"activation": activation.name, "subtract_b_dec": subtract, "inputs": [rule.name for rule in inputs]}
    return Coder(
        spec=CoderSpec(
            format=format,
            source=str(path),
            digest=digest_tensors(stored),
            width=width,
            d_in=d_in,
            d_out=decoder_LE.shape[1],
            activation=activation.name,
            k=k,
            hookpoint=hookpoint,
            target=target,
            is_transcoder=is_transcoder,
            reading=rules | ({} if k is None else {"k": k}) | dict(reading or {}),
            model=model,
            l0=l0,
            inferred=dict(inferred or {}),
            notes=notes,
        ),
        encoder_LD=encoder_LD.contiguous(),
        encoder_bias_L=encoder_bias_L.contiguous(),
        decoder_LE=decoder_LE.contiguous(),
        decoder_bias_E=decoder_bias_E.contiguous(),
        activation=activation,
        skip_ED=None if skip_ED is None else skip_ED.contiguous(),
        subtract_decoder_bias=subtract,
        inputs=inputs,
    )


def tensors_of(value: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict that a torch file holds.

    Raises: StoreError when it is no table.
    """
    if not isinstance(value, Mapping):
        raise StoreError(f"{path} holds {type(value).__name__}; expected a table of tensors")
    return {str(name): item for name, item in value.items() if isinstance(item, Tensor)}


def length(stored: Mapping[str, Tensor], name: str, path: Path) -> int:
    """Return the number of elements of a bias, which tells a size without doubt.

    Raises: StoreError when it is missing.
    """
    if name not in stored:
        raise StoreError(f"{path} lacks the tensor {name!r}; it holds {', '.join(sorted(stored)) or 'nothing'}")
    return stored[name].numel()


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings in a json or yaml file.

    Raises: StoreError when it is missing, damaged or no table.
    """
    if path.suffix == ".json":
        config = read_json(path)
    else:
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StoreError(f"{path} does not exist") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise StoreError(f"{path} is not valid YAML ({str(error).splitlines()[0]}); copy it again") from error
    if not isinstance(config, dict):
        raise StoreError(f"{path} holds {type(config).__name__}; expected a table of settings")
    return config


def peek_config(path: Path) -> dict[str, Any]:
    """Return the settings in a json or yaml file, none where it cannot be read: for telling formats apart."""
    try:
        return read_config(path)
    except (StoreError, OSError):
        return {}


def number(config: Mapping[str, Any], key: str, path: Path, *, whole: bool = True) -> Any:
    """Return a positive number out of settings, an int where it must be `whole`.

    Raises: StoreError when it is missing or none.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not value > 0:
        raise StoreError(f"{path}: {key} = {value!r}; expected a {'whole ' if whole else ''}number above 0")
    return value


def chosen_number(options: Mapping[str, str], name: str, source: Path, *, least: float | None = None) -> float | None:
    """Return a number that the user gave as a reading, None where it was not given.

    Raises: InputError when it is no number or below `least`.
    """
    if name not in options:
        return None
    try:
        value = float(options[name])
    except ValueError:
        value = float("nan")
    if value != value or abs(value) == float("inf") or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least:g}"
        raise InputError(f"{source}: {name}={options[name]} is not possible; expected a number{bound}")
    return value


def chosen_k(options: Mapping[str, str], source: Path) -> int | None:
    """Return the k that the user gave, None where it was not given.

    Raises: InputError when it is no whole number of at least 1.
    """
    value = chosen_number(options, "k", source, least=1)
    if value is not None and value != int(value):
        raise InputError(f"{source}: k={options['k']} is not possible; expected a whole number")
    return None if value is None else int(value)
