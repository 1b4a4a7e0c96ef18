"""Embedders: which one a name means, what is refused; unit vectors of the packaged model where it is installed."""

import sys
from importlib.util import find_spec

import numpy as np
import pytest

from autointerp.embed import DEFAULT_EMBEDDER, SentenceEmbedder, embedder_id, open_embedder
from autointerp.embed import sentence as module
from autointerp.errors import InputError, ResourceError
from autointerp.protocols import Embedder


class Letters:
    """Counts letters; a word's neighbours are its anagrams."""

    id = "letters"

    def embed(self, texts):
        counts = np.array([[1 + text.count(letter) for letter in "abcdefgh"] for text in texts], np.float32).reshape(-1, 8)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


class NotOne:
    pass


def test_a_class_of_the_users():
    embedder = open_embedder(f"{__name__}:Letters")
    assert isinstance(embedder, Embedder) and embedder.id == "letters"
    assert embedder.embed(["abc", "cab"]).shape == (2, 8)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (f"{__name__}:NotOne", "made a NotOne; expected an object with `id` and `embed"),
        (f"{__name__}:Nothing", "cannot be imported"),
        ("./nowhere", "no embedder at ./nowhere: no such folder"),
        ("two words", "neither a hub id nor module:Class"),
    ],
)
def test_what_is_no_embedder(spec, message):
    with pytest.raises(InputError, match=message):
        open_embedder(spec)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ResourceError, match=r"needs sentence-transformers, .* pip install 'autointerp\[embed\]'"):
        SentenceEmbedder(tmp_path, name="x")


class Library:
    """Stands for sentence_transformers: says what was asked of it."""

    def __init__(self):
        self.asked = []

    def SentenceTransformer(self, source, *, device, local_files_only):
        self.asked.append((source, device, local_files_only))
        if "broken" in source:
            raise OSError("no such\nmodel")
        return self

    def encode(self, texts, **options):
        assert options["normalize_embeddings"] and options["convert_to_numpy"] and not options["show_progress_bar"]
        return Letters().embed(texts)


@pytest.fixture
def library(monkeypatch):
    made = Library()
    monkeypatch.setitem(sys.modules, "sentence_transformers", made)
    return made


def test_folders_are_read_without_the_hub_and_named_by_their_weights(tmp_path, library):
    for name, weights in (("one", b"w"), ("two", b"w"), ("three", b"v")):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "model.safetensors").write_bytes(weights)
    ids = [open_embedder(str(tmp_path / name / "model")).id for name in ("one", "two", "three")]
    assert ids[0] == ids[1] != ids[2] and ids[0].startswith("model@")
    assert all(is_local for *_, is_local in library.asked)
    vectors = open_embedder(str(tmp_path / "one" / "model")).embed(["abc", "", "hh"])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert open_embedder(str(tmp_path / "one" / "model")).embed([]).shape[0] == 0


def test_the_default_is_the_packaged_one_where_it_is_installed_else_the_hubs(tmp_path, library, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert open_embedder().id == DEFAULT_EMBEDDER
    assert library.asked == [("sentence-transformers/all-MiniLM-L6-v2", None, False)]
    with pytest.raises(InputError, match=r"cannot be loaded from broken/model \(no such model\)"):
        open_embedder("broken/model")


def test_an_embedder_is_named_without_being_loaded(tmp_path, library, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"w")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    specs = [DEFAULT_EMBEDDER, str(tmp_path / "model"), "some/model", f"{__name__}:Letters"]
    named = [embedder_id(spec) for spec in specs]
    assert not library.asked
    assert named == [open_embedder(spec).id for spec in specs] and len(library.asked) == 3
    with pytest.raises(InputError, match=r"no embedder at \./nowhere"):
        embedder_id("./nowhere")


@pytest.mark.skipif(find_spec(module.PACKAGE) is None, reason="the package with the weights is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_packaged_model_knows_what_is_alike():
    embedder = open_embedder()
    assert embedder.id == "all-MiniLM-L6-v2@5683dac0"
    cat, kitten, tax = embedder.embed(["a cat on the mat", "a kitten on the rug", "the tax return is due"])
    assert cat.shape == (384,) and np.linalg.norm(cat) == pytest.approx(1, abs=1e-5)
    assert cat @ kitten > cat @ tax + 0.3
