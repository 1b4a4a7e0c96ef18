"""Builds the tables beside a coder's activations, where they are not there yet: neighbours, statistics, logits, embeddings.

Also what a stage calls before it chooses negatives: those that need neither the hub nor an extra are then made on the spot.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from autointerp.coders.coder import Coder
from autointerp.coders.load import load_coder
from autointerp.errors import IdentityError, InputError, StoreError
from autointerp.examples.negatives import NEGATIVES
from autointerp.jobs.progress import OnProgress, Progress
from autointerp.records import NeighbourKind
from autointerp.store.neighbours import DEFAULT_K
from autointerp.store.reader import Store
from autointerp.store.tables import build_cooccurrence, build_cosine

logger = logging.getLogger("autointerp.jobs")


def build_neighbours(
    store: Store,
    coder: str,
    kind: NeighbourKind,
    *,
    k: int = DEFAULT_K,
    weights: str | None = None,
    progress: bool | OnProgress | None = None,
) -> bool:
    """Compute a table of neighbours unless it is there; return whether it was computed.

    `weights` says where the coder's files are, by default where they were when the store was made.

    Raises: InputError when they are not there; IdentityError when they are not the coder's.
    """
    reader = store.coder(coder)
    try:
        if reader.neighbours(kind).k == k:
            return False
    except StoreError:  # none, or one of another coder or corpus: either is replaced
        logger.debug("no usable neighbours by %s of %s", kind, coder)
    rows = None if kind == "cooccurrence" else coder_weights(store, coder, weights)
    show = Progress(f"neighbours by {kind} of {coder}", progress)
    show.start(reader.width)
    try:
        if rows is None:
            build_cooccurrence(store, coder, k=k, advance=lambda count: show.advance(count, is_new=True))
        else:
            matrix = rows.decoder_rows() if kind == "decoder" else rows.encoder_rows()
            build_cosine(store, coder, kind, matrix.numpy(), k=k, advance=lambda count: show.advance(count, is_new=True))
    finally:
        show.close()
    return True


def coder_weights(store: Store, coder: str, weights: str | None = None) -> Coder:
    """Return a coder of the store with its weights, from `weights` or where they were when the store was made.

    Raises: InputError when they are not there; IdentityError when they are not the coder's.
    """
    record = store.coder(coder).record
    source = weights or record.source
    try:
        loaded = load_coder(source, hookpoint=record.hookpoints[0] if record.hookpoints else None)
    except InputError as error:
        raise type(error)(
            f"the weights of coder {coder!r} are needed: {error}; say where they are with --coder {coder}=SOURCE"
        ) from None
    if loaded.spec.digest != record.digest:
        raise IdentityError(
            f"the coder at {source} has the digest {loaded.spec.digest} and coder {coder!r} of {store.path} was recorded with "
            f"{record.digest}; name the files it was recorded with as --coder {coder}=SOURCE"
        )
    return loaded


def ensure_negatives(store: Store, coder: str, negatives: Iterable[str], *, weights: Mapping[str, str] | None = None) -> None:
    """Compute the tables of neighbours that these sources of negatives walk, where they are missing."""
    for name in negatives:
        kind = NEGATIVES[name].kind
        if kind is not None and build_neighbours(store, coder, kind, weights=(weights or {}).get(coder)):
            logger.info("%s: computed the neighbours by %s of coder %s for negatives", store.path, kind, coder)
