"""The corpus: documents streamed from files, datasets or the standard library, tokenised and packed into contexts.

Memory does not grow with the corpus: files are read in blocks, documents tokenised in batches, contexts yielded one by one. The
order is that of the source; nothing is shuffled. BOS is no corpus token: the forward pass prepends it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import TemplateError
from pydantic import Field

from autointerp.config import RUNTIME, Config
from autointerp.digest import digest
from autointerp.errors import ConfigError, InputError, nearest
from autointerp.store.corpus import Document
from autointerp.subject.stdlib import stdlib_files, stdlib_root

_COMMIT = re.compile(r"[0-9a-f]{40}")
_BLOCK_BYTES = 1 << 16
_BATCH_CHARS = 1 << 17
_BATCH_PIECES = 256


class CorpusConfig(Config):
    """Which text, and how it is cut into contexts."""

    source: str = "stdlib"
    """``stdlib``, a .parquet, .jsonl or text file, a folder of one of these, or a dataset id on the hub."""
    subset: str | None = None
    """The dataset's configuration name on the hub."""
    split: str = "train"
    """The dataset's split on the hub."""
    revision: str | None = None
    text_column: str = "text"
    messages: str | None = None
    """A column of chat messages, rendered with the subject's chat template in place of `text_column`."""
    keep_columns: tuple[str, ...] = ()
    """Columns copied into the store's documents table."""
    num_tokens: int | None = Field(default=10_000_000, gt=0)
    """Stop after the context that reaches this many tokens; None reads all."""
    ctx_len: int = Field(default=256, gt=1)
    packing: Literal["concat", "document"] = "concat"
    """``concat``: documents one after another into full contexts; ``document``: no context mixes documents."""
    batch_pieces: int = Field(default=_BATCH_PIECES, gt=0, json_schema_extra=RUNTIME)
    """Documents tokenised at a time."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """A run of tokens fed to the subject as one sequence."""

    tokens: np.ndarray
    """uint32 [n], 1 <= n <= ctx_len."""
    segments: list[tuple[int, int]]
    """(document id, offset of its first token here), sorted by offset; the first offset is 0."""
    is_template: np.ndarray | None
    """bool [n]: tokens the chat template put around the messages; None unless the corpus was opened with `mark_template`."""
    documents: list[Document]
    """Documents that begin in this context."""


@dataclass
class CorpusCounts:
    """What the corpus turned out to hold; grows while it is read."""

    num_documents: int = 0
    num_tokens: int = 0
    num_empty: int = 0
    num_undecodable: int = 0


@dataclass(frozen=True)
class _Source:
    """One document before it is tokenised; its pieces joined are its text."""

    row: int
    columns: Mapping[str, Any]
    pieces: Iterable[Any]
    """Strings, or one list of chat messages."""


class Corpus:
    """Reads one corpus with one tokenizer; :meth:`contexts` may be called more than once and gives the same each time."""

    def __init__(self, config: CorpusConfig, tokenizer: Any, *, num_embeddings: int, mark_template: bool = False) -> None:
        """Check the source and the tokenizer, reading nothing yet.

        Raises: InputError when the source does not exist or the tokenizer does not match the subject.
        """
        self.config = config
        self.counts = CorpusCounts()
        self._tokenizer = tokenizer
        self._num_embeddings = num_embeddings
        self._mark_template = mark_template
        check_tokenizer(tokenizer, num_embeddings)
        if config.messages is not None and not getattr(tokenizer, "chat_template", None):
            raise InputError(f"--messages {config.messages} needs a chat template, and the subject's tokenizer has none")
        if mark_template and config.messages is None:
            raise ConfigError("the token filter 'template' needs a corpus of chat messages; name their column with --messages")
        if mark_template and not getattr(tokenizer, "is_fast", False):
            raise InputError("the token filter 'template' needs a fast tokenizer, and the subject's has no tokenizer.json")
        self._open = _opener(config)

    def contexts(self) -> Iterator[Context]:
        """Yield the contexts in order.

        Raises: InputError when the corpus is empty, a column is missing or a token has no embedding.
        """
        self.counts = counts = CorpusCounts()
        packer = _Packer(self.config.ctx_len, mix=self.config.packing == "concat")
        limit = self.config.num_tokens
        pieces = self._pieces(counts)
        for source, tokens, is_template, is_last in self._tokenised(pieces):
            for context in packer.add(source, tokens, is_template, is_last=is_last, counts=counts):
                counts.num_tokens += len(context.tokens)
                yield context
                if limit is not None and counts.num_tokens >= limit:
                    return
        for context in packer.flush():
            counts.num_tokens += len(context.tokens)
            yield context
        if counts.num_tokens == 0:
            raise InputError(
                f"the corpus {self.config.source} holds no text: {counts.num_empty} empty and "
                f"{counts.num_undecodable} undecodable documents were skipped; check the source, the split and the text column"
            )

    def column_types(self) -> dict[str, str]:
        """Return the type of each document column (``string``, ``int64``, ``float64``, ``bool``), judged by the first document.

        Text files have the column ``path``. What is none of these types is kept as JSON text.
        """
        first = next(self._open(CorpusCounts()), None)
        types = {bool: "bool", int: "int64", float: "float64"}
        return {name: types.get(type(value), "string") for name, value in first.columns.items()} if first else {}

    def fingerprint(self) -> str | None:
        """Return a digest that changes when the source does, without reading it: names, sizes and times of files.

        None where only reading can tell: data sets on the hub at no fixed commit.
        """
        config = self.config
        root = stdlib_root() if config.source == "stdlib" else Path(config.source).expanduser()
        if config.source != "stdlib" and not root.exists():
            return config.revision if config.revision and _COMMIT.fullmatch(config.revision) else None
        files = _stdlib_files() if config.source == "stdlib" else sorted(root.rglob("*")) if root.is_dir() else [root]
        stats = [(path.relative_to(root).as_posix(), path.stat()) for path in files if path.is_file()]
        return digest([[repr(name), stat.st_size, stat.st_mtime_ns] for name, stat in stats])

    def _pieces(self, counts: CorpusCounts) -> Iterator[tuple[_Source, Any, bool]]:
        """Yield (document, piece, whether it is the document's last)."""
        for source in self._open(counts):
            previous: Any = None
            for piece in source.pieces:
                if previous is not None:
                    yield source, previous, False
                previous = piece
            yield source, previous if previous is not None else "", True

    def _tokenised(
        self, pieces: Iterator[tuple[_Source, Any, bool]]
    ) -> Iterator[tuple[_Source, np.ndarray, np.ndarray | None, bool]]:
        batch: list[tuple[_Source, Any, bool]] = []
        num_chars = 0
        for item in pieces:
            batch.append(item)
            num_chars += len(item[1])
            if num_chars >= _BATCH_CHARS or len(batch) >= self.config.batch_pieces:
                yield from self._encode(batch)
                batch, num_chars = [], 0
        if batch:
            yield from self._encode(batch)

    def _encode(self, batch: list[tuple[_Source, Any, bool]]) -> Iterator[tuple[_Source, np.ndarray, np.ndarray | None, bool]]:
        is_chat = self.config.messages is not None
        texts = [self._render(source, piece) if is_chat else piece for source, piece, _ in batch]
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=self._mark_template,
            # "<s>" in somebody's text is three characters; only the chat template may write special tokens.
            split_special_tokens=not is_chat,
            verbose=False,
        )
        for index, (source, piece, is_last) in enumerate(batch):
            tokens = np.asarray(encoded["input_ids"][index], dtype=np.int64)
            template = _template_mask(texts[index], piece, encoded["offset_mapping"][index]) if self._mark_template else None
            if is_chat and len(tokens) and tokens[0] == self._tokenizer.bos_token_id:
                tokens, template = tokens[1:], None if template is None else template[1:]
            largest = int(tokens.max()) if len(tokens) else 0
            if largest >= self._num_embeddings:
                raise InputError(
                    f"the tokenizer gave token {largest} ({self._tokenizer.convert_ids_to_tokens(largest)!r}) and the subject "
                    f"has {self._num_embeddings} embeddings; tokenizer and weights do not belong together"
                )
            yield source, tokens.astype(np.uint32), template, is_last

    def _render(self, source: _Source, messages: Any) -> str:
        if isinstance(messages, str) and not messages:
            return ""
        where = f"row {source.row} of {self.config.source}: column {self.config.messages!r}"
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise InputError(f"{where} holds {type(messages).__name__}; expected a list of messages with 'role' and 'content'")
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise InputError(
                f"{where} cannot be rendered by the chat template ({type(error).__name__}: {error}); "
                "expected a list of messages with 'role' and 'content'"
            ) from error


class _Packer:
    """Cuts token streams into contexts."""

    def __init__(self, ctx_len: int, *, mix: bool) -> None:
        self._ctx_len, self._mix = ctx_len, mix
        self._next_document = 0
        self._is_open = False
        """Whether the current document already has an id: it gave tokens in an earlier piece."""
        self._parts: deque[np.ndarray] = deque()
        self._masks: deque[np.ndarray] = deque()
        self._num_waiting = 0
        self._segments: list[tuple[int, int]] = []
        self._documents: list[Document] = []

    def add(
        self, source: _Source, tokens: np.ndarray, mask: np.ndarray | None, *, is_last: bool, counts: CorpusCounts
    ) -> Iterator[Context]:
        """Take one piece of a document and yield the contexts that are full."""
        offset = 0
        while offset < len(tokens):
            if not self._is_open:
                self._is_open = True
                self._segments.append((self._next_document, self._num_waiting))
                self._documents.append(Document(document=self._next_document, source_row=source.row, columns=source.columns))
                counts.num_documents += 1
            elif not self._segments:
                self._segments.append((self._next_document, 0))
            stop = min(len(tokens), offset + self._ctx_len - self._num_waiting)
            self._parts.append(tokens[offset:stop])
            if mask is not None:
                self._masks.append(mask[offset:stop])
            self._num_waiting += stop - offset
            offset = stop
            if self._num_waiting == self._ctx_len:
                yield from self.flush()
        if not is_last:
            return
        if self._is_open:
            self._next_document += 1
            if not self._mix:
                yield from self.flush()
        else:
            counts.num_empty += 1
        self._is_open = False

    def flush(self) -> Iterator[Context]:
        """Yield what is waiting, if anything, as one context."""
        if self._num_waiting:
            yield Context(
                tokens=np.concatenate(list(self._parts)),
                segments=self._segments,
                is_template=np.concatenate(list(self._masks)) if self._masks else None,
                documents=self._documents,
            )
        self._parts.clear()
        self._masks.clear()
        self._num_waiting, self._segments, self._documents = 0, [], []


def check_tokenizer(tokenizer: Any, num_embeddings: int) -> None:
    """Check that the tokenizer's ordinary tokens all have an embedding.

    Added tokens beyond the table are allowed (some models ship them, for images say) until one occurs in the corpus.

    Raises: InputError when tokenizer and weights do not belong together.
    """
    added = set(tokenizer.get_added_vocab().values())
    largest = max((index for index in tokenizer.get_vocab().values() if index not in added), default=0)
    bos = tokenizer.bos_token_id
    largest = max(largest, bos or 0)
    if largest >= num_embeddings:
        raise InputError(
            f"the tokenizer has token ids up to {largest} and the subject has {num_embeddings} embeddings; "
            "tokenizer and weights do not belong together"
        )


def _template_mask(text: str, messages: Any, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return which tokens overlap no message's content: what the chat template wrote."""
    is_content = np.zeros(len(text) + 1, dtype=bool)
    start = 0
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
        for candidate in (content or "", (content or "").strip()):
            found = text.find(candidate, start) if candidate else -1
            if found >= 0:
                start = found + len(candidate)
                is_content[found:start] = True
                break
    return np.array([not is_content[first:last].any() for first, last in offsets], dtype=bool)


# Sources ----------------------------------------------------------------------------------------------------------


class _Opener:
    """Calling it starts over from the first document."""

    def __init__(self, function: Any, *args: Any) -> None:
        self._function, self._args = function, args

    def __call__(self, counts: CorpusCounts) -> Iterator[_Source]:
        documents: Iterator[_Source] = self._function(*self._args, counts)
        return documents


def _opener(config: CorpusConfig) -> _Opener:
    """Return how to read the source.

    Raises: InputError when a local source does not exist or does not fit the options.
    """
    if config.source == "stdlib":
        _refuse_columns(config, "stdlib")
        return _Opener(_text_files, stdlib_root(), _stdlib_files)
    path = Path(config.source).expanduser()
    if path.is_file():
        return _files_opener(config, path.parent, [path], path.suffix.lower())
    if path.is_dir():
        names = sorted(item for item in path.rglob("*") if item.is_file() and not _is_hidden(item.relative_to(path)))
        for suffix in (".parquet", ".jsonl"):
            chosen = [item for item in names if item.suffix.lower() == suffix]
            if chosen:
                return _files_opener(config, path, chosen, suffix)
        if not names:
            raise InputError(f"the corpus folder {path} holds no files; expected .parquet, .jsonl or text files")
        return _files_opener(config, path, names, ".txt")
    if (
        config.source.startswith((".", "/", "~"))
        or config.source.count("/") > 1
        or path.suffix in (".parquet", ".jsonl", ".txt")
    ):
        raise InputError(f"no corpus at {config.source}: no such file or folder")
    return _Opener(_rows, config, _hub_rows, ())


@cache
def _stdlib_files() -> tuple[Path, ...]:
    return tuple(stdlib_files())


def _files_opener(config: CorpusConfig, root: Path, paths: list[Path], suffix: str) -> _Opener:
    if suffix == ".parquet":
        return _Opener(_rows, config, _parquet_rows, paths)
    if suffix == ".jsonl":
        return _Opener(_rows, config, _jsonl_rows, paths)
    _refuse_columns(config, "a text file")
    return _Opener(_text_files, root, lambda: paths)


def _refuse_columns(config: CorpusConfig, what: str) -> None:
    if config.messages is not None or config.keep_columns:
        option = "--messages" if config.messages is not None else "--keep-columns"
        raise ConfigError(f"{option} names a column, and the corpus {config.source} is {what}, which has none")


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _text_files(root: Path, paths: Any, counts: CorpusCounts) -> Iterator[_Source]:
    for row, path in enumerate(paths()):
        name = path.relative_to(root).as_posix().encode("utf-8", "replace").decode()
        if path.stat().st_size <= _BLOCK_BYTES:
            try:
                yield _Source(row=row, columns={"path": name}, pieces=(path.read_bytes().decode("utf-8"),))
            except UnicodeDecodeError:
                counts.num_undecodable += 1
        elif _decodes(path):
            yield _Source(row=row, columns={"path": name}, pieces=_blocks(path))
        else:
            counts.num_undecodable += 1


def _decodes(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _blocks(path: Path) -> Iterator[str]:
    """Yield a long file in blocks that end at a line break where there is one."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    kept = ""
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            kept += decoder.decode(block)
            cut = kept.rfind("\n") + 1 or (len(kept) if len(kept) > _BLOCK_BYTES else 0)
            if cut:
                yield kept[:cut]
                kept = kept[cut:]
    if kept:
        yield kept


def _rows(config: CorpusConfig, read: Any, paths: Any, counts: CorpusCounts) -> Iterator[_Source]:
    """Turn the rows of a table into documents."""
    column = config.messages or config.text_column
    wanted = list(dict.fromkeys([column, *config.keep_columns]))
    for row, values in enumerate(read(config, wanted, paths, counts)):
        if values is None:
            counts.num_undecodable += 1
            continue
        missing = [name for name in wanted if name not in values]
        if missing:
            raise InputError(f"the corpus {config.source} has no column {missing[0]!r}; {nearest(missing[0], values)}")
        content = values[column]
        pieces: Iterable[Any]
        if config.messages is not None:
            messages = _messages(content)
            pieces = (messages,) if messages else ()
        elif content is None or isinstance(content, str):
            pieces = _cut(content or "")
        else:
            raise InputError(
                f"row {row} of {config.source}: column {column!r} holds {type(content).__name__}; expected text "
                "(for chat messages use --messages)"
            )
        yield _Source(row=row, columns={name: values[name] for name in config.keep_columns}, pieces=pieces)


def _messages(content: Any) -> Any:
    """Return chat messages given as a list, or as a list in JSON."""
    if isinstance(content, str):
        try:
            return json.loads(content)
        except json.JSONDecodeError:
            return [{"role": "user", "content": content}]
    return content


def _cut(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _BLOCK_BYTES:
        cut = text.rfind("\n", start, start + _BLOCK_BYTES) + 1 or start + _BLOCK_BYTES
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def _parquet_rows(
    config: CorpusConfig, wanted: list[str], paths: list[Path], _counts: CorpusCounts
) -> Iterator[dict[str, Any] | None]:
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                names = file.schema_arrow.names
                missing = [name for name in wanted if name not in names]
                if missing:
                    raise InputError(f"the corpus {path} has no column {missing[0]!r}; {nearest(missing[0], names)}")
                for batch in file.iter_batches(batch_size=256, columns=wanted):
                    yield from batch.to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"the corpus {path} cannot be read as parquet ({error}); it is damaged or truncated") from error


def _jsonl_rows(
    _config: CorpusConfig, _wanted: list[str], paths: list[Path], _counts: CorpusCounts
) -> Iterator[dict[str, Any] | None]:
    for path in paths:
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    try:
                        value = orjson.loads(line)
                    except orjson.JSONDecodeError:
                        value = None
                    yield value if isinstance(value, dict) else None


def _hub_rows(config: CorpusConfig, _wanted: list[str], _paths: Any, _counts: CorpusCounts) -> Iterator[dict[str, Any] | None]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(config.source, config.subset, split=config.split, revision=config.revision, streaming=True)
        for row in dataset:
            yield dict(row)
    except (OSError, ValueError, RuntimeError) as error:
        first = " ".join(str(error).strip().split("\n")[0].split())[:300]
        raise InputError(
            f"no corpus {config.source}: no such file or folder here, and the hub did not give the data set ({first}); "
            "check the name, the split and the connection"
        ) from error
