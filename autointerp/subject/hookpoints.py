"""Hookpoints as text: ``MODULE.PATH@in`` or ``@out`` of the whole model, from the many ways in which paths are published.

Works on names of modules alone; what a published name such as ``blocks.5.hook_resid_mid`` means is `subject.published`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from autointerp.errors import InputError, nearest

# What models put before their blocks, longest first: the bare model inside a language model, and that inside a multimodal one.
_PREFIXES = ("model.language_model.", "language_model.", "transformer.", "gpt_neox.", "backbone.", "model.")
_SIDES = {"in": "in", "out": "out", "input": "in", "output": "out"}


def resolve_hookpoint(hookpoint: str, modules: Iterable[str], *, default_side: str = "out") -> str:
    """Return the full name of a hookpoint given as published: with or without a side, relative to a part of the model.

    The side is ``@in`` or ``@out`` at the end, or ``.input`` or ``.output`` where the model has no module of that name. The
    path is tried as it is, then without the prefix that models put before their blocks, then with each such prefix.

    Raises: InputError when nothing fits, with the nearest name, or when several do.
    """
    known = {name for name in modules if name}
    path, side = _sided(hookpoint, default_side, known)
    if path in known:
        return f"{path}@{side}"
    bare = _relative(path)
    hits = sorted({candidate for candidate in (bare, *(prefix + bare for prefix in _PREFIXES)) if candidate in known})
    if not hits:
        hits = sorted(name for name in known if name.endswith("." + bare))
    if len(hits) == 1:
        return f"{hits[0]}@{side}"
    if hits:
        shown = ", ".join(hits[:6])
        raise InputError(f"hookpoint {hookpoint!r} fits several modules ({shown}); give the whole path")
    endings = {name: name for name in known} | {_relative(name): name for name in known}
    raise InputError(f"the subject has no module {path!r} for hookpoint {hookpoint!r}; {nearest(path, endings)}")


def resolve_patterns(patterns: Sequence[str], modules: Sequence[str], *, default_side: str = "out") -> list[str]:
    """Return the hookpoints that match any of the patterns, in the order of `modules`; ``*`` stays within one part of a path.

    Raises: InputError when a pattern matches nothing.
    """
    chosen: dict[str, None] = {}
    for pattern in patterns:
        path, side = _sided(pattern, default_side, ())
        if not any(sign in path for sign in "*?["):
            chosen[resolve_hookpoint(pattern, modules, default_side=default_side)] = None
            continue
        parts = path.removeprefix("model.").split(".")
        hits = [name for name in modules if name and (_fits(name.split("."), path.split(".")) or _fits_relative(name, parts))]
        if not hits:
            raise InputError(
                f"no module of the subject matches {pattern!r}; {nearest(path, {_relative(name) for name in modules})}"
            )
        chosen.update((f"{name}@{side}", None) for name in hits)
    rank = {name: index for index, name in enumerate(modules)}
    return sorted(chosen, key=lambda name: (rank[name.rpartition("@")[0]], name))


def _fits(parts: list[str], patterns: list[str]) -> bool:
    return len(parts) == len(patterns) and all(
        fnmatchcase(part, pattern) for part, pattern in zip(parts, patterns, strict=True)
    )


def _fits_relative(name: str, patterns: list[str]) -> bool:
    return any(name.startswith(prefix) and _fits(name.removeprefix(prefix).split("."), patterns) for prefix in _PREFIXES)


def _relative(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)


def _sided(hookpoint: str, default_side: str, known: Iterable[str]) -> tuple[str, str]:
    """Return (module path, ``in`` or ``out``)."""
    path, at, side = hookpoint.partition("@")
    if at:
        if side not in ("in", "out"):
            raise InputError(f"hookpoint {hookpoint!r} ends in @{side}; expected MODULE.PATH@in or MODULE.PATH@out")
        return path, side
    parent, dot, last = path.rpartition(".")
    if dot and last in ("input", "output") and path not in known:
        return parent, _SIDES[last]
    return path, default_side
