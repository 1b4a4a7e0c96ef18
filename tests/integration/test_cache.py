"""Caching from end to end: what is in the store against a naive forward pass; resume, reuse, extension, refusal."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autointerp.coders.load import load_coder
from autointerp.errors import ConfigError, IdentityError, InputError, Interrupted, ResourceError
from autointerp.jobs import cache as module
from autointerp.jobs import readings
from autointerp.jobs.cache import CacheConfig, cache, plan_cache
from autointerp.store.reader import open_store
from tests.tiny import TEXTS, tiny_sparsify, tiny_subject

NUM_DOCUMENTS = 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [
        {"text": TEXTS[i % 4] * (1 + i % 3) + str(i), "url": f"u{i}", "n": i if i % 5 else None} for i in range(NUM_DOCUMENTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(tiny_subject, tiny_sae, tiny_transcoder, corpus, tmp_path):
    def make(**changes):
        text = {"source": str(corpus), "ctx_len": 32, "num_tokens": None, "keep_columns": ["url"]} | changes.pop("corpus", {})
        coders = [{"name": "sae", "source": str(tiny_sae)}, {"name": "transcoder", "source": str(tiny_transcoder)}]
        values = {
            "subject": str(tiny_subject),
            "corpus": text,
            "coders": coders,
            "out": tmp_path / "store",
            "device": "cpu",
            "force": True,
        }
        return CacheConfig.parse(values | {"contexts_per_run": 12, "batch_tokens": 256, "progress": False} | changes)

    return make


def tables(path):
    """Return all that a store says, as plain values."""
    store = open_store(path)
    latents = {
        name: {key: np.asarray(column).tolist() for key, column in store.coder(name).latents.items()}
        for name in store.coder_names
    }
    activations = {
        name: [
            tuple(part.tolist() for part in store.coder(name).activations(latent)) for latent in range(store.coder(name).width)
        ]
        for name in store.coder_names
    }
    return store.store_id, store.tokens.tolist(), store.documents().to_pylist(), latents, activations


def naive(subject, coder, hook, store, *, ctx_len):
    """Return {(position, latent): value} by whole forward passes of single contexts."""
    model = AutoModelForCausalLM.from_pretrained(subject, dtype=torch.float32)
    found = {}
    for index, length in enumerate(store.context_lengths.tolist()):
        tokens = store.tokens[index * ctx_len : index * ctx_len + length].astype(np.int64).tolist()
        caught = []
        handle = hook(model, caught)
        with torch.no_grad():
            model(torch.tensor([[0, *tokens]]))
        handle.remove()
        dense = coder.encode_dense(caught[0][0, 1:])
        for t, latent in dense.nonzero().tolist():
            found[index * ctx_len + t, latent] = dense[t, latent].item()
    return found


HOOKS = {
    "sae": lambda model, caught: model.model.layers[1].register_forward_hook(
        lambda m, a, out: caught.append(out[0] if isinstance(out, tuple) else out)
    ),
    "transcoder": lambda model, caught: model.model.layers[1].mlp.register_forward_pre_hook(lambda m, a: caught.append(a[0])),
}


class TestContent:
    @pytest.mark.parametrize("packing", ["concat", "document"])
    def test_equals_naive_forward_passes(self, settings, tiny_subject, tiny_sae, tiny_transcoder, packing):
        store = open_store(cache(settings(corpus={"packing": packing})))
        assert store.coder_names == ["sae", "transcoder"] and store.manifest.provenance["num_runs"] >= 8
        for name, folder in (("sae", tiny_sae), ("transcoder", tiny_transcoder)):
            wanted = naive(tiny_subject, load_coder(folder), HOOKS[name], store, ctx_len=32)
            reader = store.coder(name)
            assert reader.record.hookpoints == ({"sae": "model.layers.1@out", "transcoder": "model.layers.1.mlp@in"}[name],)
            assert reader.record.target == {"sae": None, "transcoder": "model.layers.1.mlp@out"}[name]
            found = {}
            for latent in range(reader.width):
                positions, values = reader.activations(latent)
                found |= {(int(p), latent): float(v) for p, v in zip(positions, values, strict=True)}
            # A tie at the edge of the top k may fall either way with another batch; none is large.
            assert len(found.keys() ^ wanted.keys()) <= len(wanted) * 1e-3
            both = found.keys() & wanted.keys()
            assert [found[key] for key in both] == pytest.approx([wanted[key] for key in both], rel=2e-3, abs=2e-3)

    def test_a_transcoder_with_names_by_site(self, settings, tiny_transcoder, monkeypatch):
        def load(source, **_):
            coder = load_coder(source)
            return replace(coder, spec=replace(coder.spec, hookpoint="blocks.1.mlp.hook_in", target="blocks.1.hook_mlp_out"))

        paths = settings(coders=[{"name": "transcoder", "source": str(tiny_transcoder)}])
        by_module = open_store(cache(paths)).coder("transcoder")
        monkeypatch.setattr(readings, "load_coder", load)
        by_site = open_store(cache(paths.model_copy(update={"out": paths.out.parent / "other"}))).coder("transcoder")
        assert by_site.record.hookpoints == ("model.layers.1.post_attention_layernorm@out",)
        assert by_site.record.target == by_module.record.target == "model.layers.1.mlp@out"
        assert by_site.latents["count"].sum() > 1000
        for latent in range(by_site.width):
            for found, wanted in zip(by_site.activations(latent), by_module.activations(latent), strict=True):
                assert found.tolist() == wanted.tolist()

    def test_documents_tokens_and_vocabulary(self, settings, tiny_subject, corpus):
        store = open_store(cache(settings()))
        rows = [json.loads(line) for line in corpus.read_text().splitlines()]
        documents = store.documents().to_pylist()
        assert [row["url"] for row in documents] == [row["url"] for row in rows]
        segments = store.segments
        texts = {}
        for document, start, stop in zip(segments.document, segments.start, segments.stop, strict=True):
            texts.setdefault(int(document), []).append(store.tokens[start:stop])
        for document, parts in texts.items():
            assert store.vocabulary.text(np.concatenate(parts)) == rows[document]["text"]
        tokenizer = AutoTokenizer.from_pretrained(store.path / "tokenizer")
        assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tiny_subject).get_vocab()
        assert pq.read_table(store.path / "tokenizer" / "vocab.parquet").num_rows == 400

    def test_chat_with_the_template_filter(self, settings, tmp_path):
        path = tmp_path / "chat.jsonl"
        messages = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "return user"}]
        path.write_text((json.dumps({"chat": messages}) + "\n") * 9)
        config = settings(
            corpus={"source": str(path), "messages": "chat", "packing": "document", "keep_columns": []}, token_filter="template"
        )
        store = open_store(cache(config))
        assert (
            store.num_contexts == 9
            and store.manifest.identity.chat_template_digest
            and store.manifest.identity.token_filter == "template"
        )
        special = store.vocabulary.is_special(store.tokens)
        fired = np.unique(np.concatenate([store.coder("sae").activations(latent)[0] for latent in range(64)]))
        assert len(fired) and not special[fired].any()


class Forker:
    """Runs `cache` in children of a process of its own; see cache_forker.py."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "cache_forker.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self, config, *, kill_at=0):
        """Return the child's process id."""
        self._process.stdin.write(json.dumps([config.model_dump_json(), kill_at]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self):
        """Return (return code, renames, error text)."""
        return json.loads(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def forker():
    forker = Forker()
    yield forker
    forker.close()


class TestResume:
    @pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.7, 0.9, 1.0])
    def test_killed_and_started_again_gives_equal_tables(self, settings, tmp_path, forker, share):
        forker.start(settings(out=tmp_path / "whole"))
        code, renames, error = forker.wait()
        assert code == 0, error
        forker.start(settings(), kill_at=max(2, int(renames * share)))
        assert forker.wait()[0] == -signal.SIGKILL and not (tmp_path / "store" / "manifest.json").exists()
        cache(settings())
        assert tables(tmp_path / "store") == tables(tmp_path / "whole")
        assert not (tmp_path / "store" / "building").exists() and not list((tmp_path / "store").rglob(".tmp-*"))

    def test_finished_runs_are_not_run_again(self, settings, monkeypatch):
        config = settings()
        calls = []
        batches = module.Recorder.batches

        def stopping(recorder, contexts):
            calls.append(len(contexts))
            if len(calls) == 4:
                raise Interrupted("enough")
            return batches(recorder, contexts)

        monkeypatch.setattr(module.Recorder, "batches", stopping)
        with pytest.raises(Interrupted):
            cache(config)
        again = []
        monkeypatch.setattr(
            module.Recorder, "batches", lambda recorder, contexts: again.append(len(contexts)) or batches(recorder, contexts)
        )
        store = open_store(cache(config))
        assert calls == [12] * 4 and sum(again) == store.num_contexts - 36

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
    def test_signals_stop_cleanly(self, settings, tmp_path, forker, name):
        config = settings(contexts_per_run=6, batch_tokens=32)
        pid = forker.start(config)
        deadline = time.monotonic() + 60
        while not list((tmp_path / "store").glob("building/runs/run-*.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(pid, getattr(signal, name))
        code, _, error = forker.wait()
        assert code == 130 and f"stopped by {name} with" in error and "run the same command again" in error
        cache(config)
        cache(settings(out=tmp_path / "whole", contexts_per_run=6, batch_tokens=32))
        assert tables(tmp_path / "store") == tables(tmp_path / "whole")


class TestReuse:
    def test_a_finished_store_is_left_alone_and_said_so(self, settings, caplog, monkeypatch):
        path = cache(settings())
        before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
        caplog.set_level("INFO", "autointerp")
        monkeypatch.setattr("autointerp.jobs.cache.logger.propagate", True)
        assert cache(settings()) == path
        assert {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()} == before
        assert "has all of this already" in caplog.text and "comparing" not in caplog.text

    def test_the_same_text_elsewhere_is_the_same(self, settings, corpus, tmp_path):
        path = cache(settings())
        shutil.copy(corpus, tmp_path / "moved.jsonl")
        assert cache(settings(corpus={"source": str(tmp_path / "moved.jsonl")})) == path

    def test_a_coder_is_added_over_the_same_tokens(self, settings, tmp_path, tiny_sae):
        path = cache(settings(coders=[{"name": "sae", "source": str(tiny_sae)}]))
        sae = (path / "coders/coder=sae/latents.parquet").stat().st_mtime_ns
        other = tiny_sparsify(tmp_path / "other", width=40, seed=5)
        coders = [{"name": "sae", "source": str(tiny_sae)}, {"name": "other", "source": str(other), "hookpoint": "layers.2"}]
        cache(settings(coders=coders))
        assert open_store(path).coder_names == ["other", "sae"]
        assert (path / "coders/coder=sae/latents.parquet").stat().st_mtime_ns == sae
        cache(settings(coders=coders, out=tmp_path / "both"))
        assert tables(path)[1:] == tables(tmp_path / "both")[1:]
        assert open_store(path).coder("other").record.hookpoints == ("model.layers.2@out",)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"token_filter": "none"}, "token_filter = 'bos' and 'none' is wanted now"),
            ({"corpus": {"ctx_len": 16}}, "ctx_len = 32 and 16 is wanted now"),
            ({"corpus": {"packing": "document"}}, "packing = 'concat' and 'document' is wanted now"),
            ({"corpus": {"num_tokens": 500}}, "tokens_digest"),
        ],
    )
    def test_other_inputs_are_refused(self, settings, changes, sentence):
        cache(settings())
        with pytest.raises(IdentityError, match=sentence):
            cache(settings(**changes))

    def test_another_subject_or_coder_is_refused(self, settings, tmp_path):
        cache(settings())
        with pytest.raises(IdentityError, match="subject_digest"):
            cache(settings(subject=str(tiny_subject(tmp_path / "other", seed=3))))
        with pytest.raises(IdentityError, match=r"coder 'sae' of .* has digest"):
            cache(settings(coders=[{"name": "sae", "source": str(tiny_sparsify(tmp_path / "c", seed=9))}]))

    def test_another_corpus_for_an_unfinished_store(self, settings, monkeypatch):
        def stop(recorder, contexts):
            raise Interrupted("enough")

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(module.Recorder, "batches", stop)
            cache(settings())
        with pytest.raises(IdentityError, match=r"was started with corpus.num_tokens = None and 500 is wanted now"):
            cache(settings(corpus={"num_tokens": 500}))


class TestRefusal:
    """Nothing is written when an input cannot be used."""

    @pytest.fixture
    def refused(self, settings, tmp_path):
        def check(error, sentence, **changes):
            with pytest.raises(error, match=sentence):
                cache(settings(**changes))
            assert not (tmp_path / "store").exists()

        return check

    def test_a_width_that_does_not_fit(self, refused, tiny_sae):
        coders = [{"name": "sae", "source": str(tiny_sae), "hookpoint": "model.layers.1.mlp.down_proj@in"}]
        refused(
            InputError,
            r"coder 'sae' reads vectors of width 32, and hookpoint .*down_proj@in of .* has width 64; .* near it: model",
            coders=coders,
        )

    def test_hookpoints_that_do_not_exist(self, refused, tiny_sae, tmp_path):
        refused(
            InputError,
            r"coder 'sae': the subject has no module 'layer.1' .* did you mean 'layers.1'\?",
            coders=[{"name": "sae", "source": str(tiny_sae), "hookpoint": "layer.1"}],
        )
        from tests.unit.test_coders_formats import gemma

        refused(
            InputError,
            "do not say which hookpoint it reads; give one as g=",
            coders=[{"name": "g", "source": str(gemma(tmp_path / "g"))}],
        )

    def test_names(self, refused, tiny_sae):
        source = str(tiny_sae)
        refused(
            ConfigError,
            "two coders have the name 'a'",
            coders=[{"name": "a", "source": source}, {"name": "a", "source": source}],
        )
        refused(InputError, "cannot be a folder name", coders=[{"name": "a/b", "source": source}])

    def test_an_empty_corpus(self, refused, tmp_path):
        (tmp_path / "empty.txt").write_text("")
        refused(InputError, "holds no text", corpus={"source": str(tmp_path / "empty.txt"), "keep_columns": []})

    def test_a_disk_that_is_too_small(self, refused):
        refused(
            ResourceError,
            r"takes about .* TB at its peak, .* TB in the end, and .* are free; .* choose another disk with --out",
            corpus={"num_tokens": 10**14},
        )

    def test_a_plan_foresees_the_disk_and_writes_nothing(self, settings, tiny_sae):
        config = settings(corpus={"num_tokens": 2000}, contexts_per_run=None)
        plan = plan_cache(config)
        assert plan_cache(settings()).text().endswith("not known without a number of tokens; give one with --tokens")
        assert not config.out.exists()
        assert plan.coders == ("sae", "transcoder") and plan.num_tokens == 2000
        store = open_store(cache(config))
        found = sum(int(store.coder(name).latents["count"].sum()) for name in store.coder_names)
        assert plan.l0 * 2000 == pytest.approx(found, rel=0.1)
        assert plan_cache(config).text() == "all of this is in the store already; nothing to do"
        more = settings(
            corpus={"num_tokens": 2000}, coders=[*config.model_dump()["coders"], {"name": "again", "source": str(tiny_sae)}]
        )
        added = plan_cache(more)
        assert added.coders == ("again",) and added.disk is not None and plan.disk is not None
        assert added.disk.final_bytes < plan.disk.final_bytes - 4 * 2000  # the tokens are there

    def test_configurations(self, settings):
        with pytest.raises(ConfigError, match=r"unknown key 'token_filtr'; did you mean 'token_filter'\?"):
            settings(token_filtr="bos")
        assert (
            CacheConfig.parse(
                {
                    "subject": "s",
                    "corpus": "stdlib",
                    "coders": [{"name": "a", "source": "b"}],
                    "out": "o",
                    "memory_budget": "16MB",
                }
            ).memory_budget
            == 16_000_000
        )


def test_warns_of_dead_latents(settings, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr("autointerp.jobs.cache.logger.propagate", True)
    sparse = tiny_sparsify(tmp_path / "dead", width=640, k=1)
    cache(settings(coders=[{"name": "dead", "source": str(sparse)}], corpus={"num_tokens": 64}))
    assert "of the latents never fire on this corpus" in caplog.text


def test_stdlib_by_its_name(settings):
    store = open_store(cache(settings(corpus={"source": "stdlib", "num_tokens": 2000, "keep_columns": []})))
    assert store.num_tokens == 2016 and Path(store.documents().to_pylist()[0]["path"]).suffix == ".py"
