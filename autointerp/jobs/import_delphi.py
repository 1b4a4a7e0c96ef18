"""``import delphi``: a latent cache of EleutherAI's delphi becomes a store, so that explain and score run on it.

The folder (read from eai-delphi 0.1.3) has a subfolder per module with ``config.json`` and ``FIRST_LAST.safetensors`` for each
range of latents: ``locations`` [M, 3] (sequence, offset, latent - FIRST) as uint16 or uint32 in order of sequence,
``activations`` float16 [M] and ``tokens`` int64 [sequences, ctx_len], the same in each file. Read in blocks, whatever its size.

What delphi does not record is said to be unknown in the manifest: the subject's weights, the documents (all tokens are one, so
that examples are parted by context), the token filter, and the coder's weights (its digest is that of the imported files).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from autointerp import __version__
from autointerp.digest import digest, digest_file
from autointerp.errors import InputError, Interrupted, StoreError
from autointerp.files import read_json
from autointerp.jobs.signals import StopFlag, listening
from autointerp.jobs.tables import build_windows
from autointerp.store import open_store
from autointerp.store.corpus import Document
from autointerp.store.layout import TOKENIZER, check_coder_names
from autointerp.store.manifest import CoderRecord, Identity
from autointerp.store.vocab import write_vocabulary
from autointerp.store.writer import DEFAULT_BUDGET_BYTES, StoreWriter
from autointerp.subject.vocabulary import load_tokenizer, token_bytes

logger = logging.getLogger("autointerp.jobs")

ORIGIN = "delphi"
UNKNOWN = {
    "subject_digest": "delphi records the subject's name and not its weights",
    "documents": "delphi does not record where they begin; all tokens are one document, and examples are parted by context",
    "token_filter": "delphi's tokens may have had BOS removed before the forward pass; none was prepended to a context",
    "coders": "digest is that of the imported files, hookpoints lack their side, activation and k are not recorded",
    "activations": "delphi dropped magnitudes up to 1e-5 and rounded to float16",
}
_FLOAT16_MAX = 65504.0
_BLOCK_ROWS = 1 << 20
_BLOCK_TOKENS = 1 << 20
_SPLIT = re.compile(r"(\d+)_(\d+)")


@dataclass(frozen=True, kw_only=True)
class _Split:
    """One file: a range of a module's latents."""

    path: Path
    first: int
    last: int
    starts: np.ndarray
    """int64 [sequences + 1], first row of each sequence."""
    num_overflowed: int


@dataclass(frozen=True, kw_only=True)
class _Module:
    """One module's files."""

    name: str
    config: dict[str, Any]
    splits: list[_Split]
    num_contexts: int
    ctx_len: int

    @property
    def width(self) -> int:
        return max(split.last for split in self.splits) + 1

    @property
    def num_rows(self) -> int:
        return sum(int(split.starts[-1]) for split in self.splits)

    @property
    def num_overflowed(self) -> int:
        return sum(split.num_overflowed for split in self.splits)


def import_delphi(
    folder: Path | str,
    out: Path | str,
    *,
    tokenizer: str | None = None,
    memory_budget_bytes: int = DEFAULT_BUDGET_BYTES,
    contexts_per_run: int | None = None,
) -> Path:
    """Write the store of a delphi cache: a run folder, its ``latents`` folder, or one module's folder; return its path.

    `tokenizer` is a folder or hub id, by default the ``model_name`` of the cache. Each module becomes a coder of that name.
    `contexts_per_run` is the unit of resume, where the budget should not decide it; the same call goes on after a kill.

    Raises: StoreError when the folder is no delphi cache or is damaged; InputError when there is no tokenizer, or it is not
    the one of the tokens; Interrupted after a signal, with finished runs kept.
    """
    folder, path = Path(folder).expanduser(), Path(out).expanduser()
    modules = [_module(place, folder) for place in _module_folders(folder)]
    first = modules[0]
    for module in modules[1:]:
        if (module.num_contexts, module.ctx_len) != (first.num_contexts, first.ctx_len):
            raise StoreError(
                f"{folder}: module {module.name} has {module.num_contexts} sequences of {module.ctx_len} tokens and "
                f"{first.name} {first.num_contexts} of {first.ctx_len}; import them one by one"
            )
    names = [module.name for module in modules]
    check_coder_names(names)
    subject = str(first.config.get("model_name") or "unknown")
    loaded = load_tokenizer(tokenizer or subject)
    pieces, is_special = token_bytes(loaded)
    for module in modules:
        if module.num_overflowed:
            logger.warning(
                "%s: %d activations overflowed float16 in delphi's cache and are stored as %.0f",
                module.name, module.num_overflowed, _FLOAT16_MAX,
            )  # fmt: skip
    stop = StopFlag()
    num_tokens = first.num_contexts * first.ctx_len
    with (
        listening(stop),
        StoreWriter.create_or_resume(
            path,
            identity=Identity(
                ctx_len=first.ctx_len,
                subject_digest=f"unknown (imported: {ORIGIN}, {subject})",
                packing="unknown",
                token_filter="unknown",
            ),
            coders={module.name: _record(module) for module in modules},
            memory_budget_bytes=memory_budget_bytes,
            contexts_per_run=contexts_per_run,
            l0={module.name: module.num_rows / num_tokens for module in modules},
            provenance={
                "imported": ORIGIN,
                "source": str(folder),
                "subject": subject,
                "unknown": UNKNOWN,
                "delphi_config": {module.name: module.config for module in modules},
                "num_overflowed": {module.name: module.num_overflowed for module in modules},
                "versions": {"autointerp": __version__},
            },
        ) as writer,
    ):
        if writer.is_finished:
            logger.info("%s has all of this already; nothing to do", path)
            return path
        if not writer.has_tokenizer:
            loaded.save_pretrained(path / TOKENIZER)
            write_vocabulary(path / TOKENIZER, pieces, is_special)
        if not writer.has_all_runs:
            _copy(modules, writer, stop, vocab_size=len(pieces))
        writer.finish()
    build_windows(open_store(path), memory_budget_bytes=memory_budget_bytes)
    return path


def _module_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise StoreError(f"no such folder: {folder}; expected a delphi run folder, or the folder 'latents' in one")
    root = folder / "latents" if (folder / "latents").is_dir() else folder
    found = [root] if _splits(root) else sorted({path.parent for path in root.rglob("*.safetensors") if _splits(path.parent)})
    if not found:
        raise StoreError(
            f"{folder} is no delphi cache: it holds no FIRST_LAST.safetensors; expected a folder per module, each with "
            "config.json and one such file per range of latents"
        )
    return found


def _splits(folder: Path) -> list[tuple[int, int, Path]]:
    """Return (first latent, last latent, path) of each file, in order."""
    matches = [(match, path) for path in folder.glob("*.safetensors") if (match := _SPLIT.fullmatch(path.stem))]
    return sorted((int(match[1]), int(match[2]), path) for match, path in matches)


def _module(folder: Path, root: Path) -> _Module:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise StoreError(f"{folder / 'config.json'} holds {type(config).__name__}; expected delphi's table of settings")
    ranges = _splits(folder)
    expected = 0
    for first, last, path in ranges:
        if first != expected or last < first:
            raise StoreError(
                f"{folder} lacks latents: {path.name} begins at {first} where {expected} should follow; copy the whole folder"
            )
        expected = last + 1
    shapes = {_tokens_shape(path) for _, _, path in ranges}
    if len(shapes) > 1:
        raise StoreError(f"{folder}: the files hold tokens of shapes {sorted(shapes)}; they belong to different caches")
    num_contexts, ctx_len = shapes.pop()
    inner = root / "latents" if (root / "latents").is_dir() else root
    name = folder.relative_to(inner).as_posix().replace("/", ".")
    return _Module(
        name=folder.name if name == "." else name,
        config=config,
        splits=[_scan(path, first, last, num_contexts, ctx_len) for first, last, path in ranges],
        num_contexts=num_contexts,
        ctx_len=ctx_len,
    )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise StoreError(
            f"{path} cannot be read as safetensors ({error}); it is truncated or damaged, copy it again"
        ) from error


def _tokens_shape(path: Path) -> tuple[int, int]:
    with _open(path) as file:
        held = set(file.keys())
        if not {"locations", "activations", "tokens"} <= held:
            raise StoreError(
                f"{path} holds {', '.join(sorted(held)) or 'nothing'}; expected locations, activations and tokens, as delphi "
                "writes them with save_tokens"
            )
        shape = tuple(file.get_slice("tokens").get_shape())
    if len(shape) != 2 or 0 in shape:
        raise StoreError(f"{path}: tokens have shape {shape}; expected [sequences, tokens]")
    return shape[0], shape[1]


def _scan(path: Path, first: int, last: int, num_contexts: int, ctx_len: int) -> _Split:
    """Check a file's rows and find where each sequence begins."""
    counts = np.zeros(num_contexts, np.int64)
    num_overflowed, newest = 0, 0
    with _open(path) as file:
        locations, activations = file.get_slice("locations"), file.get_slice("activations")
        num_rows = int(activations.get_shape()[0])
        if list(locations.get_shape()) != [num_rows, 3]:
            raise StoreError(f"{path}: locations have shape {locations.get_shape()}; expected [{num_rows}, 3]")
        for start in range(0, num_rows, _BLOCK_ROWS):
            rows = slice(start, min(start + _BLOCK_ROWS, num_rows))
            block = locations[rows].astype(np.int64)
            limits = np.array([num_contexts, ctx_len, last - first + 1])
            if (block < 0).any() or (block >= limits).any():
                raise StoreError(f"{path} has a location beyond {limits.tolist()} (sequences, tokens, latents); it is damaged")
            sequences = block[:, 0]
            if sequences[0] < newest or (np.diff(sequences) < 0).any():
                raise StoreError(f"{path} is not in order of sequences, as delphi writes it; make the cache again")
            newest = int(sequences[-1])
            counts += np.bincount(sequences, minlength=num_contexts)
            values = activations[rows]
            if np.isnan(values).any():
                raise StoreError(f"{path} has activations that are no numbers; make the cache again")
            num_overflowed += int(np.isinf(values).sum())
    starts = np.concatenate([[0], np.cumsum(counts)])
    return _Split(path=path, first=first, last=last, starts=starts, num_overflowed=num_overflowed)


def _record(module: _Module) -> CoderRecord:
    return CoderRecord(
        digest=digest([[split.path.name, digest_file(split.path)] for split in module.splits]),
        width=module.width,
        hookpoints=(module.name,),
        activation="unknown",
        reading={"imported": ORIGIN},
        format=ORIGIN,
        source=str(module.splits[0].path.parent),
    )


def _copy(modules: Sequence[_Module], writer: StoreWriter, stop: StopFlag, *, vocab_size: int) -> None:
    first = modules[0]
    with ExitStack() as stack:
        files = {split.path: stack.enter_context(_open(split.path)) for module in modules for split in module.splits}
        tokens = {module.name: files[module.splits[0].path].get_slice("tokens") for module in modules}
        at = 0
        while at < first.num_contexts:
            end = min(at + writer.room, at + max(1, _BLOCK_TOKENS // first.ctx_len), first.num_contexts)
            rows = tokens[first.name][at:end]
            for module in modules[1:]:
                if not np.array_equal(rows, tokens[module.name][at:end]):
                    raise StoreError(f"modules {first.name} and {module.name} have other tokens; import them one by one")
            if int(rows.min()) < 0 or int(rows.max()) >= vocab_size:
                raise InputError(
                    f"the cache holds token {int(rows.max())} and the tokenizer has {vocab_size}; give the subject's own with "
                    "--tokenizer"
                )
            writer.add_contexts(list(rows), [[(0, 0)]] * len(rows), documents=[Document(document=0, source_row=0)])
            if not writer.is_committed:
                for module in modules:
                    for split in module.splits:
                        for block in _activations(files[split.path], split, at, end, first.ctx_len):
                            writer.add_activations(module.name, *block)
            if stop.reason is not None:
                raise Interrupted(
                    f"stopped by {stop.reason} with {writer.committed_runs} finished runs in {writer.path}; run the same "
                    "command again to go on"
                )
            if writer.room == 0:
                writer.close_run()
            at = end
        writer.close_run()


def _activations(
    file: Any, split: _Split, first: int, stop: int, ctx_len: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (latents, positions, values) of sequences first..stop-1 of one file, in blocks."""
    locations, activations = file.get_slice("locations"), file.get_slice("activations")
    low, high = int(split.starts[first]), int(split.starts[stop])
    for start in range(low, high, _BLOCK_ROWS):
        rows = slice(start, min(start + _BLOCK_ROWS, high))
        block = locations[rows].astype(np.int64)
        values = np.clip(activations[rows].astype(np.float32), -_FLOAT16_MAX, _FLOAT16_MAX)
        yield block[:, 2] + split.first, block[:, 0] * ctx_len + block[:, 1], values
