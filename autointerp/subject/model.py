"""The subject: the language model being interpreted, its tokenizer, its weights' digest and its hookpoints.

Hookpoints are ``MODULE.PATH@in`` or ``@out`` of the whole causal model; what coders publish is resolved in `subject.published`
and `subject.hookpoints`. The forward pass itself is in `subject.hooks`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from autointerp.coders.tensors import digest_safetensors, digest_tensors
from autointerp.digest import digest, digest_file
from autointerp.errors import ConfigError, InputError, ResourceError, nearest
from autointerp.subject.hookpoints import resolve_patterns
from autointerp.subject.hooks import read_hookpoints
from autointerp.subject.published import PublishedHook, published_hookpoint

Quantization = Literal["8bit", "4bit"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A loaded subject."""

    model: nn.Module
    tokenizer: Any
    name: str
    revision: str | None
    weights_digest: str
    quantization: Quantization | None
    dtype: str

    @property
    def bos_id(self) -> int | None:
        """The token prepended to every context, or None when the tokenizer has none."""
        return None if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding table: token ids lie below this."""
        return len(self._embeddings)

    @property
    def _embeddings(self) -> torch.Tensor:
        model: Any = self.model
        weight: torch.Tensor = model.get_input_embeddings().weight
        return weight

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        device = self._embeddings.device
        if device.type != "meta":
            return device
        model: Any = self.model
        hook = getattr(model.get_input_embeddings(), "_hf_hook", None)  # accelerate's: weights on disk run elsewhere
        return torch.device(getattr(hook, "execution_device", "cuda"))

    @property
    def max_context(self) -> int | None:
        """Most tokens the model has positions for, BOS included, or None when it does not say."""
        config: Any = self.model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        value = getattr(text, "max_position_embeddings", None)
        return int(value) if isinstance(value, int) and value > 0 else None

    @property
    def chat_template_digest(self) -> str | None:
        """Digest of the tokenizer's chat template, or None without one."""
        template = getattr(self.tokenizer, "chat_template", None)
        return digest(template) if template else None

    def hookpoints(self) -> list[str]:
        """Return every hookpoint, in the order of the model's modules."""
        return [f"{name}@{side}" for name, _ in self.model.named_modules() if name for side in ("in", "out")]

    def resolve(self, hookpoint: str, *, default_side: str = "out") -> str:
        """Return the full name of one hookpoint, given by a path or by a published name.

        Raises: InputError when there is none, or when its values are not yet what the name stands for: see :meth:`published`.
        """
        found = self.published(hookpoint, default_side=default_side)
        if found.inputs:
            rules = " and ".join(rule.name for rule in found.inputs)
            raise InputError(
                f"hookpoint {hookpoint!r} is {found.hookpoint} after the rule {rules}, and no module of the subject gives that "
                f"out; name {found.hookpoint} for a coder that applies the rule itself"
            )
        return found.hookpoint

    def published(self, name: str, *, layer: int | None = None, default_side: str = "out") -> PublishedHook:
        """Return where the activation of a published name is, and how it is made from it; see :func:`published_hookpoint`."""
        return published_hookpoint(name, self.model, layer=layer, default_side=default_side)

    def resolve_globs(self, patterns: Sequence[str], *, default_side: str = "out") -> list[str]:
        """Return the full names of all hookpoints that match; see :func:`resolve_patterns`."""
        return resolve_patterns(patterns, [name for name, _ in self.model.named_modules()], default_side=default_side)

    def widths(self, hookpoints: Sequence[str] | None = None) -> dict[str, int]:
        """Return the width of the vectors at each hookpoint (by default all that carry some), by running two tokens."""
        tokens = torch.zeros((1, 2), dtype=torch.int64, device=self.device)
        whole = hookpoints is None
        names = self.hookpoints() if hookpoints is None else list(hookpoints)
        return {name: int(value.shape[-1]) for name, value in read_hookpoints(self.model, tokens, names, whole=whole).items()}

    def check_width(self, hookpoint: str, width: int, *, what: str) -> None:
        """Check that the vectors at `hookpoint` are `width` wide.

        Raises: InputError with both widths and the nearest hookpoints that fit.
        """
        found = self.widths([hookpoint])[hookpoint]
        if found == width:
            return
        model: Any = self.model
        head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
        fitting = [name for name, size in self.widths().items() if size == width and name.rpartition("@")[0] != head]
        close = difflib.get_close_matches(hookpoint, fitting, n=3, cutoff=0.0)
        hint = (
            f"hookpoints of width {width} near it: {', '.join(close)}"
            if close
            else f"no hookpoint of {self.name} is {width} wide"
        )
        raise InputError(
            f"{what} reads vectors of width {width}, and hookpoint {hookpoint} of {self.name} has width {found}; {hint}"
        )


def load_subject(
    name_or_path: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
) -> Subject:
    """Load a causal language model and its tokenizer from a folder or the hub, ready to be read.

    ``dtype="auto"`` is float32 on a CPU and bfloat16 on an accelerator. `device_map` is a strategy of accelerate's such as
    ``auto``, one device, or JSON that gives each part of the model a device, ``cpu`` or ``disk``: ``{"model.embed_tokens": 0,
    "model.layers.0": "cpu", "model.layers.1": "disk", ...}``.

    Raises: InputError when there is no such model; ResourceError when a package that an option needs is missing.
    """
    _check_source(name_or_path)
    where = _device(device)
    if dtype != "auto" and dtype not in _DTYPES:
        raise ConfigError(f"dtype = {dtype!r} is not known; {nearest(dtype, [*_DTYPES, 'auto'])}")
    torch_dtype = _DTYPES[dtype] if dtype != "auto" else (torch.float32 if where.type == "cpu" else torch.bfloat16)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    placement: dict[str, Any] = {}
    if quantization is not None:
        placement["quantization_config"] = _quantization(quantization, torch_dtype)
    if device_map is not None or quantization is not None:
        _need("accelerate", f"--{'device-map' if device_map else 'quantization'}")
        placement["device_map"] = {"": str(where)} if device_map is None else _device_map(device_map)
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **options)
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=torch_dtype, **options, **placement)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise _load_error(name_or_path, error, device_map) from error
    model.eval()
    model.requires_grad_(False)
    if not placement:
        model.to(where)
    return Subject(
        model=model,
        tokenizer=tokenizer,
        name=name_or_path,
        revision=revision or getattr(model.config, "_commit_hash", None),
        weights_digest=_weights_digest(name_or_path, revision, model),
        quantization=quantization,
        dtype=str(torch_dtype).removeprefix("torch."),
    )


def _check_source(name: str) -> None:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"subject {name} is a folder without config.json; expected a model saved by transformers")
        return
    if path.exists():
        raise InputError(f"subject {name} is a file; expected a folder saved by transformers, or a hub id such as OWNER/MODEL")
    if name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise InputError(f"no subject at {name}: no such folder, and not a hub id such as OWNER/MODEL")


def _load_error(name: str, error: Exception, device_map: str | None) -> InputError:
    reason = " ".join(str(error).strip().split("\n")[0].split())[:300] or type(error).__name__
    if Path(name).is_dir() and device_map is not None:
        return InputError(
            f"subject {name} cannot be loaded with the device map {device_map} ({reason}); each part of it needs one place"
        )
    if Path(name).is_dir():
        return InputError(f"subject {name} cannot be loaded ({reason}); expected a causal language model saved by transformers")
    return InputError(
        f"no subject {name}: no such folder here, and the hub did not give it ({reason}); check the name and the connection"
    )


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device = {device!r} is not known; expected auto, cpu, cuda or cuda:N") from None
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError(f"device {device} was asked for and this PyTorch sees no CUDA device; use --device cpu")
    return wanted


def _device_map(text: str) -> str | dict[str, str]:
    if not text.lstrip().startswith("{"):
        return text
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f'device_map = {text!r} is no JSON ({error}); expected one such as {{"model": 0}}') from error
    named = {part: f"cuda:{device}" if isinstance(device, int) else str(device) for part, device in found.items()}
    return {part: device if device == "disk" else str(_device(device)) for part, device in named.items()}


def _need(package: str, option: str) -> None:
    if find_spec(package) is None:
        raise ResourceError(f"{option} needs the package {package}, which is not installed; pip install {package}")


def _quantization(quantization: Quantization, dtype: torch.dtype) -> Any:
    _need("bitsandbytes", f"--quantization {quantization}")
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _weights_digest(name: str, revision: str | None, model: nn.Module) -> str:
    """Return a digest of the weights as stored: of the tensors, wherever they lie and however they are split over files."""
    files = _weight_files(Path(name).expanduser()) if Path(name).expanduser().is_dir() else _cached_files(name, revision)
    if any(path.suffix == ".safetensors" for path in files):
        return digest_safetensors(files)
    if files:
        return digest(sorted(digest_file(path) for path in files))
    return digest_tensors(model.state_dict())


def _weight_files(folder: Path) -> list[Path]:
    for pattern in ("model.safetensors", "model-*.safetensors", "*.safetensors", "pytorch_model*.bin"):
        files = sorted(folder.glob(pattern))
        if files:
            return files
    return []


def _cached_files(name: str, revision: str | None) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache

    for file in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return _weight_files(Path(found).parent)
    return []
