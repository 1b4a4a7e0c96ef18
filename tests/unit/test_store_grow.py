"""A store grown in steps is the store built at once: tokens, documents, activations, tables, digests, and the files themselves."""

import json

import numpy as np
import pytest

from autointerp.errors import IdentityError, InputError, StoreError
from autointerp.store import StoreWriter, open_store, read_manifest, verify_store
from autointerp.store.progress import store_status
from autointerp.worker import Worker
from tests.unit.test_store_build import CODERS, CTX_LEN, IDENTITY, Corpus, build, check, record, tree

NUM_CONTEXTS = 31
OPTIONS = {"contexts_per_run": 5, "row_group_rows": 64, "part_rows": 1500, "document_columns": {"n": "int64"}}


def first(corpus, num_contexts):
    """The same corpus, ended after so many contexts."""
    part = Corpus(0)
    part.tokens, part.segments = corpus.tokens[:num_contexts], corpus.segments[:num_contexts]
    part.documents = [(context, row) for context, row in corpus.documents if context < num_contexts]
    part.activations = {
        coder: {key: value for key, value in entries.items() if key[1] < num_contexts * CTX_LEN}
        for coder, entries in corpus.activations.items()
    }
    return part


def grow(path, corpus, coders=CODERS, *, stop=None, **options):
    with StoreWriter.create_or_resume(path, identity=IDENTITY, coders=coders, is_growing=True, **(OPTIONS | options)) as writer:
        if not writer.is_finished:
            corpus.feed(writer, stop=stop)
            if stop is None:
                writer.finish()
    return open_store(path)


def content(path):
    """The files of a store; of its manifest all but how it was made."""
    files = tree(path)
    manifest = json.loads(files.pop("manifest.json"))
    return files, {name: value for name, value in manifest.items() if name not in ("provenance", "seal")}


@pytest.fixture(scope="module")
def whole():
    return Corpus(NUM_CONTEXTS)


@pytest.fixture(scope="module")
def at_once(tmp_path_factory, whole):
    store = build(tmp_path_factory.mktemp("at_once") / "store", whole)
    return content(store.path)


@pytest.mark.parametrize("num_contexts", [1, 4, 5, 10, 13, 29])
def test_equal_to_one_built_at_once(tmp_path, whole, at_once, num_contexts):
    before = build(tmp_path / "store", first(whole, num_contexts)).store_id
    store = grow(tmp_path / "store", whole)
    check(store, whole)
    assert content(store.path) == at_once and verify_store(store.path) == []
    assert store.store_id != before
    assert store.manifest.provenance["extended"][0]["store_id"] == before
    assert store.manifest.provenance["num_runs"] == 7


def test_steps_and_coders_in_any_order(tmp_path, whole, at_once):
    """Grown twice; a coder added between; the second time coder by coder."""
    path, two = tmp_path / "store", {name: CODERS[name] for name in ("wide", "empty")}
    build(path, first(whole, 7), two)
    grow(path, first(whole, 19), two)
    build(path, first(whole, 19))
    for name in sorted(CODERS):
        assert open_store(path).num_contexts == 19
        grow(path, whole, {name: CODERS[name]})
    assert content(path) == at_once
    assert len(read_manifest(path).provenance["extended"]) == 2


def test_a_corpus_that_ended_short_goes_on(tmp_path, whole):
    """The last stored context is the beginning of the one that comes there now."""
    short = first(whole, 15)
    ended = next(context for context in range(14, 0, -1) if len(whole.tokens[context]) > 8)
    short = first(whole, ended + 1)
    short.tokens = [*short.tokens[:-1], short.tokens[-1][:3]]
    short.segments = [*short.segments[:-1], [(d, start) for d, start in short.segments[-1] if start < 3]]
    used = {document for segments in short.segments for document, _ in segments}
    short.documents = [(context, row) for context, row in short.documents if row.document in used]
    for entries in short.activations.values():
        for key in [key for key in entries if key[1] >= ended * CTX_LEN + 3]:
            del entries[key]
    build(tmp_path / "store", short)
    store = grow(tmp_path / "store", whole)
    check(store, whole)
    assert content(store.path) == content(build(tmp_path / "whole", whole).path)


@pytest.mark.parametrize("values", ["plain", "extreme"])
def test_small_memory_streams_what_is_stored(tmp_path, values):
    """A latent too large for a range of the merge, in the stored parts and in the runs; float16 and float32."""
    corpus = Corpus(150, values=values)
    options = {"memory_budget_bytes": 1, "contexts_per_run": 60, "row_group_rows": 32}
    build(tmp_path / "store", first(corpus, 130), **options)
    store = grow(tmp_path / "store", corpus, **options)
    at_once = build(tmp_path / "whole", corpus, **options)
    assert store.manifest.extent == at_once.manifest.extent and store.manifest.files.keys() == at_once.manifest.files.keys()
    for coder in CODERS:
        assert list(store.coder(coder).sweep()) or coder == "empty"
        for (a, *one), (b, *other) in zip(store.coder(coder).sweep(), at_once.coder(coder).sweep(), strict=True):
            assert a == b and all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))
        for name, column in at_once.coder(coder).latents.items():
            # The mean of a streamed float32 latent may differ in its last bit.
            exact = name != "mean" or values == "plain"
            np.testing.assert_allclose(store.coder(coder).latents[name], column, rtol=0 if exact else 1e-6)
    assert int(store.coder("wide").latents["count"].max()) > 1 << 10


def test_what_was_derived_goes_and_nothing_else_of_the_store_is_left(tmp_path, whole, at_once):
    path = build(tmp_path / "store", first(whole, 13)).path
    for name in (
        "coders/coder=wide/statistics.parquet",
        "coders/coder=wide/neighbours-decoder.parquet",
        "embeddings/e-w32/index.json",
    ):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("of the smaller store")
    (path / "notes.txt").write_text("the user's own")
    grow(path, whole)
    assert (path / "notes.txt").read_text() == "the user's own"
    (path / "notes.txt").unlink()
    assert content(path) == at_once and not (path / "embeddings").exists()


def test_nothing_new_keeps_what_was_derived(tmp_path, whole):
    path = build(tmp_path / "store", first(whole, 13)).path
    (path / "coders/coder=wide/statistics.parquet").write_text("kept")
    before = content(path)
    grow(path, first(whole, 13))
    assert content(path) == before


def test_until_all_coders_are_there_the_store_is_as_it_was(tmp_path, whole):
    path = build(tmp_path / "store", first(whole, 13)).path
    before = content(path)
    grow(path, whole, {"wide": CODERS["wide"]})
    grow(path, whole, stop=25)
    files, manifest = content(path)
    assert ({name: data for name, data in files.items() if not name.startswith("building/")}, manifest) == before
    build(path, first(whole, 13))  # the former command finds nothing to do, and leaves the larger store alone
    check(grow(path, whole), whole)


class TestRefusals:
    @pytest.fixture
    def path(self, tmp_path, whole):
        return build(tmp_path / "store", first(whole, 13)).path

    def test_another_corpus(self, path, whole):
        other = Corpus(NUM_CONTEXTS, seed=1)
        with pytest.raises(IdentityError, match="context 0 of the corpus is not the one in the store"):
            grow(path, other)
        changed = first(whole, NUM_CONTEXTS)
        changed.tokens = [*changed.tokens[:11], changed.tokens[11] + np.uint32(1), *changed.tokens[12:]]
        with pytest.raises(IdentityError, match="context 11 of the corpus is not the one"):
            grow(path, changed)
        with pytest.raises(StoreError, match=r"the corpus ended at context 12 and .* has 13 contexts"):
            grow(path, first(whole, 12))
        check(grow(path, whole), whole)

    def test_other_inputs(self, path, whole):
        with pytest.raises(InputError, match="has no coder 'new' whose activations could be extended"):
            grow(path, whole, CODERS | {"new": record(3)})
        with pytest.raises(IdentityError, match=r"coder 'wide' of .* has digest"):
            grow(path, whole, CODERS | {"wide": record(300, "sha256:other")})
        assert not (path / "building").exists()

    def test_a_reader_in_the_middle_of_the_swap(self, path, whole, monkeypatch):
        import os

        replace, moved = os.replace, []

        def stopping(source, target):
            if "grown/coders" in str(source) and ".tmp-" not in str(source):
                moved.append(target)
                if len(moved) == 3:
                    raise RuntimeError("killed")
            replace(source, target)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
            patch.setattr("autointerp.store.grow.os.replace", stopping)
            grow(path, whole)
        with pytest.raises(StoreError, match=r"was extended and its new files are moving into place: try again in a moment"):
            open_store(path)
        StoreWriter.complete(path)
        check(open_store(path), whole)
        assert verify_store(path) == [] and not (path / "building").exists()


class TestStatus:
    def test_of_a_store_begun_finished_and_extended(self, tmp_path, whole):
        path = tmp_path / "store"
        with pytest.raises(StoreError, match="holds no store, finished or begun"):
            store_status(path)
        build(path, whole, stop=12)
        tokens = sum(map(len, whole.tokens[:10]))
        assert store_status(path).splitlines() == [
            f"{path} is not finished: empty, signed@in, wide",
            f"  2 runs of up to 5 contexts, {tokens} tokens",
            "  run the same cache command again to go on",
        ]
        part = first(whole, 13)
        store = build(path, part)
        finished = [
            f"{path}: {store.num_tokens} tokens of {len(part.documents)} documents",
            "  empty: 5 latents, 0 activations",
            *(
                f"  {name}: {CODERS[name].width} latents, {len(part.activations[name]):,} activations"
                for name in CODERS
                if name != "empty"
            ),
        ]
        assert sorted(store_status(path).splitlines()) == sorted(finished)
        grow(path, whole, stop=22)
        assert store_status(path).splitlines()[4:] == [
            f"extending {path}: empty, signed@in, wide",
            f"  4 runs of up to 5 contexts, {sum(map(len, whole.tokens[:20]))} tokens",
            "  run the same cache command again to go on",
        ]

    def test_of_workers(self, tmp_path, whole):
        path = tmp_path / "store"
        with StoreWriter.create_or_resume(path, identity=IDENTITY, coders=CODERS, worker=Worker(1, 3), **OPTIONS) as writer:
            whole.feed(writer)
            writer.close_run()
            assert writer.num_runs == 7 and writer.missing_runs() == [0, 2, 3, 5, 6]
        assert store_status(path).splitlines()[2:] == [
            "  runs by worker 0: 0, worker 1: 2, worker 2: 0; 3 missing before the last one",
            "  run the same cache command again to go on (without --worker to merge)",
        ]
        check(build(path, whole), whole)


def most_frequent(store):
    return store.coder("wide").activations(int(store.coder("wide").latents["count"].argmax()))


READ = {
    "tokens": lambda store: store.tokens,
    "documents": lambda store: store.documents(),
    "latents": lambda store: store.coder("signed@in").latents,
    "activations": most_frequent,
    "sweep": lambda store: list(store.coder("wide").sweep()),
    "blocks": lambda store: list(store.coder("wide").blocks()),
}


def opened_before(path, corpus, coders=CODERS):
    """Return a store of which some was read, with no file open."""
    store = build(path, corpus, coders)
    assert len(most_frequent(store)[0])
    store.close()
    return store


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("state", ["grown", "growing"])
def test_who_opened_the_smaller_store_never_reads_of_the_larger(tmp_path, whole, read, state):
    path = tmp_path / "store"
    store = opened_before(path, first(whole, 13))
    if state == "growing":
        # As a process sees it while the files of the larger store are moved into place.
        (path / "manifest.json").unlink()
        larger = build(tmp_path / "larger", whole).path
        for file in larger.rglob("*.parquet"):
            file.replace(path / file.relative_to(larger))
    else:
        grow(path, whole)
    with pytest.raises(StoreError, match="is not what it was when it was opened: it was extended") as told:
        READ[read](store)
    assert str(path) in str(told.value)


def test_who_has_files_of_the_smaller_store_open_reads_these_to_the_end(tmp_path, whole):
    store = build(tmp_path / "store", first(whole, 13), {"wide": CODERS["wide"]})
    expected = [array.tolist() for array in most_frequent(store)]
    blocks = store.coder("wide").blocks()
    next(blocks)
    grow(tmp_path / "store", whole, {"wide": CODERS["wide"]})
    assert [array.tolist() for array in most_frequent(store)] == expected
    with pytest.raises(StoreError, match="it was extended"):
        list(blocks)


@pytest.mark.parametrize("read", READ)
def test_who_opened_a_store_reads_on_when_coders_are_added(tmp_path, whole, read):
    path = tmp_path / "store"
    store = opened_before(path, whole, {name: CODERS[name] for name in ("wide", "signed@in")})
    build(path, whole)
    assert open_store(path).coder_names == sorted(CODERS)
    found, expected = READ[read](store), READ[read](open_store(path))
    assert type(found) is type(expected)
    for name, column in open_store(path).coder("wide").latents.items():
        np.testing.assert_array_equal(store.coder("wide").latents[name], column)
    for one, other in zip(store.coder("wide").sweep(), open_store(path).coder("wide").sweep(), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
