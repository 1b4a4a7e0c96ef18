"""The export of a store to delphi's cache format, which benchmarks compare with."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from autointerp.store.reader import open_store
from benchmarks.incumbent import export_store, tokenizer_of, words_of
from benchmarks.neighbours import make_store

WIDTH, TOKENS = 64, 4096


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("incumbent") / "store"
    make_store(path, width=WIDTH, num_tokens=TOKENS, l0=4)
    return open_store(path)


def test_the_splits_hold_every_activation_in_order_of_position(store, tmp_path):
    out = export_store(store, "sae", tmp_path, num_splits=3)
    found, edges = [], []
    for path in sorted(out.glob("*.safetensors"), key=lambda path: int(path.stem.split("_")[0])):
        first, last = map(int, path.stem.split("_"))
        arrays = load_file(path)
        assert arrays["locations"].dtype == np.uint16
        assert arrays["activations"].dtype == np.float16
        assert arrays["tokens"].tolist() == store.tokens.reshape(-1, store.ctx_len).tolist()
        rows = [tuple(row) for row in arrays["locations"].tolist()]
        assert rows == sorted(rows)
        activations = zip(rows, arrays["activations"].tolist(), strict=True)
        found += [(first + latent, context * 256 + offset, value) for (context, offset, latent), value in activations]
        edges.append((first, last))
    assert edges == [(0, 20), (21, 41), (42, 63)]
    reader = store.coder("sae")
    expected = [
        (latent, position, float(np.float16(value)))
        for latent in range(WIDTH)
        for position, value in zip(*(column.tolist() for column in reader.activations(latent)), strict=True)
    ]
    assert sorted(found) == expected
    assert json.loads((out / "config.json").read_text())["ctx_len"] == 256


def test_only_the_splits_asked_for_are_written(store, tmp_path):
    out = export_store(store, "sae", tmp_path, num_splits=4, splits=[2])
    assert [path.name for path in out.glob("*.safetensors")] == ["32_47.safetensors"]


def test_the_tokenizer_gives_the_texts_of_the_store(store):
    tokenizer = tokenizer_of(words_of(store))
    assert tokenizer.decode([3]) == " w3"
    assert len(tokenizer) == 256


def test_a_tokenizer_of_two_equal_words_is_refused():
    with pytest.raises(ValueError, match="1 of 3 tokens have the text of another"):
        tokenizer_of(["a", "b", "a"])
