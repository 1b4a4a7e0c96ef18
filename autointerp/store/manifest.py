"""What a store is made of: identity, extent and provenance of the whole and of each coder.

*Identity* decides what the numbers mean; a difference is refused. *Extent* may grow. *Provenance* is recorded, and a difference
is worth a warning at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from autointerp.config import Config
from autointerp.digest import digest
from autointerp.errors import ConfigError, IdentityError, StoreError
from autointerp.files import read_json, read_sealed
from autointerp.store.layout import BUILDING, GROWN, MANIFEST, SCHEMA_VERSION, FileEntry, coder_file


class Identity(Config):
    """What decides the numbers in a store, other than its coders."""

    ctx_len: int
    """Tokens in a full context; the unit of positions."""
    tokens_digest: str | None = None
    """Digest of the token ids in order, see :func:`autointerp.store.corpus.tokens_digest`; None until all are known."""
    subject_digest: str
    """Digest of the subject's weights, never a path."""
    quantization: str | None = None
    """How the subject's weights were quantised, or None."""
    packing: str
    """How documents were laid into contexts."""
    chat_template_digest: str | None = None
    """Digest of the chat template, or None where none was applied."""
    token_filter: str = "bos"
    """Tokens whose activations were dropped."""
    bos_token_id: int | None = None
    """The token prepended to every context in the forward pass, or None where there was none."""


class CoderRecord(Config):
    """What is known of a coder without its weights: ``coder.json``."""

    digest: str
    """Digest of the weights."""
    width: int
    """Number of latents."""
    hookpoints: tuple[str, ...]
    """The hookpoints it reads."""
    target: str | None = None
    """The hookpoint it predicts, for transcoders; None when it is the one it reads."""
    activation: str
    """Activation function, such as ``topk`` or ``jumprelu``."""
    k: int | None = None
    """Latents that fire per token, for top-k coders."""
    reading: dict[str, Any] = Field(default_factory=dict)
    """Rules of reading the weights that change the values."""
    format: str = ""
    """Format of the files it was read from."""
    source: str = ""
    """Folder or hub id it was read from."""
    revision: str | None = None
    """Revision of the hub repository."""
    d_in: int | None = None
    """Width of what it reads."""
    d_out: int | None = None
    """Width of what it writes."""
    is_transcoder: bool = False
    """Whether it predicts another place than it reads."""
    control_of: str | None = None
    """Name of the coder it is a control of."""
    labels: tuple[str, ...] = ()
    """A name for each latent, where the source gave names; else empty."""

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the activations."""
        names = ("digest", "width", "hookpoints", "activation", "k", "reading")
        values = self.model_dump(mode="json")
        return {name: values[name] for name in names}


class CoderExtent(Config):
    """A coder that is in the store."""

    coder_id: str
    """Digest of the store and the coder's identity."""
    width: int
    """Number of latents."""
    num_activations: int
    """Rows of its activations."""
    num_parts: int
    """Files they lie in."""
    dtype: str
    """``float16`` or ``float32``, of the values."""


class Extent(Config):
    """How much is there."""

    num_contexts: int
    """Rows of the tokens parts."""
    num_tokens: int
    """Corpus tokens in them."""
    num_documents: int
    """Rows of the documents parts."""
    coders: dict[str, CoderExtent]
    """By name."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole of ``manifest.json``, whose existence says that the store is finished."""

    store_id: str
    """Digest of the identity."""
    identity: Identity
    """What decides the numbers."""
    extent: Extent
    """How much is there."""
    provenance: dict[str, Any]
    """How it was made."""
    files: dict[str, FileEntry]
    """Every file that belongs to the store, by path."""
    schema_version: int = SCHEMA_VERSION
    """Number of the layout."""

    def values(self) -> dict[str, Any]:
        """Return the manifest as it is written."""
        return {
            "schema_version": self.schema_version,
            "store_id": self.store_id,
            "identity": self.identity.model_dump(mode="json"),
            "extent": self.extent.model_dump(mode="json"),
            "provenance": self.provenance,
            "files": {name: entry.model_dump(mode="json") for name, entry in self.files.items()},
        }

    @staticmethod
    def parse(values: dict[str, Any], *, where: str) -> Manifest:
        """Return the manifest that was written as `values`.

        Raises: StoreError when a key is missing or has no meaning.
        """
        try:
            return Manifest(
                schema_version=values["schema_version"],
                store_id=values["store_id"],
                identity=Identity.parse(values["identity"], where=where),
                extent=Extent.parse(values["extent"], where=where),
                provenance=values["provenance"],
                files={name: FileEntry.parse(entry, where=where) for name, entry in values["files"].items()},
            )
        except (KeyError, TypeError, AttributeError, ConfigError) as error:
            raise StoreError(f"{where} is not the manifest of a store ({error}); it is damaged, restore it") from error


def store_id_of(identity: Identity) -> str:
    """Return the digest that names a store."""
    return digest({"store": identity.model_dump(mode="json")})


def coder_id_of(store_id: str, record: CoderRecord) -> str:
    """Return the digest that names a coder's activations in a store."""
    return digest({"store": store_id, "coder": record.identity()})


def check_identity(found: Identity, wanted: Identity, *, where: str | Path = "the store") -> None:
    """Compare what a store was made from with what is named now; a digest that is not known yet is not compared.

    Raises: IdentityError naming the first field that differs, and both values.
    """
    for name in Identity.model_fields:
        there, here = getattr(found, name), getattr(wanted, name)
        if name == "tokens_digest" and None in (there, here):
            continue
        if there != here:
            raise IdentityError(
                f"{where} was made with {name} = {there!r} and {here!r} is wanted now; use the former, or another folder"
            )


def check_coder_identity(found: CoderRecord, wanted: CoderRecord, *, coder: str, where: str | Path = "the store") -> None:
    """Compare the coder in a store with the one of the same name now.

    Raises: IdentityError naming the first field that differs, and both values.
    """
    there, here = found.identity(), wanted.identity()
    for name in there:
        if there[name] != here[name]:
            raise IdentityError(
                f"coder {coder!r} of {where} has {name} = {there[name]!r} and {here[name]!r} is wanted now; "
                "give this coder another name, or use another folder"
            )


def read_coder(path: Path, coder: str) -> CoderRecord:
    """Return the record of a coder that is in a store.

    Raises: StoreError when it is missing or damaged.
    """
    file = path / coder_file(coder)
    values = read_json(file)
    try:
        return CoderRecord.parse({key: value for key, value in values.items() if key != "coder_id"}, where=str(file))
    except (AttributeError, ConfigError) as error:
        raise StoreError(f"{file} is not the record of a coder ({error}); it is damaged, restore it") from error


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of a finished store.

    Raises: StoreError when there is no store, or it is unfinished, damaged or of a newer release.
    """
    file = path / MANIFEST
    if not file.exists():
        if (path / GROWN / MANIFEST).exists():
            raise StoreError(
                f"{path} was extended and its new files are moving into place: try again in a moment, or, if the process that "
                "did it is gone, run the same cache command again"
            )
        if (path / BUILDING).is_dir():
            num_runs = len(list((path / BUILDING / "runs").glob("run-*.json")))
            raise StoreError(f"{path} is not finished ({num_runs} runs are there); run the same cache command again")
        raise StoreError(f"{path} holds no store: {MANIFEST} does not exist; make one with the cache command")
    values = read_sealed(file)
    version = values.get("schema_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise StoreError(f"{file} is not the manifest of a store: it has no schema_version")
    if version > SCHEMA_VERSION:
        raise StoreError(f"{file} has schema {version}, this release reads up to {SCHEMA_VERSION}; update autointerp")
    return Manifest.parse(values, where=str(file))
