"""A store gives back what went in, whatever the runs, parts and row groups."""

import errno
import os
import re
import socket
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from autointerp.errors import ConfigError, IdentityError, InputError, ResourceError, StoreError
from autointerp.store import (
    CoderRecord,
    DiskPlan,
    Document,
    Identity,
    StoreWriter,
    check_disk,
    check_identity,
    minhash_similarity,
    open_store,
    plan_disk,
    verify_store,
    write_vocabulary,
)
from autointerp.store.latents import summarise, summarise_stream
from autointerp.store.merge import cut
from autointerp.store.runs import SortedRows
from autointerp.worker import Worker

CTX_LEN = 16
IDENTITY = Identity(ctx_len=CTX_LEN, subject_digest="sha256:subject", packing="fill")


def record(width, digest="sha256:coder", **rest):
    return CoderRecord(digest=digest, width=width, hookpoints=("model.layers.1@out",), activation="topk", k=4, **rest)


CODERS = {"wide": record(300), "signed@in": record(7, "sha256:signed"), "empty": record(5, "sha256:empty")}


class Corpus:
    """Random contexts, some short, documents that span contexts, and activations as dicts."""

    def __init__(self, num_contexts, seed=0, values="plain"):
        rng = np.random.default_rng(seed)
        self.tokens, self.segments, self.documents = [], [], []
        document = -1
        for context in range(num_contexts):
            length = CTX_LEN if rng.random() < 0.8 else int(rng.integers(1, CTX_LEN + 1))
            self.tokens.append(rng.integers(0, 1000, length).astype(np.uint32))
            starts = sorted({0, *rng.integers(0, length, 2).tolist()})
            segments = []
            for start in starts:
                if document < 0 or start or rng.random() < 0.5:
                    document += 1
                    self.documents.append(
                        (context, Document(document=document, source_row=document * 2, columns={"n": document}))
                    )
                segments.append((document, start))
            self.segments.append(segments)
        self.by_latent = {}
        self.activations = {"wide": {}, "signed@in": {}, "empty": {}}
        for context, tokens in enumerate(self.tokens):
            for offset in range(len(tokens)):
                position = context * CTX_LEN + offset
                for latent in {3, *rng.integers(0, 299, 4).tolist()} - {5}:
                    self.activations["wide"][latent, position] = float(np.float16(rng.random() + 0.01))
                for latent in set(rng.integers(0, 7, 2).tolist()):
                    self.activations["signed@in"][latent, position] = round(rng.normal() * 64) / 64 or 1.0
        if values == "extreme":
            keys = list(self.activations["wide"])
            for key, value in zip(keys[::97], [1e-8, 1e5, -7e4, 3e-5] * len(keys), strict=False):
                self.activations["wide"][key] = float(np.float32(value))

    def feed(self, writer, *, batch=3, stop=None, seed=0):
        """Run the caching loop; leave after `stop` contexts without closing anything."""
        by_context = {}
        for coder, entries in self.activations.items():
            for (latent, position), value in entries.items():
                by_context.setdefault(position // CTX_LEN, []).append((coder, latent, position, value))
        rng = np.random.default_rng(seed)
        at = 0
        while at < len(self.tokens) and not writer.has_all_runs and (stop is None or at < stop):
            until = min(at + min(batch, writer.room), len(self.tokens) if stop is None else stop)
            documents = [row for context, row in self.documents if at <= context < until]
            first = writer.add_contexts(self.tokens[at:until], self.segments[at:until], documents=documents)
            assert first == at
            rows = [row for context in range(at, until) for row in by_context.get(context, [])]
            for coder in writer.coder_names:
                mine = [row for row in rows if row[0] == coder]
                rng.shuffle(mine)
                columns = list(zip(*mine, strict=True)) or [(), (), (), ()]
                writer.add_activations(
                    coder,
                    np.array(columns[1], np.uint32),
                    np.array(columns[2], np.int64),
                    np.array(columns[3], np.float32),
                )
            if not writer.room:
                writer.close_run()
            at = until


def build(path, corpus, coders=CODERS, *, identity=IDENTITY, stop=None, **options):
    options = {"contexts_per_run": 5, "row_group_rows": 64, "part_rows": 1500, "document_columns": {"n": "int64"}} | options
    with StoreWriter.create_or_resume(path, identity=identity, coders=coders, **options) as writer:
        if not writer.has_all_runs:
            write_vocabulary(path / "tokenizer", [b"a", b"b"], [False, True])
        corpus.feed(writer, stop=stop)
        if stop is None:
            writer.finish()
    return open_store(path) if stop is None else None


def expected(corpus, coder, latent):
    if not corpus.by_latent:
        for name, entries in corpus.activations.items():
            for (index, position), value in sorted(entries.items()):
                positions, values = corpus.by_latent.setdefault((name, index), ([], []))
                positions.append(position)
                values.append(value)
    return corpus.by_latent.get((coder, latent), ([], []))


def check(store, corpus):
    for coder in CODERS:
        reader = store.coder(coder)
        columns = reader.latents
        for latent in range(CODERS[coder].width):
            positions, values = expected(corpus, coder, latent)
            found = reader.activations(latent)
            assert found[0].tolist() == positions and found[0].dtype == np.int64
            assert found[1].tolist() == values and found[1].dtype == np.float32
            assert columns["count"][latent] == len(positions)
            assert columns["num_contexts"][latent] == len({position // CTX_LEN for position in positions})
            assert columns["density"][latent] == len(positions) / store.num_tokens
            if positions:
                ranked = sorted(values)
                assert columns["max"][latent] == ranked[-1] and columns["min"][latent] == ranked[0]
                assert columns["mean"][latent] == pytest.approx(np.mean(values), rel=1e-5, abs=1e-6)
                for name, q in {"q10": 0.1, "q50": 0.5, "q99": 0.99}.items():
                    assert columns[name][latent] == ranked[int(np.floor(q * (len(ranked) - 1)))]
            else:
                assert columns["part"][latent] == -1 and np.isnan(columns["max"][latent])
        swept = list(reader.sweep())
        assert [latent for latent, *_ in swept] == np.flatnonzero(columns["count"]).tolist()
        for latent, positions, values in swept:
            assert (positions.tolist(), values.tolist()) == expected(corpus, coder, latent)


def writer_at(path, coders, **options):
    return StoreWriter.create_or_resume(path, identity=IDENTITY, coders=coders, **({"contexts_per_run": 5} | options))


def add_context(writer, *, length=CTX_LEN):
    document = Document(document=0, source_row=0)
    return writer.add_contexts([np.arange(length, dtype=np.uint32)], [[(0, 0)]], documents=[document])


def tree(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("num_contexts", [1, 5, 43])
def test_equal_to_a_dict(tmp_path, num_contexts):
    corpus = Corpus(num_contexts)
    store = build(tmp_path / "store", corpus)
    check(store, corpus)
    assert store.coder_names == sorted(CODERS) and store.num_contexts == num_contexts
    tokens = store.tokens.reshape(num_contexts, CTX_LEN)
    for context, ids in enumerate(corpus.tokens):
        assert tokens[context, : len(ids)].tolist() == ids.tolist() and not tokens[context, len(ids) :].any()
        assert store.context_lengths[context] == len(ids)
    flat = []
    for context, (ids, segments) in enumerate(zip(corpus.tokens, corpus.segments, strict=True)):
        ends = [start for _, start in segments[1:]] + [len(ids)]
        flat += [(d, context * CTX_LEN + a, context * CTX_LEN + b) for (d, a), b in zip(segments, ends, strict=True)]
    table = store.segments
    assert list(zip(table.document.tolist(), table.start.tolist(), table.stop.tolist(), strict=True)) == flat
    documents = store.documents().to_pydict()
    assert documents["document"] == [row.document for _, row in corpus.documents]
    assert documents["n"] == documents["document"]
    assert not (tmp_path / "store" / "building").exists()


def test_budget_small_enough_to_spill_within_runs(tmp_path):
    """Sub-files of one run, and a latent too large for a range of the merge."""
    corpus = Corpus(90)
    large = build(tmp_path / "large", corpus, contexts_per_run=9, row_group_rows=700, part_rows=3000)
    small = build(tmp_path / "small", corpus, contexts_per_run=80, memory_budget_bytes=1, row_group_rows=700, part_rows=3000)
    check(small, corpus)
    for coder in CODERS:
        for name, column in large.coder(coder).latents.items():
            # The mean of a streamed latent may differ in its last bit.
            np.testing.assert_allclose(small.coder(coder).latents[name], column, rtol=1e-6 if name == "mean" else 0)
    assert small.store_id == large.store_id and small.coder("wide").coder_id == large.coder("wide").coder_id
    parts = sorted((tmp_path / "large" / "coders").rglob("part-*.parquet"))
    for part in parts:
        assert part.read_bytes() == (tmp_path / "small" / part.relative_to(tmp_path / "large")).read_bytes()
    assert len(parts) > 3


def test_dtype_keeps_every_value_apart_from_zero_and_infinity(tmp_path):
    corpus = Corpus(20, values="extreme")
    store = build(tmp_path / "store", corpus)
    extents = store.manifest.extent.coders
    assert extents["wide"].dtype == "float32" and extents["signed@in"].dtype == "float16"
    for latent in range(300):
        positions, values = expected(corpus, "wide", latent)
        found = store.coder("wide").activations(latent)
        assert found[0].tolist() == positions
        np.testing.assert_allclose(found[1], values, rtol=1e-6)
    assert verify_store(store.path) == []


def test_zeros_are_dropped_and_what_is_not_finite_is_refused(tmp_path):
    with writer_at(tmp_path / "store", {"wide": record(300)}) as writer:
        add_context(writer)
        writer.add_activations("wide", [1, 2], [0, 0], [0.0, 1.0])
        with pytest.raises(InputError, match=r"'wide' gave the activation nan for latent 4"):
            writer.add_activations("wide", [3, 4], [0, 1], [1.0, np.nan])
        with pytest.raises(InputError, match=r"gave the activation inf"):
            writer.add_activations("wide", [3], [1], [np.inf])
        with pytest.raises(InputError, match=r"latents 300 to 300 .* has width 300"):
            writer.add_activations("wide", [300], [1], [1.0])
        with pytest.raises(InputError, match="position 16 is no token of the current run"):
            writer.add_activations("wide", [3], [16], [1.0])
        with pytest.raises(InputError, match="position -1 is no token"):
            writer.add_activations("wide", [3], [-1], [1.0])
        with pytest.raises(InputError, match="expected three arrays of one length"):
            writer.add_activations("wide", [3], [1, 2], [1.0])
        with pytest.raises(InputError, match="'other'; this store is made for wide"):
            writer.add_activations("other", [3], [1], [1.0])
        writer.finish()
    reader = open_store(tmp_path / "store").coder("wide")
    assert reader.activations(2)[0].tolist() == [0] and reader.num_activations == 1


def test_position_beyond_a_short_context_is_refused(tmp_path):
    with writer_at(tmp_path / "store", {"wide": record(300)}) as writer:
        add_context(writer, length=3)
        with pytest.raises(InputError, match="position 3 is no token"):
            writer.add_activations("wide", [3], [3], [1.0])


def test_two_values_at_one_place_are_refused(tmp_path):
    with writer_at(tmp_path / "store", {"wide": record(300)}) as writer:
        add_context(writer)
        writer.add_activations("wide", [3, 3], [1, 1], [1.0, 2.0])
        with pytest.raises(InputError, match="two activations of one latent at one position"):
            writer.close_run()


@pytest.mark.parametrize("tokens", [[], list(range(17)), [-1], [1.5]])
def test_contexts_that_cannot_be_stored(tmp_path, tokens):
    with writer_at(tmp_path / "store", CODERS) as writer, pytest.raises(InputError, match="cannot be stored"):
        writer.add_contexts([tokens], [[(0, 0)]])


@pytest.mark.parametrize("segments", [[], [(0, 1)], [(0, 0), (1, 0)], [(1, 0), (0, 2)], [(0, 0), (1, 4)]])
def test_segments_that_cannot_be_stored(tmp_path, segments):
    with writer_at(tmp_path / "store", CODERS) as writer, pytest.raises(InputError, match="of a context of 4 tokens"):
        writer.add_contexts([[1, 2, 3, 4]], [segments])


def test_documents_are_asked_for_and_typed(tmp_path):
    with writer_at(tmp_path / "a", CODERS) as writer:
        writer.add_contexts([[1]], [[(4, 0)]])
        with pytest.raises(InputError, match="document 4 is in a context and was not given"):
            writer.close_run()
    with writer_at(tmp_path / "b", CODERS, document_columns={"year": "int64"}) as writer:
        writer.add_contexts([[1]], [[(4, 0)]], documents=[Document(document=4, source_row=0, columns={"year": "x"})])
        with pytest.raises(InputError, match="'year' holds a value that is no int64"):
            writer.close_run()
    with writer_at(tmp_path / "c", CODERS, document_columns={"meta": "string"}) as writer:
        writer.add_contexts([[1]], [[(4, 0)]], documents=[Document(document=4, source_row=0, columns={"meta": {"a": 1}})])
        writer.finish()
    assert open_store(tmp_path / "c").documents()["meta"].to_pylist() == ['{"a":1}']
    with pytest.raises(ConfigError, match="cannot have type 'date'"):
        writer_at(tmp_path / "d", CODERS, document_columns={"day": "date"})


def test_an_empty_corpus_is_refused(tmp_path):
    with writer_at(tmp_path / "store", CODERS) as writer, pytest.raises(InputError, match="the corpus has no tokens"):
        writer.finish()


@pytest.mark.parametrize("names", [["a/b"], ["a=b"], [".a"], ["A", "a"], [""]])
def test_coder_names_that_cannot_be_folders(tmp_path, names):
    with pytest.raises(InputError, match=r"cannot be a folder name|differ in case only"):
        writer_at(tmp_path / "store", {name: record(3) for name in names})
    assert not (tmp_path / "store" / "building").exists()


def test_the_budget_decides_the_runs(tmp_path):
    with writer_at(tmp_path / "store", CODERS, contexts_per_run=None, memory_budget_bytes=1 << 20) as writer:
        assert writer.contexts_per_run == (1 << 20) // 64 // 12 // CTX_LEN  # three coders of k = 4
    with writer_at(tmp_path / "store", CODERS, contexts_per_run=None, memory_budget_bytes=1 << 30) as writer:
        assert writer.contexts_per_run == 85  # as it was begun


def test_resume_after_any_number_of_contexts(tmp_path):
    corpus = Corpus(23)
    whole = tree(build(tmp_path / "whole", corpus).path)
    for stop in (0, 1, 4, 5, 17, 23):
        path = tmp_path / f"stopped-{stop}"
        assert build(path, corpus, stop=stop) is None
        with pytest.raises(StoreError, match=rf"is not finished \({stop // 5} runs are there\); run the same"):
            open_store(path)
        assert tree(build(path, corpus).path) == whole
    again = build(tmp_path / "whole", corpus)
    assert tree(again.path) == whole


def test_another_corpus_is_refused(tmp_path):
    build(tmp_path / "store", Corpus(23), stop=17)
    with pytest.raises(IdentityError, match="context 0 of the corpus is not the one in the store"):
        build(tmp_path / "store", Corpus(23, seed=1))
    short = Corpus(23)
    short.tokens, short.segments = short.tokens[:12], short.segments[:12]
    with pytest.raises(StoreError, match="the corpus ended at context 12"):
        build(tmp_path / "store", short)
    check(build(tmp_path / "store", Corpus(23)), Corpus(23))


def test_another_identity_is_refused(tmp_path):
    corpus = Corpus(7)
    other = IDENTITY.model_copy(update={"subject_digest": "sha256:other"})
    for stop in (6, None):
        build(tmp_path / "store", corpus, stop=stop)
        with pytest.raises(IdentityError, match="subject_digest = 'sha256:subject' and 'sha256:other' is wanted"):
            build(tmp_path / "store", corpus, identity=other)
        changed = CODERS | {"wide": record(300, "sha256:new")}
        with pytest.raises(IdentityError, match=r"coder 'wide' of .* digest = 'sha256:coder' and 'sha256:new'"):
            build(tmp_path / "store", corpus, changed)
        if stop:
            with pytest.raises(IdentityError, match=r"is unfinished with the coders empty, signed@in, wide"):
                build(tmp_path / "store", corpus, {"wide": CODERS["wide"]})
            with pytest.raises(IdentityError, match="kept columns"):
                build(tmp_path / "store", corpus, document_columns={})
    moved = CODERS | {"wide": record(300, source="elsewhere")}
    assert build(tmp_path / "store", corpus, moved) is not None
    assert not (tmp_path / "store" / "building").exists()


def test_check_identity_compares_unknown_tokens_with_nothing():
    known = IDENTITY.model_copy(update={"tokens_digest": "sha256:a"})
    check_identity(known, IDENTITY)
    with pytest.raises(IdentityError, match="tokens_digest = 'sha256:a' and 'sha256:b'"):
        check_identity(known, IDENTITY.model_copy(update={"tokens_digest": "sha256:b"}))


def test_a_named_tokens_digest_is_held(tmp_path):
    corpus = Corpus(7)
    digest = build(tmp_path / "a", corpus).manifest.identity.tokens_digest
    build(tmp_path / "b", corpus, identity=IDENTITY.model_copy(update={"tokens_digest": digest}))
    with pytest.raises(IdentityError, match=f"digest sha256:no and those stored have {digest}"):
        build(tmp_path / "c", corpus, identity=IDENTITY.model_copy(update={"tokens_digest": "sha256:no"}))


def test_a_coder_is_added_to_a_finished_store(tmp_path):
    corpus = Corpus(23)
    one = {"wide": CODERS["wide"]}
    first = build(tmp_path / "grown", corpus, one, contexts_per_run=9)
    before = tree(first.path)
    build(tmp_path / "grown", corpus, stop=12)
    assert open_store(tmp_path / "grown").coder_names == ["wide"]  # readable all the while
    with pytest.raises(IdentityError, match="context 0 of the corpus"):
        build(tmp_path / "grown", Corpus(23, seed=1))
    grown = build(tmp_path / "grown", corpus)
    check(grown, corpus)
    assert grown.store_id == first.store_id and grown.coder("wide").coder_id == first.coder("wide").coder_id
    after = tree(grown.path)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: content for name, content in before.items() if name != "manifest.json"
    }
    assert verify_store(grown.path) == []
    assert grown.manifest.provenance["added"][0]["coders"] == ["empty", "signed@in"]
    # A subset of what is there is there.
    assert build(tmp_path / "grown", corpus, one).coder_names == sorted(CODERS)
    short = Corpus(23)
    short.tokens, short.segments = short.tokens[:12], short.segments[:12]
    with pytest.raises(StoreError, match=r"the corpus ended at context 12 and .* has 23 contexts"):
        build(tmp_path / "grown", short, {"fourth": record(9)})


def test_one_writer_at_a_time(tmp_path):
    holder = re.escape(socket.gethostname())
    with writer_at(tmp_path / "store", CODERS):
        with pytest.raises(StoreError, match=rf"is being written by process {os.getpid()} on {holder}"):
            writer_at(tmp_path / "store", CODERS)
    with writer_at(tmp_path / "store", CODERS) as writer:  # the file of a dead holder binds nobody
        assert writer.room == 5


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "tokens").mkdir()
    with pytest.raises(StoreError, match="holds a folder 'tokens' and no store"):
        writer_at(tmp_path, CODERS)
    assert [file.name for file in tmp_path.iterdir()] == ["tokens"]
    with pytest.raises(StoreError, match="holds no store"):
        open_store(tmp_path)


def test_readable_by_pandas_as_folders(tmp_path):
    corpus = Corpus(23)
    path = build(tmp_path / "store", corpus).path
    frame = pd.read_parquet(path / "coders" / "coder=wide" / "activations")
    assert len(frame) == len(corpus.activations["wide"]) and {"latent", "position", "activation"} <= set(frame.columns)
    assert len(pd.read_parquet(path / "coders" / "coder=wide" / "latents.parquet")) == 300
    assert len(pd.read_parquet(path / "tokens")) == 23
    assert pd.read_parquet(path / "documents")["document"].is_monotonic_increasing


def test_minhash_tells_equal_from_different():
    rng = np.random.default_rng(0)
    a = np.sort(rng.choice(100_000, 500, replace=False))
    half = np.sort(np.concatenate([a[:250], rng.choice(np.arange(100_000, 200_000), 250, replace=False)]))
    other = np.sort(rng.choice(np.arange(100_000, 200_000), 500, replace=False))
    few = np.array([3, 77])
    hashes = []
    for positions in (a, a, half, other, few, few):
        values = np.ones(len(positions), np.float32)
        block = summarise(np.zeros(len(positions), np.int64), positions, values, num_latents=1, ctx_len=CTX_LEN)
        hashes.append(block.minhash[0])
    assert minhash_similarity(hashes[0], hashes[1]) == 1.0 and minhash_similarity(hashes[4], hashes[5]) == 1.0
    assert minhash_similarity(hashes[0], hashes[3]) == 0.0
    assert 0.05 < minhash_similarity(hashes[0], hashes[2]) < 0.75  # 1/3
    assert minhash_similarity(np.stack(hashes), hashes[0]).shape == (6,)
    empty = np.full(16, 0xFFFFFFFF, np.uint32)
    assert minhash_similarity(empty, empty) == 0.0


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_streamed_summary_equals_the_one_in_memory(dtype):
    rng = np.random.default_rng(1)
    positions = np.sort(rng.choice(50_000, 5_000, replace=False))
    scale = rng.choice([1e-30, 1.0, 1e30] if dtype == np.float32 else [1e-3, 1.0, 1e3], 5_000).astype(dtype)
    values = rng.normal(size=5_000).astype(dtype) * scale
    whole = summarise(np.zeros(5_000, np.int64), positions, values, num_latents=1, ctx_len=CTX_LEN)
    blocks, reads = [(positions[at : at + 617], values[at : at + 617]) for at in range(0, 5_000, 617)], []

    def again():
        reads.append(1)
        return blocks

    streamed = summarise_stream(iter(blocks), again, ctx_len=CTX_LEN)
    assert len(reads) == (dtype == np.float32)
    assert streamed.count == whole.count and streamed.num_contexts == whole.num_contexts
    assert (streamed.minhash == whole.minhash).all()
    for name in whole.floats:
        assert streamed.floats[name].dtype == np.float32
        np.testing.assert_allclose(streamed.floats[name], whole.floats[name], rtol=1e-6 if name == "mean" else 0)
    assert whole.floats["q50"][0] == np.sort(values)[2499]


def test_cut_covers_every_latent_once():
    counts = np.array([0, 5, 5, 100, 0, 0, 3, 9, 1, 0])
    assert cut(counts, 10) == [(0, 3), (3, 4), (4, 7), (7, 10)]
    assert cut(np.zeros(4, np.int64), 10) == [(0, 4)]
    assert cut(np.array([11]), 10) == [(0, 1)]


def test_disk_full_is_one_sentence_and_the_build_goes_on(tmp_path, monkeypatch):
    corpus = Corpus(23)
    whole = tree(build(tmp_path / "whole", corpus).path)
    real = os.fsync
    for fails_at in (1, 6, 30, 55, 70):
        calls = iter(range(1, 10_000))

        def full(handle, fails_at=fails_at, calls=calls):
            if next(calls) >= fails_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(handle)

        path = tmp_path / f"full-{fails_at}"
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match="the disk is full; free some space and run the same command again"):
            build(path, corpus)
        monkeypatch.setattr(os, "fsync", real)
        assert tree(build(path, corpus).path) == whole


def test_disk_plan(tmp_path):
    plan = plan_disk(1_000_000, {"a": 32, "b": 64})
    assert plan.spill_bytes == 96 * 3_700_000 and plan.final_bytes == 96 * 3_300_000 + 10_000_000
    assert plan.spill_bytes < plan.peak_bytes < plan.spill_bytes + plan.final_bytes
    added = plan_disk(1_000_000, {"a": 32}, has_corpus=True)
    assert added.final_bytes == 32 * 3_300_000 and added.peak_bytes == 32 * 7_000_000
    check_disk(tmp_path / "not" / "yet", plan_disk(1000, {"a": 2}))
    with pytest.raises(ResourceError, match=r"takes about .* TB at its peak"):
        check_disk(tmp_path, plan_disk(10**12, {"a": 1000}))


def test_disk_plan_of_values_beyond_float16():
    plain, wide = plan_disk(1000, {"a": 10, "b": 10}), plan_disk(1000, {"a": 10, "b": 10}, float32={"b"})
    assert wide.spill_bytes - plain.spill_bytes == wide.final_bytes - plain.final_bytes == 1000 * 10 * 2
    assert wide.peak_bytes > plain.peak_bytes


def test_room_for_what_is_still_to_be_written(tmp_path, monkeypatch):
    free = [0]
    monkeypatch.setattr("autointerp.store.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=free[0]))
    plan = DiskPlan(spill_bytes=100, final_bytes=1000, peak_bytes=1600, corpus_bytes=60, stored_bytes=500)
    free[0] = 1100  # of the peak, 500 are there
    check_disk(tmp_path, plan)
    free[0] = 1099
    with pytest.raises(ResourceError, match=r"takes about 1.1 kB at its peak, 1.0 kB in the end, and 1.1 kB are free"):
        check_disk(tmp_path, plan)
    (tmp_path / "written").write_bytes(b"x")
    check_disk(tmp_path, plan)
    # A worker merges nothing.
    free[0] = 40
    check_disk(tmp_path, plan, worker=Worker(1, 4))
    free[0] = 39
    for number in (0, 2, 4):
        (tmp_path / f"run-{number:05d}-000.parquet").write_bytes(b"of others")
    with pytest.raises(ResourceError, match="takes about 40 B for this worker of 4, and 39 B are free"):
        check_disk(tmp_path, plan, worker=Worker(1, 4))
    (tmp_path / "part-00005.parquet").write_bytes(b"x")
    check_disk(tmp_path, plan, worker=Worker(1, 4))


def test_what_others_wrote_into_the_tokenizer_folder_is_flushed(tmp_path, monkeypatch):
    flushed, real = set(), os.fsync

    def fsync(handle):
        flushed.add(os.fstat(handle).st_ino)
        real(handle)

    path = tmp_path / "store"
    build(path, Corpus(7), stop=5)
    (path / "tokenizer/tokenizer.json").write_text("{}")
    monkeypatch.setattr(os, "fsync", fsync)
    build(path, Corpus(7))
    assert (path / "tokenizer/tokenizer.json").stat().st_ino in flushed
    assert "tokenizer/tokenizer.json" in open_store(path).manifest.files


@pytest.mark.parametrize(("dtype", "key_bits"), [(np.float16, 48), (np.float16, 49), (np.float32, 40)])
def test_sorting_by_key_keeps_every_value_with_its_key(dtype, key_bits):
    rng = np.random.default_rng(5)
    keys = rng.permutation(np.append(rng.choice(1 << 30, 999, replace=False), (1 << key_bits) - 1)).astype(np.uint64)
    values = rng.normal(size=1000).astype(dtype)
    before = dict(zip(keys.tolist(), values.tolist(), strict=True))
    pieces = [(keys[:400], values[:400]), (keys[400:], values[400:])]
    ordered = SortedRows(pieces, 1000, dtype=np.dtype(dtype), key_bits=key_bits)
    found, moved = ordered.rows(0, 1000)
    assert moved.dtype == dtype and found.tolist() == sorted(before)
    assert dict(zip(found.tolist(), moved.tolist(), strict=True)) == before
    assert [array.tolist() for array in ordered.rows(300, 600)] == [found[300:600].tolist(), moved[300:600].tolist()]


@pytest.mark.parametrize(("dtype", "key_bits"), [(np.float16, 48), (np.float16, 49), (np.float32, 40)])
def test_twins_are_found_across_blocks_whatever_their_values(dtype, key_bits):
    pieces = [(np.array([7, 1], np.uint64), np.array([1, 2], dtype)), (np.array([7, 9], np.uint64), np.array([3, 4], dtype))]
    ordered = SortedRows(pieces, 4, dtype=np.dtype(dtype), key_bits=key_bits)  # keys 1, 7, 7, 9
    assert [ordered.has_twins(start, start + 1) for start in range(4)] == [False, False, True, False]
    assert not ordered.has_twins(0, 2) and ordered.has_twins(1, 4)
