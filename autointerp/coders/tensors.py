"""Tensors out of files, safely: safetensors, npz and torch files, checked, digested; every failure is a sentence."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from autointerp.errors import StoreError
from autointerp.files import read_json

_BLOCK = 1 << 24
_STAND_INS = ("sae_training.config.LanguageModelSAERunnerConfig",)
"""Classes whose instances lie in published files beside the tensors: read as an empty class that holds their attributes."""


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, as stored.

    Raises: StoreError when it is missing, truncated or not safetensors.
    """
    try:
        return dict(load_file(path))
    except FileNotFoundError:
        raise StoreError(f"{path} does not exist") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise StoreError(
            f"{path} cannot be read as safetensors ({error}); it is truncated or damaged, copy it again"
        ) from error


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes in a file by tensor name, from its header alone; empty when it is not safetensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError, ValueError):
        return {}


def read_pickle(path: Path) -> Any:
    """Return what a torch file holds: tensors and plain containers only, read lazily where the container allows.

    Raises: StoreError when it is missing, damaged, or would run code (``weights_only``, design invariant 9).
    """
    stand_ins: list[Any] = [(type(name.rpartition(".")[2], (), {}), name) for name in _STAND_INS]
    try:
        with torch.serialization.safe_globals(stand_ins):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise StoreError(f"{path} does not exist") from None
    except UnpicklingError as error:
        raise StoreError(
            f"{path} holds more than tensors and plain values, which is not loaded because a pickle can run code "
            f"({_first_line(error)}); convert it to safetensors where you trust it"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"{path} cannot be read as a torch file ({_first_line(error)}); it is damaged, copy it again"
        ) from error


def pickle_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes in a torch file by tensor name (``TABLE.NAME`` one table down); empty when it cannot be read."""
    try:
        status = path.stat()
        return _pickle_shapes(path, status.st_mtime_ns, status.st_size)
    except (StoreError, OSError):
        return {}


@lru_cache(maxsize=256)
def _pickle_shapes(path: Path, mtime_ns: int, size: int) -> dict[str, tuple[int, ...]]:
    value = read_pickle(path)
    shapes = {}
    for name, item in value.items() if isinstance(value, Mapping) else ():
        for inner, tensor in item.items() if isinstance(item, Mapping) else [("", item)]:
            if isinstance(tensor, Tensor):
                shapes[f"{name}.{inner}".removesuffix(".")] = tuple(tensor.shape)
    return shapes


def check_readable(path: Path) -> None:
    """Check that a json file or a file of tensors can be opened; says nothing of other files.

    Raises: StoreError when it is damaged, or would run code.
    """
    if path.suffix == ".json":
        read_json(path)
    elif path.suffix == ".safetensors" and not safetensors_shapes(path):
        read_safetensors(path)
    elif path.suffix in (".pt", ".pth") and not pickle_shapes(path):
        read_pickle(path)


def read_npz(path: Path, *, without: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the arrays of an npz file as tensors, but for those named; pickled members are refused.

    Raises: StoreError when it is missing, damaged or holds something that is not a plain array.
    """
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: torch.from_numpy(np.ascontiguousarray(file[name])) for name in file.files if name not in without}
    except FileNotFoundError:
        raise StoreError(f"{path} does not exist") from None
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"{path} cannot be read as plain numpy arrays ({error}); it is damaged or holds pickled objects"
        ) from error


def take(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, Tensor]:
    """Return the named tensors as float32 after checking their presence, type, shape and values.

    Raises: StoreError naming the first tensor that is wrong, what it is and what it should be.
    """
    taken = {}
    for name, shape in shapes.items():
        if name not in tensors:
            raise StoreError(f"{path} lacks the tensor {name!r}; it holds {', '.join(sorted(tensors)) or 'nothing'}")
        tensor = tensors[name]
        if not tensor.is_floating_point():
            raise StoreError(f"{path}: {name} has type {tensor.dtype}; expected a floating type (float32, bfloat16, float16)")
        if tuple(tensor.shape) != shape:
            turned = len(shape) == 2 and tuple(tensor.shape) == shape[::-1]
            hint = "; it is transposed, so the file is of another format" if turned else ""
            raise StoreError(f"{path}: {name} has shape {tuple(tensor.shape)}; expected {shape}{hint}")
        tensor = tensor.to(torch.float32)
        if not bool(torch.isfinite(tensor).all()):
            raise StoreError(f"{path}: {name} holds values that are not finite; the file is damaged or training diverged")
        taken[name] = tensor.contiguous()
    return taken


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of the tensors' names, types, shapes and bytes, whatever their order."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        _update_head(state, name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        if tensor.numel():
            state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return "sha256:" + state.hexdigest()


def digest_safetensors(paths: Sequence[Path]) -> str:
    """Return a digest of all tensors in the files, read in blocks; how they are spread over files does not matter.

    Raises: StoreError when a file is not safetensors.
    """
    entries: dict[str, tuple[str, tuple[int, ...], Path, int, int]] = {}
    for path in paths:
        with path.open("rb") as file:
            try:
                length = int.from_bytes(file.read(8), "little")
                if length > 1 << 30:
                    raise ValueError("header too long")
                header = json.loads(file.read(length))
                for name, item in header.items():
                    if name != "__metadata__":
                        start, stop = item["data_offsets"]
                        entries[name] = (item["dtype"], tuple(item["shape"]), path, 8 + length + start, stop - start)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise StoreError(f"{path} cannot be read as safetensors ({error}); it is truncated or damaged") from error
    state = hashlib.sha256()
    for name in sorted(entries):
        dtype, shape, path, start, size = entries[name]
        _update_head(state, name, dtype, shape)
        with path.open("rb") as file:
            file.seek(start)
            while size > 0:
                block = file.read(min(size, _BLOCK))
                if not block:
                    raise StoreError(f"{path} ends inside the tensor {name!r}; it is truncated, copy it again")
                state.update(block)
                size -= len(block)
    return "sha256:" + state.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _update_head(state: hashlib._Hash, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    state.update(json.dumps([name, dtype, list(shape)]).encode())
