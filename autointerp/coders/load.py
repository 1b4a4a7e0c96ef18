"""Finding a coder: a local folder, a repository with one folder per hookpoint, a hub id, or a function of the user's.

A format is one module with ``DESCRIPTION``, ``MARKER`` (the file that gives it away), ``matches(folder)``, ``load(folder)`` and
``module_of(folder)``; :data:`FORMATS` lists them and is all there is to register.
"""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from autointerp.coders.coder import Coder
from autointerp.errors import InputError, nearest

FORMATS: dict[str, str] = {
    "sparsify": "autointerp.coders.sparsify",
    "gemma_scope": "autointerp.coders.gemma_scope",
}

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<folder>[\w./@-]+))?")
_DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_DEPTH = 4


def load_coder(source: str | Path, *, hookpoint: str | None = None, device: str = "cpu") -> Coder:
    """Return the coder at `source`.

    `source` is a folder with one coder, a folder with several (`hookpoint` then says which, by its published name),
    ``OWNER/REPO[@REVISION][:FOLDER]`` on the hub, or ``module:function`` that returns a `Coder` when called without arguments.

    Raises: InputError when there is no coder, or more than one; StoreError when its files are damaged.
    """
    text = str(source)
    path = Path(text).expanduser()
    if path.is_dir():
        return _load_folder(path, hookpoint).to(device)
    if path.exists():
        raise InputError(f"coder {text} is a file; give the folder that holds it")
    if _DOTTED.fullmatch(text):
        return _call(text).to(device)
    match = None if text.startswith((".", "/", "~")) else _HUB_ID.fullmatch(text)
    if match is None:
        raise InputError(
            f"no coder at {text}: no such folder, and not a hub id; "
            "expected a folder, OWNER/REPO[@REVISION][:FOLDER] or module:function"
        )
    root, revision = _download(match["repo"], match["revision"], match["folder"], hookpoint)
    coder = _load_folder(root / (match["folder"] or ""), hookpoint)
    spec = replace(coder.spec, source=text, revision=revision)
    return replace(coder, spec=spec).to(device)


def coder_folders(root: Path) -> dict[str, Path]:
    """Return the folders below `root` that hold a coder of a known format, by their published module name, sorted."""
    found: dict[str, Path] = {}
    for module in _modules():
        for depth in range(_DEPTH + 1):
            for marker in root.glob("*/" * depth + module.MARKER):
                if module.matches(marker.parent):
                    found[marker.parent.relative_to(root).as_posix()] = marker.parent
    return dict(sorted(found.items()))


def _load_folder(folder: Path, hookpoint: str | None) -> Coder:
    if not folder.is_dir():
        raise InputError(f"no coder at {folder}: no such folder")
    for module in _modules():
        if module.matches(folder):
            coder: Coder = module.load(folder)
            return coder
    found = coder_folders(folder)
    if hookpoint is not None:
        wanted = hookpoint.partition("@")[0].removeprefix("model.")
        chosen = {
            name: path for name, path in found.items() if name == wanted or _module_name(path).removeprefix("model.") == wanted
        }
        if not chosen and found:
            if len(found) == 1:
                chosen = found
            else:
                raise InputError(f"{folder} holds no coder for hookpoint {hookpoint!r}; {nearest(wanted, found)}")
        found = chosen
    if len(found) == 1:
        return _load_folder(next(iter(found.values())), None)
    if found:
        shown = ", ".join(list(found)[:12]) + (", ..." if len(found) > 12 else "")
        raise InputError(f"{folder} holds {len(found)} coders ({shown}); give the folder of one of them")
    names = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    known = "; ".join(module.DESCRIPTION for module in _modules())
    raise InputError(f"{folder} holds no coder of a known format; found {shown or 'nothing'}; the formats are {known}")


def _module_name(folder: Path) -> str:
    for module in _modules():
        if module.matches(folder):
            return str(module.module_of(folder))
    return folder.name


def _modules() -> list[Any]:
    return [import_module(name) for name in FORMATS.values()]


def _call(dotted: str) -> Coder:
    module_name, _, name = dotted.partition(":")
    try:
        function = getattr(import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"coder {dotted} cannot be imported ({error}); expected module:function on the Python path") from error
    coder = function()
    if not isinstance(coder, Coder):
        raise InputError(f"coder {dotted} returned {type(coder).__name__}; expected autointerp.coders.coder.Coder")
    return coder


def _download(repo: str, revision: str | None, folder: str | None, hookpoint: str | None) -> tuple[Path, str | None]:
    """Return (local copy of the repository's snapshot, commit); fetches only the coder's own files where it can."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    markers = [module.MARKER for module in _modules()]
    patterns = [f"{folder.strip('/')}/*"] if folder else None
    try:
        if patterns is None:
            patterns = _patterns(HfApi().list_repo_files(repo, revision=revision), markers, hookpoint, repo)
    except (OSError, OfflineModeIsEnabled):
        patterns = None
    try:
        root = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(
            f"no coder at {repo}: no such folder here, and the hub did not give it ({first}); check the name and the connection"
        ) from error
    return root, root.name if re.fullmatch(r"[0-9a-f]{40}", root.name) else revision


def _patterns(files: list[str], markers: list[str], hookpoint: str | None, repo: str) -> list[str]:
    """Return what to download of a repository: the folder of the one coder that is wanted."""
    folders = sorted({str(Path(name).parent) for name in files if Path(name).name in markers})
    if hookpoint is not None:
        wanted = hookpoint.partition("@")[0].removeprefix("model.")
        folders = [name for name in folders if wanted in name.removeprefix("model.").split("/")] or folders
    if len(folders) > 1:
        shown = ", ".join(folders[:12]) + (", ..." if len(folders) > 12 else "")
        raise InputError(f"{repo} holds {len(folders)} coders ({shown}); name one as {repo}:FOLDER")
    return [f"{folders[0]}/*" if folders[0] != "." else "*"] if folders else ["*.json"]
