"""A subject split over the processor's memory and the disk: the same store as of the whole one."""

import json

import numpy as np
import pytest
import torch

from autointerp.cli.main import main
from autointerp.errors import ConfigError, InputError
from autointerp.store.reader import open_store
from autointerp.subject.model import load_subject
from tests.tiny import TEXTS

PARTS = ["model.embed_tokens", "model.rotary_emb", *(f"model.layers.{i}" for i in range(3)), "model.norm", "lm_head"]
MIXED = {part: "disk" if part in ("model.layers.1", "model.norm", "lm_head") else "cpu" for part in PARTS}
MOSTLY_DISK = {part: "cpu" if part == "model.norm" else "disk" for part in PARTS}


@pytest.fixture(scope="module")
def stores(tiny_subject, tiny_sae, tiny_transcoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": TEXTS[i % 4] + str(i)}) + "\n" for i in range(30)))

    def make(name, *options):
        if not (folder / name).exists():
            arguments = [
                "cache", "--subject", tiny_subject, "--corpus", corpus, "--coder", f"sae={tiny_sae}", "--coder",
                f"transcoder={tiny_transcoder}", "--tokens", "1k", "--ctx-len", 32, "--device", "cpu", "--force", "--out", folder / name,
                *options,
            ]  # fmt: skip
            with pytest.raises(SystemExit) as stop:
                main([str(argument) for argument in arguments])
            assert stop.value.code == 0
        return open_store(folder / name)

    return make


@pytest.mark.parametrize("name", ["mixed", "disk"])
def test_the_store_is_the_same(stores, name):
    whole = stores("whole")
    split = stores(name, "--device-map", json.dumps({"mixed": MIXED, "disk": MOSTLY_DISK}[name]))
    assert split.store_id == whole.store_id and split.coder_names == whole.coder_names == ["sae", "transcoder"]
    assert split.tokens.tolist() == whole.tokens.tolist()
    for coder in whole.coder_names:
        num_activations = 0
        for latent in range(whole.coder(coder).width):
            for ours, theirs in zip(
                split.coder(coder).activations(latent), whole.coder(coder).activations(latent), strict=True
            ):
                np.testing.assert_array_equal(ours, theirs)
            num_activations += len(theirs)
        assert num_activations > 1000


@pytest.mark.parametrize("device_map", [MIXED, MOSTLY_DISK])
def test_parts_are_where_the_map_says(tiny_subject, device_map):
    subject = load_subject(str(tiny_subject), device="cpu", device_map=json.dumps(device_map))
    for part in PARTS:
        for parameter in subject.model.get_submodule(part).parameters():
            assert parameter.device == torch.device("meta" if device_map[part] == "disk" else "cpu")
    assert subject.device == torch.device("cpu")


def test_maps_that_cannot_be(tiny_subject):
    with pytest.raises(ConfigError, match=r"device_map = '{model: 0}' is no JSON .*; expected one such as"):
        load_subject(str(tiny_subject), device_map="{model: 0}")
    with pytest.raises(ConfigError, match="device = 'dusk' is not known"):
        load_subject(str(tiny_subject), device_map='{"": "dusk"}')
    with pytest.raises(InputError, match=r"cannot be loaded with the device map .*; each part of it needs one place"):
        load_subject(str(tiny_subject), device="cpu", device_map='{"": "cpu", "lm_head": "disk"}')
