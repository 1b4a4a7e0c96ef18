"""Controls beside coders: one cache command, the store against naive forward passes, and one table at the end."""

import json
import logging

import numpy as np
import pandas as pd
import pytest
import torch

from autointerp.coders.load import load_coder
from autointerp.coders.random_coder import random_coder
from autointerp.demo import bundled
from autointerp.demo.run import CONTROLS, WITH_CONTROLS, cache_settings, run_demo
from autointerp.errors import ConfigError, IdentityError, InputError
from autointerp.jobs import cache as module
from autointerp.jobs import readings
from autointerp.jobs.cache import CacheConfig, cache
from autointerp.jobs.check import check_coder
from autointerp.store import open_store
from autointerp.store.verify import verify_store
from autointerp.subject.hooks import read_hookpoints
from autointerp.subject.model import load_subject
from autointerp.subject.neurons import neurons
from autointerp.subject.reinit import reinitialised
from tests.tiny import TEXTS

CTX_LEN = 32


@pytest.fixture
def settings(tiny_subject, tiny_sae, tiny_transcoder, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": TEXTS[i % 4] * (1 + i % 3) + str(i)}) + "\n" for i in range(24)))

    def make(**changes):
        coders = [
            {"name": "sae", "source": str(tiny_sae)},
            {"name": "transcoder", "source": str(tiny_transcoder)},
            {"name": "neurons", "source": "neurons:layers.1.mlp?k=6"},
            {"name": "rotated", "source": "neurons:layers.1.mlp?k=6&rotate=5"},
        ]
        values = {
            "subject": str(tiny_subject),
            "corpus": {"source": str(corpus), "ctx_len": CTX_LEN, "num_tokens": None},
            "coders": coders,
            "controls": ["random-coder", "reinit-subject"],
            "out": tmp_path / "store",
            "device": "cpu",
            "contexts_per_run": 12,
            "batch_tokens": 256,
            "progress": False,
            "force": True,  # the fixtures' coders are random and reconstruct nothing
        }
        return CacheConfig.parse(values | changes)

    return make


def stored(store, name):
    reader = store.coder(name)
    found = {}
    for latent in range(reader.width):
        positions, values = reader.activations(latent)
        found |= {(int(p), latent): float(v) for p, v in zip(positions, values, strict=True)}
    return found


def naive(subject, coder, hookpoint, store):
    """{(position, latent): value} by whole forward passes of single contexts."""
    found = {}
    for index, length in enumerate(store.context_lengths.tolist()):
        tokens = store.tokens[index * CTX_LEN : index * CTX_LEN + length].astype(np.int64).tolist()
        x = read_hookpoints(subject.model, torch.tensor([[0, *tokens]]), [hookpoint])[hookpoint][0, 1:]
        dense = coder.encode_dense(x)
        found |= {(index * CTX_LEN + t, latent): dense[t, latent].item() for t, latent in dense.nonzero().tolist()}
    return found


class TestOneCommand:
    def test_equals_naive_forward_passes(self, settings, tiny_subject, tiny_sae, tiny_transcoder):
        config = settings()
        store = open_store(cache(config))
        subject = load_subject(str(tiny_subject), device="cpu")
        twin = reinitialised(subject, seed=0)
        coders = {"sae": load_coder(tiny_sae), "transcoder": load_coder(tiny_transcoder)}
        for name, source in (("neurons", "neurons:layers.1.mlp?k=6"), ("rotated", "neurons:layers.1.mlp?k=6&rotate=5")):
            coders[name] = neurons(subject, source)
        assert store.coder_names == sorted([*coders, *(f"{name}-{end}" for name in coders for end in ("random", "reinit"))])
        for name, coder in coders.items():
            hookpoint = store.coder(name).record.hookpoints[0]
            cases = {
                name: (subject, coder),
                f"{name}-random": (subject, random_coder(coder, k=coder.spec.k, seed=0)),
                f"{name}-reinit": (twin, coder),
            }
            for stored_as, (model, reads) in cases.items():
                wanted, found = naive(model, reads, hookpoint, store), stored(store, stored_as)
                assert len(wanted) > 1000
                # A tie at the edge of the top k may fall either way with another batch; none is large.
                assert len(found.keys() ^ wanted.keys()) <= len(wanted) * 2e-3, stored_as
                both = sorted(found.keys() & wanted.keys())
                assert [found[key] for key in both] == pytest.approx([wanted[key] for key in both], rel=2e-3, abs=2e-3)
            records = {end: store.coder(f"{name}-{end}").record for end in ("random", "reinit")}
            record = store.coder(name).record
            assert record.control_of is None and {r.control_of for r in records.values()} == {name}
            assert {r.width for r in records.values()} == {record.width} and {r.k for r in records.values()} == {record.k}
            assert {r.hookpoints for r in records.values()} == {record.hookpoints}
            assert records["reinit"].reading["subject"] == {"weights": "drawn anew", "seed": 0}
            assert records["random"].digest != record.digest
        assert len({store.coder(name).coder_id for name in store.coder_names}) == len(store.coder_names)

    def test_matched_vectors_have_the_mean_and_spread_of_the_trained_ones(self, settings, tiny_subject, tiny_sae):
        store = open_store(cache(settings(controls=["reinit-matched:sae"], token_filter="first:3")))
        subject, hookpoint = load_subject(str(tiny_subject), device="cpu"), "model.layers.1@out"
        vectors = {}
        for name, model in (("trained", subject), ("twin", reinitialised(subject, seed=0))):
            rows = []
            for index, length in enumerate(store.context_lengths.tolist()):
                tokens = store.tokens[index * CTX_LEN : index * CTX_LEN + length].astype(np.int64).tolist()
                rows.append(read_hookpoints(model.model, torch.tensor([[0, *tokens]]), [hookpoint])[hookpoint][0, 1:])
            vectors[name] = rows
        first = {name: torch.cat([x[3:] for x in rows[: readings.CONTROL_CONTEXTS]]).double() for name, rows in vectors.items()}
        mean = {name: x.mean(dim=0) for name, x in first.items()}
        spread = {name: (x - mean[name]).pow(2).sum(dim=1).mean().sqrt() for name, x in first.items()}
        assert spread["twin"] < spread["trained"] / 5  # without matching this coder would see its biases and little else
        coder, wanted = load_coder(tiny_sae), {}
        for index, x in enumerate(vectors["twin"]):
            matched = (x.double() - mean["twin"]) * (spread["trained"] / spread["twin"]) + mean["trained"]
            dense = coder.encode_dense(matched.float())
            wanted |= {(index * CTX_LEN + t, i): dense[t, i].item() for t, i in dense.nonzero().tolist() if t >= 3}
        found = stored(store, "sae-reinit-matched")
        assert len(found.keys() ^ wanted.keys()) <= len(wanted) * 2e-3
        both = sorted(found.keys() & wanted.keys())
        assert [found[key] for key in both] == pytest.approx([wanted[key] for key in both], rel=2e-3, abs=2e-3)
        reading = store.coder("sae-reinit-matched").record.reading
        assert reading["inputs"] == ["matched"] and reading["subject"]["matched_on_contexts"] == readings.CONTROL_CONTEXTS

    def test_neurons_of_the_twin_write_what_the_twin_writes(self, settings):
        neuron = {"name": "neurons", "source": "neurons:layers.1.mlp?k=6"}
        store = open_store(cache(settings(coders=[neuron], force=False)))
        assert "neurons-reinit" in store.coder_names
        trained, untrained = (store.coder(name).record.digest for name in ("neurons", "neurons-reinit"))
        assert trained != untrained

    def test_controls_added_later_are_the_same_and_change_no_identity(self, settings, tmp_path):
        cache(settings(controls=[]))
        before = open_store(tmp_path / "store")
        ids = {name: before.coder(name).coder_id for name in before.coder_names}
        cache(settings())
        grown, whole = open_store(tmp_path / "store"), open_store(cache(settings(out=tmp_path / "whole")))
        assert grown.store_id == whole.store_id == before.store_id and grown.coder_names == whole.coder_names
        for name in whole.coder_names:
            assert grown.coder(name).coder_id == whole.coder(name).coder_id == ids.get(name, whole.coder(name).coder_id)
            assert stored(grown, name) == stored(whole, name)
        assert not list(verify_store(tmp_path / "store"))

    def test_other_seeds_are_other_coders(self, settings, tmp_path):
        cache(settings(controls=["random-coder:sae"]))
        store = open_store(cache(settings(controls=["random-coder:sae", "reinit-subject:sae"], control_seed=3)))
        assert {"sae-random", "sae-random3", "sae-reinit3"} < set(store.coder_names)
        assert store.coder("sae-random3").record.digest != store.coder("sae-random").record.digest

    def test_another_random_coder_under_the_same_name_is_refused(self, settings, tiny_transcoder):
        cache(settings(controls=["random-coder:sae"]))
        other = [{"name": "sae", "source": str(tiny_transcoder), "hookpoint": "layers.1.mlp@in"}]
        with pytest.raises(IdentityError, match="give this coder another name"):
            cache(settings(coders=other, controls=["random-coder:sae"]))


class TestMatchedL0:
    @pytest.fixture
    def directions(self, tmp_path):
        """A coder without a k: 40 random directions, some of which fire often."""
        generator = torch.Generator().manual_seed(0)
        np.savez(
            tmp_path / "d.npz", directions=torch.randn(40, 32, generator=generator).numpy(), names=[f"d{i}" for i in range(40)]
        )
        return [{"name": "probes", "source": f"directions:{tmp_path / 'd.npz'}?threshold=3", "hookpoint": "layers.1"}]

    def test_k_is_the_mean_number_of_active_latents(self, settings, directions, monkeypatch):
        store = open_store(cache(settings(coders=directions, controls=["random-coder"], force=False)))
        record, control = store.coder("probes").record, store.coder("probes-random").record
        assert record.k is None and record.labels[:2] == ("+d0", "-d0") and control.labels == () and control.width == 80
        lengths = store.context_lengths[: readings.CONTROL_CONTEXTS]
        probed = {key for key in stored(store, "probes") if key[0] < len(lengths) * CTX_LEN}
        assert control.k == round(len(probed) / int(lengths.sum())) > 1

    def test_a_measured_k_is_never_measured_twice(self, settings, directions, monkeypatch):
        config = settings(coders=directions, controls=["random-coder"])
        store = open_store(cache(config))
        monkeypatch.setattr(readings.ControlMaker, "_measured_k", lambda *_: pytest.fail("measured again"))
        cache(config)
        assert store.coder("probes-random").record.k

    def test_an_unfinished_store_knows_it_too(self, settings, directions, monkeypatch):
        config = settings(coders=directions, controls=["random-coder"])
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="enough"):
            patch.setattr(module.StoreWriter, "finish", lambda *_: (_ for _ in ()).throw(RuntimeError("enough")))
            cache(config)
        monkeypatch.setattr(readings.ControlMaker, "_measured_k", lambda *_: pytest.fail("measured again"))
        assert open_store(cache(config)).coder("probes-random").record.k


class TestRefusals:
    def test_sentences(self, settings, tiny_sae):
        with pytest.raises(ConfigError, match="control 'random-coder:sea' is of a coder that is not given; did you mean 'sae'"):
            cache(settings(controls=["random-coder:sea"]))
        neuron = {"name": "n", "source": "neurons:layers.1.mlp", "hookpoint": "layers.1@out"}
        with pytest.raises(InputError, match=r"names the module it reads itself; leave @@layers.1@out out"):
            cache(settings(coders=[neuron], controls=[]))
        with pytest.raises(InputError, match=r"coder neurons:layers.9.mlp: the subject has no module"):
            cache(settings(coders=[{"name": "n", "source": "neurons:layers.9.mlp"}], controls=[]))

    def test_what_reconstructs_nothing_is_not_checked(self, tiny_subject):
        with pytest.raises(InputError, match="was not made to reconstruct anything"):
            check_coder({"source": "neurons:layers.1.mlp", "subject": str(tiny_subject)})


BY_RULE = {"detection", "fuzzing", "simulation", "saebench", "delphi_detection", "delphi_fuzzing"}


@pytest.mark.slow
def test_demo_with_controls_in_one_table(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("autointerp.demo.run.packaged_embedder", lambda: "tests.integration.test_scorers_all:Letters")
    monkeypatch.setattr("autointerp.demo.run.FEW_LATENTS", 4)
    said = []
    with caplog.at_level(logging.WARNING):
        code = run_demo(
            store=tmp_path / "store", results=tmp_path / "results", num_tokens=24_576, latents="random:12", engine=None,
            say=said.append, controls=True,
        )  # fmt: skip
    assert code in (0, 3)
    names = ["neurons", "sae", "sae-random", "sae-reinit-matched", "sae-seed2", "skip-transcoder"]
    lines = next(text for text in said if text.startswith("coder")).splitlines()
    assert max(map(len, lines)) <= 140
    heads = [line for line in lines if line.startswith("coder")]
    assert set(" ".join(heads).split()) == {"coder"} | BY_RULE | {"embedding", "example_embedding"}
    for name in names:
        assert sum(line.startswith(f"{name} ") for line in lines) == len(heads)
    # Every cell has a median with its interval, its chance and its lift; the SAE has those over its own controls as well.
    assert sum(line.startswith(" ") and "over shuffled" in line for line in lines) == 6 * len(heads)
    assert sum("over random" in line for line in lines) == sum("over reinit-matched" in line for line in lines) == len(heads)
    assert any("4 of 12" in line for line in lines)
    assert [text for text in said if text.startswith("left out: intruder")]
    page = tmp_path / "results/report/index.html"
    frame = pd.read_parquet(page.with_name("coders.parquet"))
    assert set(frame["coder"]) == set(names) and set(frame["control_of"].dropna()) == {"sae"}
    assert set(frame["scorer"]) == BY_RULE | {"embedding", "example_embedding"}
    assert len(frame) == 6 * 8 and frame[["median", "chance", "over_shuffled", "over_shuffled_low"]].notna().all(axis=None)
    assert set(frame["num_planned"]) == {12} and frame["num_scored"].le(12).all()
    section = page.read_text(encoding="utf-8").partition('id="h-coders"')[2].partition('id="h-scores"')[0]
    assert section.count("<svg") == 8 and "control of sae" in section
    medians = frame[frame["scorer"] == "detection"].set_index("coder")["median"]
    assert medians["skip-transcoder"] > medians["sae-reinit-matched"] and medians["sae"] > medians["sae-reinit-matched"]
    assert not [r for r in caplog.records if "sae-reinit" in r.getMessage()]  # a control is not warned about


def test_demo_refuses_a_scorer_that_reads(tmp_path, monkeypatch):
    monkeypatch.setattr("autointerp.demo.run.packaged_embedder", lambda: None)
    for name, needs in (("intruder", "an LLM; give --llm"), ("embedding", "an embedder; pip install")):
        with pytest.raises(ConfigError, match=f"{name} needs {needs}"):
            run_demo(
                store=tmp_path / "s", results=tmp_path / "r", num_tokens=4_096, latents="random:2", engine=None,
                say=lambda _: None, scorers=(name,),
            )  # fmt: skip
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_the_demo_grows_into_its_controls(tmp_path):
    cache(CacheConfig.parse(cache_settings(tmp_path / "store", 8_192)))
    before = open_store(tmp_path / "store")
    cache(CacheConfig.parse(cache_settings(tmp_path / "store", 8_192, WITH_CONTROLS, CONTROLS)))
    after = open_store(tmp_path / "store")
    assert after.store_id == before.store_id and set(after.coder_names) > set(before.coder_names)
    assert bundled("sae").is_dir() and after.coder("sae-random").record.source.endswith(str(bundled("sae") / "layers.2"))
