"""Where everything lies in a results folder, and which store and methods it belongs to.

The layout is a contract with readers: nothing but parquet lies in table folders, and whatever is half-written has a name that
starts with ``.tmp-``. Owns identity (`results.json`, ``state/<stage>/<method>/method.json``) and the records of runs; the rows
themselves are written by :mod:`autointerp.results.write`.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import orjson

from autointerp.digest import digest, short
from autointerp.errors import ConfigError, IdentityError, ResourceError, StoreError
from autointerp.files import TEMPORARY_PREFIX, disk_errors, read_json, sync_folder, write_json

FOLDER_SCHEMA = 1
Stage = Literal["explain", "score"]
STAGES: tuple[Stage, ...] = ("explain", "score")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")


@dataclass(frozen=True, kw_only=True)
class Method:
    """An explainer, or a scorer of one explainer's rows, with everything that decides what it writes."""

    stage: Stage
    name: str
    """Name of the explainer or scorer, as in its rows."""
    identity: Mapping[str, Any]
    """What `id` is the digest of, as JSON values."""
    model: str
    """The model that answers: the explainer's, or the judge's (``rule`` or ``none`` where there is no model)."""
    control: str | None = None
    control_of: str | None = None
    """`id` of the scorer that this is a control of."""
    explainer: str | None = None
    """Folder name of the explainer whose rows are scored; None for explainers."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How to build the method again (selection, options); informative, not part of the identity."""

    @property
    def id(self) -> str:
        """Digest of the identity: the ``explainer_id`` or ``scorer_id`` of the rows."""
        return digest(dict(self.identity))

    @property
    def base_id(self) -> str:
        """The ``base_id`` of the rows: a scorer and its controls share it."""
        return self.control_of or self.id

    @property
    def label(self) -> str:
        """Folder name: ``<name>-<id8>``, with the control's name between them where there is one."""
        name = self.name if self.control is None else f"{self.name}-{self.control}"
        return f"{name}-{short(self.id)}"


def create_exclusive(path: Path, content: bytes) -> bool:
    """Create `path` whole with `content`; return False, and change nothing, when it exists.

    Safe between processes and machines: the file is written beside `path` and hard-linked, and a link never replaces a file.
    """
    if path.exists():
        return False
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            return link_exclusive(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def link_exclusive(source: Path, path: Path, *, is_durable: bool = True) -> bool:
    """Give the finished file `source` the name `path`; return False when that name is taken.

    `is_durable`: the name survives a power cut. Raises: ResourceError on a file system without hard links.
    """
    try:
        os.link(source, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise ResourceError(
                f"cannot write {path}: its file system has no hard links, which workers need to agree on shards; "
                "choose a results folder on another disk"
            ) from error
        raise
    if is_durable:
        sync_folder(path.parent)
    return True


def to_json(value: Any) -> bytes:
    """Return `value` as the indented JSON that this folder's files hold."""
    return orjson.dumps(
        value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
    )


class ResultsFolder:
    """Paths and identity of one results folder."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    # Identity ---------------------------------------------------------------------------------------------------------

    @staticmethod
    def open(path: Path | str) -> ResultsFolder:
        """Return an existing results folder.

        Raises: StoreError when there is none at `path`.
        """
        folder = ResultsFolder(path)
        if not (folder.path / "results.json").is_file():
            what = "no such folder" if not folder.path.exists() else "that folder has no results.json"
            raise StoreError(f"cannot read results from {path}: {what}; make one with `autointerp explain STORE --out {path}`")
        schema = read_json(folder.path / "results.json").get("schema")
        if schema != FOLDER_SCHEMA:
            raise StoreError(
                f"{path} has layout {schema}, this release reads layout {FOLDER_SCHEMA}; use the release that wrote it"
            )
        return folder

    @staticmethod
    def create(
        path: Path | str, *, store_id: str, provenance: Mapping[str, Any], outgrown: Mapping[str, int] = MappingProxyType({})
    ) -> ResultsFolder:
        """Return the results folder at `path`, made when absent.

        `outgrown`: id and tokens of each smaller store that the store was extended from.

        Raises: IdentityError when it belongs to another store; StoreError when it holds other files.
        """
        folder = ResultsFolder(path)
        identity = folder.path / "results.json"
        if not identity.exists() and folder.path.is_dir() and any(_foreign(folder.path)):
            raise StoreError(
                f"cannot write results to {path}: it holds other files and no results.json; choose a new or empty folder"
            )
        content = {"schema": FOLDER_SCHEMA, "identity": {"store_id": store_id}, "provenance": dict(provenance)}
        if not create_exclusive(identity, to_json(content)):
            ResultsFolder.open(path)
            found = str(folder.identity().get("store_id"))
            if found in outgrown:
                raise IdentityError(
                    f"{path} was made when the store had {outgrown[found]:,} tokens; the store was extended since, which "
                    "changes every latent's examples: choose another results folder for the larger store"
                )
            if found != store_id:
                raise IdentityError(
                    f"{path} belongs to another store: store_id is {found} there and {store_id} now; "
                    "choose another results folder, or the store it was made from"
                )
        return folder

    def identity(self) -> dict[str, Any]:
        """Return what the whole folder was made from."""
        return dict(read_json(self.path / "results.json")["identity"])

    def provenance(self) -> dict[str, Any]:
        """Return what was recorded when the folder was made: the store's path, the version."""
        return dict(read_json(self.path / "results.json")["provenance"])

    def register_coder(self, name: str, coder_id: str) -> None:
        """Bind a coder's name to its digest.

        Raises: IdentityError when the name stands for another coder in this folder.
        """
        path = self.path / "state" / "coders" / f"{name}.json"
        if not create_exclusive(path, to_json({"coder": name, "coder_id": coder_id})):
            found = read_json(path)["coder_id"]
            if found != coder_id:
                raise IdentityError(
                    f"{self.path} has rows of another coder named {name!r}: coder_id is {found} there and {coder_id} now; "
                    "choose another results folder"
                )

    def register(self, method: Method) -> None:
        """Record a method before its first row.

        Raises: IdentityError when the folder name stands for another identity (the first 8 digits of two digests collide).
        """
        path = self.state(method.stage, method.label) / "method.json"
        if not create_exclusive(path, to_json({**asdict(method), "id": method.id, "label": method.label})):
            found = read_json(path)["id"]
            if found != method.id:
                raise IdentityError(
                    f"{path.parent} belongs to another method: id is {found} there and {method.id} now; choose another folder"
                )

    def record_sample(self, method: Method) -> None:
        """Record on which latents of each coder a registered method is run by now, the most so far; no ``sample`` = on all."""
        path = self.state(method.stage, method.label) / "method.json"
        content = read_json(path)
        before, now = content["settings"].get("sample"), method.settings.get("sample")
        if before is None:
            return
        if now is None:
            del content["settings"]["sample"]
        else:
            content["settings"]["sample"] = before | {
                c: max(before.get(c, []), list(latents), key=len) for c, latents in now.items()
            }
        if content["settings"].get("sample") != before:
            write_json(path, content)

    def methods(self, stage: Stage) -> list[Method]:
        """Return the methods that have been started, by folder name."""
        found = []
        for path in sorted((self.path / "state" / stage).glob("*/method.json")):
            values = {key: value for key, value in read_json(path).items() if key not in ("id", "label")}
            found.append(Method(**values))
        return found

    def explainer(self, wanted: str | None) -> Method:
        """Return the explainer with this name or folder name, or the only one when `wanted` is None.

        Raises: ConfigError naming what there is.
        """
        methods = self.methods("explain")
        matching = [m for m in methods if wanted is None or wanted in (m.label, m.name)]
        if len(matching) == 1:
            return matching[0]
        known = ", ".join(m.label for m in methods) or "none"
        if not methods:
            raise ConfigError(f"{self.path} holds no explanations yet; run `autointerp explain` first")
        if not matching:
            raise ConfigError(f"{self.path} has no explainer {wanted!r}; known: {known}")
        raise ConfigError(f"{self.path} has several explainers and the choice is open: name one of {known}")

    # Places -----------------------------------------------------------------------------------------------------------

    def state(self, stage: str, label: str) -> Path:
        """Folder of the markers of a method."""
        return self.path / "state" / stage / label

    def marker(self, stage: str, label: str, shard: int) -> Path:
        """Marker of a shard: written last, so what it describes is whole."""
        return self.state(stage, label) / f"{shard_name(shard)}.json"

    def table(self, table: str, method: Method, shard: int) -> Path:
        """File of one shard in a table."""
        if table == "failures":
            parent = self.path / "failures" / method.stage / method.label
        elif method.explainer is None:
            parent = self.path / table / method.label
        else:
            parent = self.path / table / method.explainer / method.label
        return parent / f"{shard_name(shard)}.parquet"

    def examples(self, selection_label: str, shard: int) -> Path:
        """File of one shard's windows."""
        return self.path / "examples" / selection_label / f"{shard_name(shard)}.parquet"

    def replies(self, method: Method, shard: int) -> Path:
        """Reply log of one shard of a method."""
        return self.path / "replies" / method.stage / method.label / f"{shard_name(shard)}.log"

    @property
    def plan(self) -> Path:
        """Folder of the plan's parts."""
        return self.path / "plan"

    @property
    def leases(self) -> Path:
        """Folder of the leases."""
        return self.path / "leases"

    def record_run(self, command: str, content: Mapping[str, Any]) -> Path:
        """Write ``runs/NNNN-<command>.json`` under the next free number and return its path."""
        runs = self.path / "runs"
        while True:
            taken = [int(path.name[:4]) for path in runs.glob("[0-9][0-9][0-9][0-9]-*.json")]
            path = runs / f"{max(taken, default=0) + 1:04d}-{command}.json"
            if create_exclusive(path, to_json(dict(content))):
                return path


def shard_name(shard: int) -> str:
    """Return ``shard-NNNNNN``."""
    return f"shard-{shard:06d}"


def check_method_name(name: str) -> str:
    """Return `name` when it can be part of a folder name.

    Raises: ConfigError otherwise.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"a method is named {name!r}; expected letters, digits, '_' and '.', so that folders can carry the name"
        )
    return name


def _foreign(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if not entry.name.startswith((".", "README"))]
