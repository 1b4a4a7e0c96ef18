"""The store: where each latent of any number of coders fires on one corpus.

Writing, in a loop that may be killed anywhere and started again with the same corpus::

    with StoreWriter.create_or_resume(path, identity=identity, coders={"sae": record}, memory_budget_bytes=1 << 30) as writer:
        if not writer.has_tokenizer:  # files of the tokenizer first, the vocabulary last
            write_vocabulary(path / "tokenizer", token_bytes, is_special)
        while not writer.has_all_runs and (batch := corpus.take(min(batch_size, writer.room))):
            first = writer.add_contexts([c.tokens for c in batch], [c.segments for c in batch], documents=batch.documents)
            if not writer.is_committed:  # else the contexts are stored already and were only compared
                for name in writer.coder_names:
                    writer.add_activations(name, *encode(batch, first_position=first * ctx_len))  # latents, positions, values
            if not writer.room:
                writer.close_run()
        writer.finish()

Called with coders that a finished store lacks, the same loop adds those; with `is_growing` and a corpus that goes on, it
records the new contexts; with a `worker` it records that worker's runs, and leaves `finish` to a call without one. Reading::

    store = open_store(path)
    positions, values = store.coder("sae").activations(17)  # by offset, a millisecond
    store.vocabulary.text(store.tokens[positions[0] - 8 : positions[0] + 1])
"""

from autointerp.store.corpus import Document
from autointerp.store.disk import DiskPlan, check_disk, plan_disk
from autointerp.store.latents import minhash_similarity
from autointerp.store.manifest import (
    CoderExtent,
    CoderRecord,
    Extent,
    Identity,
    Manifest,
    check_coder_identity,
    check_identity,
    read_manifest,
)
from autointerp.store.neighbours import NeighbourTable
from autointerp.store.reader import CoderReader, SegmentTable, Store, open_store
from autointerp.store.verify import verify_store
from autointerp.store.vocab import StoreVocabulary, write_vocabulary
from autointerp.store.writer import StoreWriter

__all__ = [
    "CoderExtent",
    "CoderReader",
    "CoderRecord",
    "DiskPlan",
    "Document",
    "Extent",
    "Identity",
    "Manifest",
    "NeighbourTable",
    "SegmentTable",
    "Store",
    "StoreVocabulary",
    "StoreWriter",
    "check_coder_identity",
    "check_disk",
    "check_identity",
    "minhash_similarity",
    "open_store",
    "plan_disk",
    "read_manifest",
    "verify_store",
    "write_vocabulary",
]
