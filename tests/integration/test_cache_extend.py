"""A store extended from the command's side: equal to one made at once, whatever was killed; refusals in sentences."""

import json
import os
from types import SimpleNamespace

import pytest

from autointerp.errors import ConfigError, IdentityError, InputError, Interrupted, ResourceError, StoreError
from autointerp.examples.selection import SelectionConfig
from autointerp.jobs import cache as module
from autointerp.jobs.cache import CacheConfig, cache, plan_cache
from autointerp.jobs.session import StoreSource
from autointerp.jobs.signals import StopFlag
from autointerp.store import writer as writer_module
from autointerp.store.reader import open_store
from autointerp.store.verify import verify_store
from tests.integration.test_cache import tables
from tests.tiny import TEXTS, tiny_sparsify


@pytest.fixture
def settings(tiny_subject, tiny_sae, tiny_transcoder, tmp_path):
    rows = [{"text": TEXTS[i % 4] * (1 + i % 3) + str(i), "url": f"u{i}"} for i in range(60)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**changes):
        text = {"source": str(tmp_path / "corpus.jsonl"), "ctx_len": 32, "num_tokens": 900, "keep_columns": ["url"]}
        coders = [{"name": "sae", "source": str(tiny_sae)}, {"name": "transcoder", "source": str(tiny_transcoder)}]
        values = {
            "subject": str(tiny_subject),
            "coders": coders,
            "controls": ["random-coder:sae"],
            "out": tmp_path / "store",
            "device": "cpu",
            "force": True,
            "contexts_per_run": 8,
            "batch_tokens": 256,
            "progress": False,
        }
        return CacheConfig.parse(values | changes | {"corpus": text | changes.get("corpus", {})})

    return make


def everything(path):
    store = open_store(path)
    manifest = {name: value for name, value in store.manifest.values().items() if name != "provenance"}
    return manifest, tables(path)


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_equal_to_a_store_made_at_once(settings, tmp_path, packing, monkeypatch):
    path = cache(settings(corpus={"packing": packing}))
    small = open_store(path)
    ran, batches = [], module.Recorder.batches
    monkeypatch.setattr(
        module.Recorder,
        "batches",
        lambda recorder, contexts: ran.append((len(recorder.seconds), len(contexts))) or batches(recorder, contexts),
    )
    cache(settings(corpus={"packing": packing}, extend_tokens=2000))
    large = open_store(path)
    redone = small.num_contexts % 8
    assert redone and sum(n for coders, n in ran if n <= 8 and coders == 3) == large.num_contexts - small.num_contexts + redone
    monkeypatch.undo()
    at_once = cache(settings(corpus={"packing": packing, "num_tokens": 2000}, out=tmp_path / "at_once"))
    assert everything(path) == everything(at_once) and verify_store(path) == []
    assert large.num_tokens >= 2000 and large.store_id != small.store_id
    assert StoreSource(path, SelectionConfig()).outgrown == {small.store_id: small.num_tokens}  # results of it are refused so
    # Both ways of saying it are done now.
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    cache(settings(corpus={"packing": packing}, extend_tokens=2000))
    cache(settings(corpus={"packing": packing, "num_tokens": 2000}))
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()} == before


def test_coder_by_coder_interrupted_and_with_one_more(settings, tmp_path, monkeypatch):
    other = {"name": "other", "source": str(tiny_sparsify(tmp_path / "other", width=40, seed=5))}
    path = cache(settings())
    coders = [*settings().model_dump()["coders"], other]
    config = settings(coders=coders, coders_per_pass=1, extend_tokens=2000)
    before = everything(path)
    commit, commits = module.StoreWriter.close_run, []

    def stopping(writer):
        commit(writer)
        commits.append(tuple(writer.coder_names))
        if len(commits) in (6, 18):
            raise Interrupted("enough")

    with monkeypatch.context() as patch:
        patch.setattr(module.StoreWriter, "close_run", stopping)
        for _ in range(2):
            with pytest.raises(Interrupted):
                cache(config)
            assert everything(path) == before
    assert len(set(commits)) == 2
    cache(config)
    assert everything(path) == everything(cache(settings(coders=coders, corpus={"num_tokens": 2000}, out=tmp_path / "at_once")))


def test_a_store_that_is_not_there_is_made_at_once(settings, tmp_path):
    store = open_store(cache(settings(extend_tokens=500)))
    assert store.num_tokens == 512 and "extended" not in store.manifest.provenance


class TestRefusals:
    def test_of_the_number_and_the_coders(self, settings, tiny_sae):
        path = cache(settings())
        before = everything(path)
        with pytest.raises(InputError, match=r"holds 928 tokens and 2,000 are wanted; give --extend-tokens 2000 to let"):
            cache(settings(corpus={"num_tokens": 2000}))
        with pytest.raises(InputError, match=r"holds 928 tokens and --extend-tokens 500 would make that fewer"):
            cache(settings(extend_tokens=500))
        alone = [{"name": "sae", "source": str(tiny_sae)}]
        with pytest.raises(InputError, match="all of its coders, and these are not given: sae-random, transcoder; name every"):
            cache(settings(extend_tokens=2000, coders=alone, controls=[]))
        with pytest.raises(ConfigError, match="extend_tokens"):
            settings(extend_tokens=0)
        assert everything(path) == before and not (path / "building").exists()

    def test_of_another_corpus_or_subject(self, settings, tmp_path):
        path = cache(settings())
        before = everything(path)
        text = (tmp_path / "corpus.jsonl").read_text()
        (tmp_path / "corpus.jsonl").write_text(text.replace("quick brown", "quick green"))
        with pytest.raises(IdentityError, match=r"context \d of the corpus is not the one in the store"):
            cache(settings(extend_tokens=2000))
        (tmp_path / "corpus.jsonl").write_text(text)
        with pytest.raises(IdentityError, match="token_filter = 'bos' and 'none' is wanted now"):
            cache(settings(extend_tokens=2000, token_filter="none"))
        assert everything(path) == before

    def test_of_another_number_once_begun(self, settings, monkeypatch):
        path = cache(settings())
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(module.StoreWriter, "close_run", lambda writer: (_ for _ in ()).throw(Interrupted("enough")))
            cache(settings(extend_tokens=2000))
        with pytest.raises(IdentityError, match=r"began to grow with corpus.num_tokens = 2000 and 1500 is wanted now"):
            cache(settings(extend_tokens=1500))
        cache(settings(extend_tokens=2000))
        assert open_store(path).num_tokens >= 2000

    def test_a_swap_that_was_killed_is_finished_by_any_call(self, settings, monkeypatch):
        path = cache(settings())
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr("autointerp.store.grow.os.replace", _stop_at_the_manifest)
            cache(settings(extend_tokens=2000))
        with pytest.raises(StoreError, match="its new files are moving into place"):
            open_store(path)
        with pytest.raises(InputError, match=r"and --extend-tokens 950 would make that fewer"):
            cache(settings(extend_tokens=950))
        assert open_store(path).num_tokens >= 2000 and verify_store(path) == []


def _stop_at_the_manifest(source, target):
    if str(source).endswith("grown/manifest.json"):
        raise RuntimeError("killed")
    os.rename(source, target)


def test_what_is_stored_already_needs_no_more_room(settings, monkeypatch):
    path = cache(settings())
    monkeypatch.setattr(module, "fits_float16", lambda values: True)
    disk = plan_cache(settings(extend_tokens=2000)).disk
    assert disk is not None and disk.stored_bytes == sum(entry.num_bytes for entry in open_store(path).manifest.files.values())
    free = [disk.spill_bytes + disk.final_bytes - 1]
    monkeypatch.setattr("autointerp.store.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=free[0]))
    with pytest.raises(ResourceError, match=r"takes about .* at its peak, .* in the end, and .* are free"):
        cache(settings(extend_tokens=2000))
    free[0] += 1
    cache(settings(extend_tokens=2000))
    assert open_store(path).num_tokens >= 2000


def test_values_beyond_float16_take_more_room(settings, monkeypatch):
    plain = plan_cache(settings()).disk
    monkeypatch.setattr(module, "fits_float16", lambda values: False)
    wide = plan_cache(settings()).disk
    assert plain is not None and wide is not None and wide.spill_bytes > 1.4 * plain.spill_bytes


def test_stopped_while_runs_are_merged(settings, tmp_path, monkeypatch):
    flags, merge_coder = [], writer_module.merge_coder

    class Flag(StopFlag):
        def __init__(self):
            super().__init__()
            flags.append(self)

    def merged(*arguments, **options):
        flags[0].request("SIGTERM")  # after what was polled before it
        return merge_coder(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "StopFlag", Flag)
        patch.setattr(writer_module, "merge_coder", merged)
        with pytest.raises(Interrupted, match=r"stopped by SIGTERM with 4 finished runs in .*; run the same command again"):
            cache(settings())
    assert (tmp_path / "store/building/corpus.json").exists()
    assert everything(cache(settings())) == everything(cache(settings(out=tmp_path / "at_once")))
