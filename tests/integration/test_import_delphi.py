"""Importing a cache that delphi's own writer made (tests/data/make_delphi_cache.py): content, honesty, results, refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from autointerp.demo import bundled
from autointerp.errors import IdentityError, InputError, Interrupted, StoreError
from autointerp.examples.selection import SelectionConfig, Selector
from autointerp.jobs import import_delphi as module
from autointerp.jobs.cache import cache
from autointerp.jobs.explain import ExplainConfig, explain
from autointerp.jobs.import_delphi import import_delphi
from autointerp.jobs.score import ScoreConfig, score
from autointerp.results.load import load_explanations, load_scores
from autointerp.store import open_store
from autointerp.store.verify import verify_store

FIXTURE = Path(__file__).parents[1] / "data" / "delphi-cache"
WORDS = (" self", " return", " import", " None", " for", " not")
MODULES = ("layers.1", "layers.2.mlp")


def convert(out, folder=FIXTURE, **options):
    return import_delphi(folder, out, tokenizer=str(bundled("model")), **options)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    return convert(tmp_path_factory.mktemp("delphi") / "store")


@pytest.fixture
def copied(tmp_path):
    return Path(shutil.copytree(FIXTURE, tmp_path / "cache"))


def in_files(name):
    """{(sequence, offset, latent): value}, one row at a time."""
    found = {}
    for path in (FIXTURE / "latents" / name).glob("*.safetensors"):
        data = load_file(path)
        first = int(path.stem.split("_")[0])
        for (sequence, offset, latent), value in zip(data["locations"].tolist(), data["activations"].tolist(), strict=True):
            found[sequence, offset, latent + first] = value
    return found


class TestContent:
    @pytest.mark.parametrize("name", MODULES)
    def test_every_activation_of_the_files(self, imported, name):
        reader, wanted = open_store(imported).coder(name), in_files(name)
        found = {}
        for latent in range(reader.width):
            positions, values = reader.activations(latent)
            found |= {(p // 32, p % 32, latent): v for p, v in zip(positions.tolist(), values.tolist(), strict=True)}
        assert found == {key: min(value, 65504.0) for key, value in wanted.items()} and len(found) > 800
        assert sum(np.isinf(value) for value in wanted.values()) == (name == "layers.2.mlp")

    def test_planted_latents_fire_on_their_words(self, imported):
        store = open_store(imported)
        for name, shift in (("layers.1", 0), ("layers.2.mlp", 1)):
            for latent, word in enumerate(WORDS):
                positions, _ = store.coder(name).activations(latent)
                assert len(positions) > 50
                assert {store.vocabulary.text(store.tokens[[p - shift]]) for p in positions} == {word}

    def test_tokens_and_what_is_not_known(self, imported):
        store = open_store(imported)
        tokens = load_file(FIXTURE / "latents" / "layers.1" / "0_2.safetensors")["tokens"]
        assert np.array_equal(store.tokens.reshape(-1, 32), tokens) and store.num_tokens == tokens.size
        made = store.manifest.provenance
        assert (
            made["imported"] == "delphi"
            and made["subject"] == "someone/planted"
            and made["num_overflowed"]["layers.2.mlp"] == 1
        )
        assert {"subject_digest", "documents", "token_filter", "coders"} <= set(made["unknown"])
        identity = store.manifest.identity
        assert identity.subject_digest == "unknown (imported: delphi, someone/planted)" and identity.bos_token_id is None
        assert identity.packing == identity.token_filter == "unknown" and store.documents().num_rows == 1
        record = store.coder("layers.1").record
        assert record.format == "delphi" and record.hookpoints == ("layers.1",) and record.width == 6 and record.k is None
        assert record.digest != store.coder("layers.2.mlp").record.digest
        assert verify_store(imported) == []

    def test_explained_and_scored(self, imported, tmp_path):
        results = tmp_path / "results"
        explain(ExplainConfig.parse({"store": imported, "results": results, "explainer": "lexical", "latents": "all"}))
        options = {name: {"judge": "rule"} for name in ("detection", "fuzzing")}
        score(ScoreConfig.parse({"results": results, "options": options}))
        texts = load_explanations(results).query("coder == 'layers.1'").set_index("latent").text
        assert all(word.strip() in texts[latent] for latent, word in enumerate(WORDS))
        scores = load_scores(results)
        headline = scores[scores.is_headline & scores["quantile"].isna() & scores.control.isna()]
        assert len(headline) == 24 and (headline.value > 0.95).all()
        assert set(headline.disjoint) == {"context"}  # not "document", which nobody knows


class TestFolders:
    @pytest.mark.parametrize("place", ["latents", "latents/layers.1"])
    def test_latents_folder_or_one_module(self, imported, tmp_path, place):
        store, whole = open_store(convert(tmp_path / "store", FIXTURE / place)), open_store(imported)
        assert store.coder_names == (list(MODULES) if place == "latents" else ["layers.1"])
        assert store.store_id == whole.store_id and store.coder("layers.1").coder_id == whole.coder("layers.1").coder_id

    def test_in_blocks_and_runs_it_is_the_same(self, imported, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "_BLOCK_ROWS", 7)
        monkeypatch.setattr(module, "_BLOCK_TOKENS", 96)
        store, whole = open_store(convert(tmp_path / "store", contexts_per_run=10)), open_store(imported)
        assert store.manifest.provenance["num_runs"] == 16 and store.store_id == whole.store_id
        for name in MODULES:
            for latent in range(6):
                for mine, theirs in zip(
                    store.coder(name).activations(latent), whole.coder(name).activations(latent), strict=True
                ):
                    assert np.array_equal(mine, theirs)

    @pytest.mark.parametrize(("budget", "is_cut"), [(1 << 28, True), (1 << 10, False)])
    def test_leaves_the_windows_that_the_first_latent_needs(self, tmp_path, monkeypatch, budget, is_cut):
        monkeypatch.setattr("autointerp.store.reader.MIN_DERIVED_POSITIONS", 0)
        path = convert(tmp_path / "store", memory_budget_bytes=budget)
        monkeypatch.setattr("autointerp.examples.windows.build_grid", lambda *_, **__: pytest.fail("cut again"))
        if is_cut:
            Selector(open_store(path), SelectionConfig()).select("layers.1", 0)
        else:
            assert not list(path.glob("derived/windows-*"))

    def test_stopped_and_started_again(self, imported, tmp_path, monkeypatch):
        commit = module.StoreWriter.close_run

        def stopping(writer):
            commit(writer)
            if writer.committed_runs == 3:
                raise Interrupted("enough")

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(module.StoreWriter, "close_run", stopping)
            convert(tmp_path / "store", contexts_per_run=10)
        read = []
        activations = module._activations
        monkeypatch.setattr(module, "_activations", lambda *args: read.append(args[2]) or activations(*args))
        store = open_store(convert(tmp_path / "store"))
        assert min(read) == 30 and store.manifest.extent == open_store(imported).manifest.extent
        convert(tmp_path / "store")


def rewritten(path, **changes):
    data = load_file(path)
    save_file({name: change for name, change in (data | changes).items() if change is not None}, path)


class TestRefusals:
    def test_what_is_no_cache(self, tmp_path):
        with pytest.raises(StoreError, match="no such folder"):
            convert(tmp_path / "store", tmp_path / "nowhere")
        (tmp_path / "empty").mkdir()
        with pytest.raises(StoreError, match=r"is no delphi cache: it holds no FIRST_LAST.safetensors"):
            convert(tmp_path / "store", tmp_path / "empty")

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda m: (m / "0_2.safetensors").unlink(), r"lacks latents: 3_5.safetensors begins at 3 where 0 should follow"),
            (lambda m: (m / "config.json").unlink(), "config.json does not exist"),
            (lambda m: rewritten(m / "0_2.safetensors", tokens=None), "expected locations, activations and tokens"),
            (lambda m: (m / "0_2.safetensors").write_bytes(b"x" * 40), "cannot be read as safetensors"),
            (
                lambda m: rewritten(m / "3_5.safetensors", tokens=np.zeros((160, 16), np.int64)),
                r"tokens of shapes \[\(160, 16\), \(160, 32\)\]",
            ),
            (
                lambda m: rewritten(
                    m / "3_5.safetensors", locations=load_file(m / "3_5.safetensors")["locations"][::-1].copy()
                ),
                "not in order of sequences",
            ),
            (
                lambda m: rewritten(
                    m / "3_5.safetensors", locations=load_file(m / "3_5.safetensors")["locations"] + np.uint16(3)
                ),
                "has a location beyond",
            ),
            (lambda m: rewritten(m / "3_5.safetensors", activations=np.zeros(3, np.float16)), "locations have shape"),
        ],
    )
    def test_damaged(self, copied, tmp_path, change, sentence):
        change(copied / "latents" / "layers.1")
        with pytest.raises(StoreError, match=sentence):
            convert(tmp_path / "store", copied)

    def test_modules_over_other_tokens(self, copied, tmp_path):
        for path in (copied / "latents" / "layers.2.mlp").glob("*.safetensors"):
            rewritten(path, tokens=np.roll(load_file(path)["tokens"], 1, axis=0))
        with pytest.raises(StoreError, match=r"modules layers.1 and layers.2.mlp have other tokens"):
            convert(tmp_path / "store", copied)

    def test_another_cache_into_the_same_store(self, imported, copied):
        config = copied / "latents" / "layers.1" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_name": "someone/else"}))
        with pytest.raises(IdentityError, match="subject_digest"):
            convert(imported, copied)

    def test_the_wrong_tokenizer(self, tmp_path, tiny_subject, copied):
        for path in (copied / "latents").glob("*/*.safetensors"):
            rewritten(path, tokens=load_file(path)["tokens"] + 100_000)
        with pytest.raises(InputError, match="the tokenizer has 400; give the subject's own with --tokenizer"):
            import_delphi(copied, tmp_path / "store", tokenizer=str(tiny_subject))
        with pytest.raises(InputError, match="no tokenizer someone/planted: no such folder here"):
            import_delphi(FIXTURE, tmp_path / "store")

    def test_nothing_can_be_added_to_it(self, imported):
        coder = {"name": "sae", "source": str(bundled("sae"))}
        config = {"subject": str(bundled("model")), "coders": [coder], "controls": ["reinit-subject"], "out": imported}
        with pytest.raises(
            InputError, match="was imported from delphi, which does not record the subject's weights, so no coder"
        ):
            cache(config)
