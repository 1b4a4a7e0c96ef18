"""``tables``: what lies beside a coder's activations, computed where it is missing: neighbours, statistics, logits, embeddings.

Each table is committed whole, embeddings block by block; what is there and belongs to the coder is left alone. Also what a
stage calls before it chooses negatives: the tables that these walk are made on the spot.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from autointerp.config import RUNTIME, Config
from autointerp.errors import IdentityError, InputError, StoreError
from autointerp.examples.negatives import NEGATIVES
from autointerp.examples.selection import SelectionConfig
from autointerp.examples.windows import BYTES_PER_POSITION, open_grid
from autointerp.jobs.progress import OnProgress, Progress
from autointerp.protocols import Embedder
from autointerp.records import NeighbourKind
from autointerp.store import open_store
from autointerp.store.arrays import give_back_memory
from autointerp.store.embeddings import EmbeddingIndex, IndexRecord, build_index, index_folder
from autointerp.store.logits import TokenLogits, has_logits, write_logits
from autointerp.store.neighbours import DEFAULT_K
from autointerp.store.reader import Store
from autointerp.store.statistics import has_statistics, write_statistics
from autointerp.store.tables import build_cooccurrence, build_cosine

if TYPE_CHECKING:  # torch is imported only by what reads weights
    from autointerp.coders.coder import Coder
    from autointerp.subject.model import Subject

logger = logging.getLogger("autointerp.jobs")

Show = bool | OnProgress | None
"""As in :class:`autointerp.jobs.progress.Progress`."""
_GRID = SelectionConfig()


class TablesConfig(Config):
    """What `tables` computes; nothing named = neighbours by co-firing and statistics."""

    store: Path
    """The store's folder."""
    coders: tuple[str, ...] = ()
    """``NAME`` or ``NAME=SOURCE`` where the weights have moved; none = all coders."""
    neighbours: tuple[NeighbourKind, ...] = ()
    """Kinds of neighbours."""
    k: int = Field(default=DEFAULT_K, ge=1, le=65536)
    """Neighbours kept of each latent."""
    statistics: bool = False
    """Histograms, tokens and places of each latent."""
    subject: str | None = None
    """Folder or hub id of the store's subject: with it the tokens that each latent promotes and suppresses."""
    revision: str | None = None
    """Revision of the subject."""
    embedder: str | None = None
    """Embedder of the store's windows, such as ``all-MiniLM-L6-v2``."""
    window: int = Field(default=_GRID.window, ge=4, le=4096)
    """Tokens of a window to embed; as in the selection that draws negatives."""
    min_window: int = Field(default=_GRID.min_window, ge=1)
    """Fewest tokens of the last window of a document."""
    device: str = Field(default="auto", json_schema_extra=RUNTIME)
    """Where subject and embedder run."""


def build_tables(config: TablesConfig, *, progress: Show = None) -> Iterator[str]:
    """Compute what is wanted and missing, one table after the other; yield a sentence on each.

    Raises: InputError when there is no such coder, or its weights, the subject or the embedder are not there; IdentityError
    when they are not those of the store.
    """
    store = open_store(config.store)
    weights = dict(_named(text) for text in config.coders)
    for name in weights:
        store.coder(name)
    coders = [name for name in store.coder_names if not weights or name in weights]
    anything = config.neighbours or config.statistics or config.subject or config.embedder
    kinds: tuple[NeighbourKind, ...] = config.neighbours if anything else ("cooccurrence",)
    subject: Subject | None = None
    if config.subject is not None:
        from autointerp.subject.model import load_subject

        subject = load_subject(config.subject, revision=config.revision, device=config.device)
        check_subject(store, subject)
    # The weights of controls are kept nowhere: what needs them is for the others, unless one is named.
    weighty = [coder for coder in coders if coder in weights or store.coder(coder).record.control_of is None]
    for coder in coders:
        for kind in kinds:
            if kind == "cooccurrence" or coder in weighty:
                made = build_neighbours(
                    store, coder, kind, k=config.k, weights=weights.get(coder), subject=subject, progress=progress
                )
                yield _line(made, f"neighbours by {kind} of {coder}")
        if config.statistics or not anything:
            yield _line(build_statistics(store, coder, progress=progress), f"statistics of {coder}")
    for coder in weighty if subject is not None else ():
        if made := not has_logits(store, coder):
            assert subject is not None
            build_logits(store, coder, subject, weights=weights.get(coder), progress=progress)
        yield _line(made, f"logits of {coder}")
    if config.embedder is not None:
        made = build_embeddings(
            store,
            config.embedder,
            window=config.window,
            min_window=config.min_window,
            device=None if config.device == "auto" else config.device,
            progress=progress,
        )
        yield _line(made, f"embeddings by {config.embedder}")


def _named(text: str) -> tuple[str, str | None]:
    name, _, source = text.partition("=")
    return name, source or None


def _line(made: bool, what: str) -> str:
    return f"{what}: {'computed' if made else 'there already'}"


def build_windows(store: Store, *, memory_budget_bytes: int) -> None:
    """Cut the corpus into the windows that explain and score use by default, so that their first latent need not wait.

    Not where the arrays exceed the budget, or the store is too small to keep them: these stages make them themselves.
    """
    if store.keeps_derived and store.num_positions * BYTES_PER_POSITION <= memory_budget_bytes:
        give_back_memory()
        open_grid(store, window=_GRID.window, min_window=_GRID.min_window)


def build_neighbours(
    store: Store,
    coder: str,
    kind: NeighbourKind,
    *,
    k: int = DEFAULT_K,
    weights: str | None = None,
    subject: Subject | None = None,
    progress: Show = None,
) -> bool:
    """Compute a table of neighbours unless one with at least `k` is there; return whether it was computed.

    `weights` says where the coder's files are, by default where they were when the store was made; neurons need the `subject`.

    Raises: InputError when they are not there; IdentityError when they are not the coder's.
    """
    reader = store.coder(coder)
    try:
        if reader.neighbours(kind).k >= k:
            return False
    except StoreError as error:  # none, or one of another coder or corpus: either is replaced
        logger.debug("%s", error)
    if kind == "cooccurrence":
        _shown(
            f"neighbours of {coder}", reader.width, progress, lambda step: build_cooccurrence(store, coder, k=k, advance=step)
        )
        return True
    loaded = coder_weights(store, coder, weights, subject=subject)
    rows = (loaded.decoder_rows() if kind == "decoder" else loaded.encoder_rows()).numpy()
    _shown(
        f"neighbours of {coder}", reader.width, progress, lambda step: build_cosine(store, coder, kind, rows, k=k, advance=step)
    )
    return True


def build_statistics(store: Store, coder: str, *, progress: Show = None) -> bool:
    """Compute the statistics of a coder's latents unless they are there; return whether they were computed."""
    if has_statistics(store, coder):
        return False
    width = store.coder(coder).width
    _shown(f"statistics of {coder}", width, progress, lambda step: write_statistics(store, coder, advance=step))
    return True


def build_logits(store: Store, coder: str, subject: Subject, *, weights: str | None = None, progress: Show = None) -> None:
    """Compute the tokens that a coder's latents promote and suppress.

    Raises: IdentityError when the subject is not the store's; InputError when the coder does not write to the residual stream.
    """
    from autointerp.subject.logits import token_logits

    check_subject(store, subject)
    record = store.coder(coder).record
    loaded = coder_weights(store, coder, weights, subject=subject)
    written_to = record.target or record.hookpoints[0]
    is_token = np.array([bool(store.vocabulary.text(np.array([token]))) for token in range(len(store.vocabulary))])

    def compute(step: Callable[[int], None]) -> None:
        def counted() -> Iterator[TokenLogits]:
            for block in token_logits(subject, loaded.decoder_rows(), written_to=written_to, is_token=is_token):
                yield block
                step(len(block.promoted))

        write_logits(store, coder, counted())

    _shown(f"logits of {coder}", loaded.spec.width, progress, compute)


def check_subject(store: Store, subject: Subject) -> None:
    """Check that a subject is the one a store was made with.

    Raises: IdentityError when its weights are others.
    """
    if subject.weights_digest != store.manifest.identity.subject_digest:
        raise IdentityError(
            f"subject {subject.name} has the weights {subject.weights_digest} and {store.path} was recorded with "
            f"{store.manifest.identity.subject_digest}; name the subject it was recorded with"
        )


def build_embeddings(
    store: Store,
    embedder: str,
    *,
    window: int = _GRID.window,
    min_window: int = _GRID.min_window,
    opened: Embedder | None = None,
    device: str | None = None,
    progress: Show = None,
) -> bool:
    """Embed the windows of a store unless that was done; return whether it was. A killed run is gone on with.

    Raises: InputError or ResourceError when the embedder cannot be opened.
    """
    path = store.path / index_folder(embedder, window=window, min_window=min_window)
    if (path / "index.json").exists():
        EmbeddingIndex(path, store_id=store.store_id)
        return False
    if opened is None:
        from autointerp.embed import open_embedder

        opened = open_embedder(embedder, device=device)
    grid = open_grid(store, window=window, min_window=min_window)
    record = IndexRecord(
        store_id=store.store_id,
        embedder=embedder,
        embedder_id=opened.id,
        window=window,
        min_window=min_window,
        num_windows=len(grid),
        dim=opened.embed(["a"]).shape[1],
    )
    model, tokens, vocabulary = opened, store.tokens, store.vocabulary

    def embed(low: int, high: int) -> np.ndarray:
        spans = zip(grid.start[low:high].tolist(), grid.length[low:high].tolist(), strict=True)
        return model.embed([vocabulary.text(tokens[start : start + length]) for start, length in spans])

    show = Progress(f"embeddings of {store.path.name}", progress, unit="window")
    show.start(len(grid))
    try:
        return build_index(path, record, embed, advance=lambda count, is_new: show.advance(count, is_new=is_new))
    finally:
        show.close()


def _shown(what: str, total: int, progress: Show, work: Callable[[Callable[[int], None]], None]) -> None:
    show = Progress(what, progress)
    show.start(total)
    try:
        work(lambda count: show.advance(count, is_new=True))
    finally:
        show.close()


def coder_weights(store: Store, coder: str, weights: str | None = None, *, subject: Subject | None = None) -> Coder:
    """Return a coder of the store with its weights, from `weights` or where they were when the store was made.

    Raises: InputError when they are not there, or are the subject's and there is none; IdentityError when they are not the
    coder's.
    """
    from autointerp.coders.load import load_coder
    from autointerp.subject.neurons import KIND, neurons

    record = store.coder(coder).record
    source = weights or record.source
    if record.control_of is not None:
        raise InputError(f"coder {coder!r} is a control, whose weights are kept nowhere; name the other coders with --coder")
    if source.startswith(f"{KIND}:"):
        if subject is None:
            raise InputError(
                f"coder {coder!r} has the weights of the subject's own neurons; "
                f"run `autointerp tables {store.path} --coder {coder} --neighbours decoder --subject MODEL` first"
            )
        loaded = neurons(subject, source)
    else:
        try:
            loaded = load_coder(source, hookpoint=record.hookpoints[0] if record.hookpoints else None)
        except InputError as error:
            raise InputError(
                f"the weights of coder {coder!r} are needed: {error}; "
                f"say where they are with `autointerp tables {store.path} --coder {coder}=SOURCE`"
            ) from error
    if loaded.spec.digest != record.digest:
        raise IdentityError(
            f"the coder at {source} has the digest {loaded.spec.digest} and coder {coder!r} of {store.path} was recorded with "
            f"{record.digest}; name the files it was recorded with as --coder {coder}=SOURCE"
        )
    return loaded


def ensure_negatives(store: Store, coder: str, selection: SelectionConfig) -> None:
    """Compute the tables that a selection's sources of negatives walk, where they are missing.

    Raises: StoreError when the store's windows are not embedded, with the command that does it: that takes long enough to be
    asked for.
    """
    for name in selection.negatives:
        source = NEGATIVES[name]
        if source.kind is not None and build_neighbours(store, coder, source.kind):
            logger.info("%s: computed the neighbours by %s of coder %s for negatives", store.path, source.kind, coder)
        if source.needs_embeddings:
            store.embeddings(selection.embedder, window=selection.window, min_window=selection.min_window)
