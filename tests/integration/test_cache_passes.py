"""Coders recorded a few at a time: the same store as in one pass, with no more of them in memory than asked for."""

import gc
import weakref

import pytest

from autointerp.errors import ConfigError, IdentityError, InputError, Interrupted
from autointerp.jobs import cache as module
from autointerp.jobs import readings
from autointerp.jobs.cache import CacheConfig, cache
from autointerp.store.reader import open_store
from tests.integration.test_cache import tables
from tests.tiny import TEXTS, tiny_sparsify


@pytest.fixture
def settings(tiny_subject, tmp_path):
    (tmp_path / "corpus.txt").write_text("".join(text * (1 + i % 3) for i, text in enumerate(TEXTS * 6)))
    for i in range(4):
        tiny_sparsify(tmp_path / f"coder{i}", width=24 + i, seed=i)

    def make(**changes):
        coders = [{"name": f"c{i}", "source": str(tmp_path / f"coder{i}/layers.1")} for i in range(4)]
        values = {
            "subject": str(tiny_subject),
            "corpus": {"source": str(tmp_path / "corpus.txt"), "ctx_len": 16, "num_tokens": 700},
            "coders": coders,
            "controls": ["random-coder:c2"],
            "out": tmp_path / "store",
            "device": "cpu",
            "force": True,
            "batch_tokens": 32,
            "progress": False,
        }
        return CacheConfig.parse(values | changes)

    return make


@pytest.fixture
def alive(monkeypatch):
    """Yield the most coders that were alive at once while any was recorded."""
    refs, most = [], [0]
    load, batches = readings.load_coder, module.Recorder.batches

    def loaded(*args, **kwargs):
        coder = load(*args, **kwargs)
        refs.append(weakref.ref(coder.decoder_LE))
        count()
        return coder

    def count():
        gc.collect()
        most[0] = max(most[0], sum(ref() is not None for ref in refs))

    def recorded(recorder, contexts):
        count()
        return batches(recorder, contexts)

    monkeypatch.setattr(readings, "load_coder", loaded)
    monkeypatch.setattr(module.Recorder, "batches", recorded)
    return most


@pytest.mark.parametrize("memory_budget", ["1GB", "1MB"])
def test_equal_to_one_pass(settings, tmp_path, alive, memory_budget):
    one = cache(settings(out=tmp_path / "one", memory_budget=memory_budget))
    assert alive[0] == 4
    alive[0] = 0
    several = cache(settings(coders_per_pass=2, memory_budget=memory_budget))
    assert alive[0] == 2
    assert open_store(several).manifest.extent == open_store(one).manifest.extent
    assert tables(several) == tables(one)
    assert [added["coders"] for added in open_store(several).manifest.provenance["added"]] == [["c2", "c2-random", "c3"]]


def test_the_second_call_goes_on(settings, tmp_path, monkeypatch):
    config = settings(coders_per_pass=1, controls=[], contexts_per_run=20)
    commit, commits = module.StoreWriter.close_run, []

    def stopping(writer):
        commit(writer)
        commits.append(writer.coder_names)
        if len(commits) == 6:
            raise Interrupted("enough")

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(module.StoreWriter, "close_run", stopping)
        cache(config)
    assert commits[-1] == ["c1"] and open_store(config.out).coder_names == ["c0"]
    with pytest.raises(IdentityError, match=r"unfinished with the coders c1, and c1, c2, c3 are wanted; .*--coders-per-pass"):
        cache(settings(controls=[], contexts_per_run=20))
    ran = []
    batches = module.Recorder.batches
    monkeypatch.setattr(
        module.Recorder, "batches", lambda recorder, contexts: ran.append(list(recorder.seconds)) or batches(recorder, contexts)
    )
    cache(config)
    monkeypatch.undo()
    assert ["c0"] not in ran and 0 < ran.count(["c1"]) < ran.count(["c2"]) == ran.count(["c3"])
    assert tables(config.out) == tables(cache(settings(controls=[], contexts_per_run=20, out=tmp_path / "one")))


def test_a_coder_of_the_last_pass_is_checked_before_the_first(settings, tmp_path):
    other = tiny_sparsify(tmp_path / "narrow", d=16, width=24)
    coders = [{"name": "c0", "source": str(tmp_path / "coder0/layers.1")}, {"name": "narrow", "source": str(other)}]
    with pytest.raises(InputError, match="coder 'narrow' reads vectors of width 16"):
        cache(settings(coders=coders, controls=[], coders_per_pass=1))
    assert not (tmp_path / "store").exists()
    with pytest.raises(ConfigError, match="coders_per_pass"):
        settings(coders_per_pass=0)
