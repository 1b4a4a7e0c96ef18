"""Finding a coder: a folder or file, a repository with many coders, a hub id, given directions, or a function of the user's.

A format is one module with

- ``DESCRIPTION``: its name and the files it consists of;
- ``MARKER``: a glob of the file that gives a coder away, relative to the coder's folder;
- ``IS_FILE``: whether each such file is a coder by itself (several lie in one folder), else the folder is the coder;
- ``OPTIONS``: readings that the user may choose, name -> what it does;
- ``matches(path)``: whether the folder (or file) holds a coder of this format, by its contents;
- ``published_name(path)``: what the publisher calls it, for choosing among several;
- ``load(path, options)``: the coder.

:data:`FORMATS` lists them and is all there is to register.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast
from urllib.parse import parse_qsl

from autointerp.coders import directions
from autointerp.coders.coder import Coder
from autointerp.coders.refused import refusal
from autointerp.coders.tensors import check_readable
from autointerp.errors import InputError, nearest

FORMATS: dict[str, str] = {
    "sparsify": "autointerp.coders.sparsify",
    "gemma_scope": "autointerp.coders.gemma_scope",
    "saelens": "autointerp.coders.saelens",
    "dictionary_learning": "autointerp.coders.dictionary_learning",
    "gemma_scope_2": "autointerp.coders.gemma_scope_2",
    "gemma_scope_2_clt": "autointerp.coders.gemma_scope_2_clt",
    "llama_scope": "autointerp.coders.llama_scope",
    "llama_scope_r1": "autointerp.coders.llama_scope_r1",
    "llamascopium": "autointerp.coders.llamascopium",
    "openai_gpt2": "autointerp.coders.openai_gpt2",
    "goodfire": "autointerp.coders.goodfire",
    "deepseek_r1": "autointerp.coders.deepseek_r1",
    "qwen_scope": "autointerp.coders.qwen_scope",
    "circuit_tracer": "autointerp.coders.circuit_tracer",
    "circuit_tracer_clt": "autointerp.coders.circuit_tracer_clt",
    "batch_topk": "autointerp.coders.batch_topk",
    "e2e_sae": "autointerp.coders.e2e_sae",
    "dunefsky": "autointerp.coders.dunefsky",
    "attn_saes": "autointerp.coders.attn_saes",
}

MADE_FROM_SUBJECT = ("neurons",)
"""Sources ``KIND:MODULE`` that are no files: whoever has the subject makes them, see `subject.neurons`."""

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<folder>[\w./@-]+))?")
_DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_DEPTH = 4


class Format(Protocol):
    """A module that reads one format; see the top of this file."""

    DESCRIPTION: str
    MARKER: str
    IS_FILE: bool
    OPTIONS: Mapping[str, str]

    def matches(self, path: Path) -> bool: ...
    def published_name(self, path: Path) -> str: ...
    def load(self, path: Path, options: Mapping[str, str]) -> Coder: ...


def load_coder(source: str | Path, *, hookpoint: str | None = None, device: str = "cpu") -> Coder:
    """Return the coder at `source`.

    `source` is a folder or file with one coder, a folder with several (`hookpoint` then says which, by its published name),
    ``OWNER/REPO[@REVISION][:FOLDER]`` on the hub, ``directions:FILE`` (see `coders.directions`), or ``module:function`` that
    returns a `Coder` when called without arguments.
    ``?NAME=VALUE&...`` after it chooses among a format's readings; ``?format=NAME`` names the format where two would do.

    Raises: InputError when there is no coder, or more than one, or no such reading; StoreError when its files are damaged.
    """
    text = str(source)
    place, options = split_options(text)
    path = Path(place).expanduser()
    kind, _, rest = place.partition(":")
    if kind == directions.KIND and rest:
        return directions.load(Path(rest).expanduser(), options, source=text).to(device)
    if kind in MADE_FROM_SUBJECT and rest:
        raise InputError(f"coder {text} is made from a subject's weights and no subject is loaded here; name it in `cache`")
    if path.exists():
        return _load(path, hookpoint, options).to(device)
    if _DOTTED.fullmatch(place):
        return _call(place).to(device)
    match = None if place.startswith((".", "/", "~")) else _HUB_ID.fullmatch(place)
    if match is None:
        raise InputError(
            f"no coder at {text}: no such folder, and not a hub id; "
            "expected a folder, OWNER/REPO[@REVISION][:FOLDER] or module:function"
        )
    root, revision = _download(match["repo"], match["revision"], match["folder"], hookpoint)
    coder = _load(root / (match["folder"] or ""), hookpoint, options)
    spec = replace(coder.spec, source=text, revision=revision)
    return replace(coder, spec=spec).to(device)


def coder_paths(root: Path) -> dict[str, Path]:
    """Return the folders and files below `root` that hold a coder of a known format, by their path from there, sorted."""
    found: dict[str, Path] = {}
    for module in _formats().values():
        for depth in range(_DEPTH + 1):
            for marker in root.glob("*/" * depth + module.MARKER):
                path = _path_of(marker, module)
                if module.matches(path):
                    found[path.relative_to(root).as_posix()] = path
    return dict(sorted(found.items()))


def format_of(path: Path, wanted: str | None = None) -> Format | None:
    """Return the format of the coder at `path`, None when there is none.

    Raises: InputError when `wanted` is no format, or not that of `path`, or when two formats fit and none is wanted.
    """
    formats = _formats()
    if wanted is not None and wanted not in formats:
        raise InputError(f"format={wanted} is not known; {nearest(wanted, formats)}")
    found = {name: module for name, module in formats.items() if path.is_file() == module.IS_FILE and module.matches(path)}
    if wanted is not None and found:
        if wanted not in found:
            raise InputError(f"{path} is not of format {wanted}; it fits {', '.join(found)}")
        return found[wanted]
    if len(found) > 1:
        raise InputError(f"{path} can be read as {' or '.join(found)}; say which with ?format=NAME after the source")
    return next(iter(found.values()), None)


def split_options(text: str) -> tuple[str, dict[str, str]]:
    """Return the source and its options.

    Raises: InputError when what follows the question mark is not ``NAME=VALUE&NAME=VALUE``.
    """
    place, _, query = text.partition("?")
    try:
        return place, dict(parse_qsl(query, strict_parsing=True)) if query else {}
    except ValueError:
        raise InputError(f"coder {text}: expected ?NAME=VALUE&NAME=VALUE after the source") from None


def _load(path: Path, hookpoint: str | None, options: Mapping[str, str]) -> Coder:
    if not path.exists():
        raise InputError(f"no coder at {path}: no such folder")
    module = format_of(path, options.get("format"))
    if module is not None:
        chosen = {name: value for name, value in options.items() if name != "format"}
        for name in chosen:
            if name not in module.OPTIONS:
                raise InputError(f"{path}: a coder of this format has no reading {name!r}; {nearest(name, module.OPTIONS)}")
        return module.load(path, chosen)
    if path.is_file():
        if (why := refusal(path)) is not None:
            raise InputError(why)
        check_readable(path)
        raise InputError(f"coder {path} is a file of no known format; give the folder that holds it")
    return _load(_choose(path, hookpoint), None, options)


def _choose(folder: Path, hookpoint: str | None) -> Path:
    """Return the one coder below `folder` that is meant."""
    found = coder_paths(folder)
    if hookpoint is not None:
        wanted = _bare(hookpoint)
        chosen = {name: path for name, path in found.items() if name == wanted or _bare(_published_name(path)) == wanted}
        if not chosen and len(found) > 1:
            raise InputError(f"{folder} holds no coder for hookpoint {hookpoint!r}; {nearest(wanted, found)}")
        found = chosen or found
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        shown = ", ".join(list(found)[:12]) + (", ..." if len(found) > 12 else "")
        raise InputError(f"{folder} holds {len(found)} coders ({shown}); give the folder of one of them")
    if (why := refusal(folder)) is not None:
        raise InputError(why)
    for path in sorted(folder.rglob("*")):
        if len(path.relative_to(folder).parts) <= _DEPTH:
            check_readable(path)
    names = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    similar = [module.DESCRIPTION for module in _formats().values() if any(folder.glob(module.MARKER))]
    if similar:
        raise InputError(
            f"{folder} holds no coder of a known format, though it has files of such names ({shown}): "
            f"their contents are not those of {' or '.join(similar)}"
        )
    raise InputError(
        f"{folder} holds no coder of a known format; found {shown or 'nothing'}; the formats are {', '.join(_formats())}"
    )


def _bare(hookpoint: str) -> str:
    return hookpoint.partition("@")[0].removeprefix("model.")


def _path_of(marker: Path, module: Format) -> Path:
    if module.IS_FILE:
        return marker
    for _ in Path(module.MARKER).parts:
        marker = marker.parent
    return marker


def _published_name(path: Path) -> str:
    module = format_of(path)
    return path.name if module is None else module.published_name(path)


def _formats() -> dict[str, Format]:
    return {name: cast(Format, import_module(dotted)) for name, dotted in FORMATS.items()}


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

    patterns = _around(folder) if folder else None
    try:
        if patterns is None:
            patterns = _patterns(HfApi().list_repo_files(repo, revision=revision), hookpoint, repo)
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


def _around(name: str) -> list[str]:
    """Return what to download for the coder `name`, a folder or a file: itself and the small files that may describe it."""
    name = name.strip("/")
    above = [parent.as_posix() for parent in Path(name).parents]
    described = [f"{parent}/*.{kind}".removeprefix("./") for parent in above for kind in ("json", "yaml")]
    # The one format that spreads a coder over two files of a folder with many.
    decoder = [name.replace("W_enc_", "W_dec_")] if "W_enc_" in name else []
    return [name, f"{name}/*", *decoder, *described]


def _patterns(files: list[str], hookpoint: str | None, repo: str) -> list[str]:
    """Return what to download of a repository: the one coder that is wanted."""
    folders: set[str] = set()
    single: set[str] = set()
    for name in files:
        for module in _formats().values():
            if Path(name).match(module.MARKER):
                (single if module.IS_FILE else folders).add(_path_of(Path(name), module).as_posix())
    # Markers of files are broad: what lies in a coder's folder is part of that coder.
    names = sorted(folders | {name for name in single if Path(name).parent.as_posix() not in folders})
    if hookpoint is not None:
        names = [name for name in names if _bare(hookpoint) in name.removeprefix("model.").split("/")] or names
    if len(names) > 1:
        shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        raise InputError(f"{repo} holds {len(names)} coders ({shown}); name one as {repo}:FOLDER")
    if not names:
        return ["*.json", "*.yaml"]
    return ["*"] if names[0] == "." else _around(names[0])
