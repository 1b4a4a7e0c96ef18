"""Embedders: each maps texts to unit vectors. `open_embedder` opens one by its spec."""

from __future__ import annotations

from importlib import import_module

from autointerp.errors import ConfigError, nearest
from autointerp.protocols import Embedder

KINDS: dict[str, str] = {}
"""Name -> ``module:Class``; a class is called without arguments."""


def open_embedder(spec: str) -> Embedder:
    """Return the embedder `spec`: a name of `KINDS`, or ``package.module:Class`` of an own one, called without arguments.

    Raises: ConfigError when there is none.
    """
    module, colon, name = KINDS.get(spec, spec).partition(":")
    if not colon:
        raise ConfigError(f"there is no embedder {spec!r}; {nearest(spec, KINDS)} (or package.module:Class of your own)")
    try:
        found = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        raise ConfigError(f"the embedder {spec!r} cannot be opened: there is no module {module!r}") from None
    except AttributeError:
        raise ConfigError(f"the embedder {spec!r} cannot be opened: {module} has no {name!r}") from None
    embedder: Embedder = found()
    if not isinstance(embedder, Embedder):
        raise ConfigError(f"the embedder {spec!r} is not one: it lacks `id` or `embed` of autointerp.protocols.Embedder")
    return embedder
