"""Selection reads a store on disk as it reads the one held in memory by the unit tests."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from autointerp.examples.partners import shuffled_partners
from autointerp.examples.render import above, highlight, plain
from autointerp.examples.selection import SelectionConfig, Selector
from autointerp.records import Examples
from autointerp.store import CoderRecord, Document, Identity, StoreWriter, open_store, write_vocabulary

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from examples_corpus import MemoryStore

CTX_LEN = 48
WORDS = [f"w{i}".encode() for i in range(390)] + [
    b" ",
    b"\n",
    b"7",
    b" 12",
    b"<|user|>",
    b"\xe2\x82",
    b"\xac",
    b"<<",
    b">>",
    b"s",
]


def make(is_packed: bool) -> MemoryStore:
    rng = np.random.default_rng(int(is_packed))
    documents: list[list[int]] = []
    for _ in range(150):
        repeat = documents and rng.random() < 0.2
        documents.append(documents[-1] if repeat else rng.integers(0, len(WORDS), rng.integers(1, 120)).tolist())
    memory = MemoryStore(documents, ctx_len=CTX_LEN, is_packed=is_packed)
    is_token = np.concatenate([np.arange(a, b) for a, b in zip(memory.segments.start, memory.segments.stop, strict=True)])
    latents = []
    for rate in (0.0, 0.0005, 0.005, 0.02, 0.02, 0.3, 1.0):
        fires = is_token[rng.random(len(is_token)) < rate]
        latents.append({int(p): float(np.float16(rng.exponential() + 0.01)) for p in fires})
    return memory.add("sae", latents)


def write(memory: MemoryStore, path: Path) -> None:
    segments = memory.segments
    contexts, spans = [], []
    for context in range(len(memory.tokens) // CTX_LEN):
        rows = np.flatnonzero(segments.start // CTX_LEN == context)
        contexts.append(memory.tokens[context * CTX_LEN : segments.stop[rows[-1]]])
        spans.append([(int(segments.document[row]), int(segments.start[row]) - context * CTX_LEN) for row in rows])
    coder = CoderRecord(digest="sha256:coder", width=7, hookpoints=("model.layers.1@out",), activation="topk", k=4)
    identity = Identity(ctx_len=CTX_LEN, subject_digest="sha256:subject", packing="fill")
    with StoreWriter.create_or_resume(path, identity=identity, coders={"sae": coder}) as writer:
        write_vocabulary(path / "tokenizer", WORDS, [False] * len(WORDS))
        documents = [Document(document=d, source_row=d) for d in np.unique(segments.document).tolist()]
        writer.add_contexts(contexts, spans, documents=documents)
        for latent in range(7):
            positions, values = memory.coder("sae").activations(latent)
            writer.add_activations("sae", np.full(len(positions), latent), positions, values)
        writer.close_run()
        writer.finish()


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("centred", [False, True])
def test_a_stored_corpus_gives_the_examples_of_the_one_in_memory(tmp_path, is_packed, centred):
    memory = make(is_packed)
    write(memory, tmp_path / "store")
    store = open_store(tmp_path / "store")
    config = SelectionConfig(window=16, centred=centred, negatives=("random", "same_token"))
    memory.vocabulary = store.vocabulary
    stored, held = Selector(store, config), Selector(memory, config)
    statuses = []
    for latent in range(7):
        one, other = stored.select("sae", latent), held.select("sae", latent)
        statuses.append(one.status)
        for field in fields(Examples):
            for block in ("explain", "explain_statistics", "explain_negatives", "positives", "negatives"):
                left, right = getattr(getattr(one, block), field.name), getattr(getattr(other, block), field.name)
                np.testing.assert_array_equal(left, right)
        assert one.density == pytest.approx(other.density)
        assert (one.status, one.disjoint, one.max_activation) == (other.status, other.disjoint, other.max_activation)
        for tokens, length, mask in zip(one.positives.tokens, one.positives.lengths, above_of(one.positives), strict=True):
            text = highlight(store.vocabulary, tokens[:length], mask[:length])
            assert text.count("<<") == text.count(">>") > 0
            assert "<|user|>" not in text
            assert "<<" not in plain(store.vocabulary, tokens[:length])
    assert statuses == ["too_few_examples"] * 2 + ["ok"] * 3 + [statuses[5], "too_dense"]
    assert one.selection_id != other.selection_id
    partner = shuffled_partners(store, "sae", 0)
    # The last two differ in rate from the rest; the first two fire too rarely to take part.
    assert partner[[0, 1]].tolist() == [-1, -1]
    assert partner[5:].tolist() == [6, 5]
    assert sorted(partner[2:5]) == [2, 3, 4]


def above_of(block: Examples) -> np.ndarray:
    return above(block.activations, block.lengths)
