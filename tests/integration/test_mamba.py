"""A recurrent subject from the command line: what is in the store against a plain forward pass of each context alone."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import MambaForCausalLM

from autointerp.cli.main import main
from autointerp.store.reader import open_store
from tests.tiny import TEXTS, tiny_mamba, tiny_sparsify

CTX_LEN, K = 32, 4


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return tiny_mamba(tmp_path_factory.mktemp("mamba"))


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    return tiny_sparsify(tmp_path_factory.mktemp("coder"), k=K, hookpoint="layers.1")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": TEXTS[i % 4] * (1 + i % 3) + str(i)}) + "\n" for i in range(24)))
    return path


def run(*args):
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert stop.value.code == 0


def by_hand(subject, coder, store):
    """Return {(position, latent): value}, without any of the package's code."""
    model = MambaForCausalLM.from_pretrained(subject, dtype=torch.float32).eval()
    tensors = load_file(coder / "sae.safetensors")
    found, caught = {}, []
    model.backbone.layers[1].register_forward_hook(lambda m, a, out: caught.append(out))
    for index, length in enumerate(store.context_lengths.tolist()):
        tokens = store.tokens[index * CTX_LEN : index * CTX_LEN + length].astype(np.int64).tolist()
        with torch.no_grad():
            model(torch.tensor([[0, *tokens]]))
        for t, x in enumerate(caught[-1][0, 1:]):
            pre = ((x - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]).relu()
            values, latents = pre.topk(K)
            rows = zip(latents.tolist(), values.tolist(), strict=True)
            found |= {(index * CTX_LEN + t, latent): value for latent, value in rows if value}
    return found


@pytest.mark.parametrize("hookpoint", ["", "@@layers.1", "@@blocks.1.hook_resid_post"])
def test_a_store_of_a_mamba_equals_plain_forward_passes(subject, coder, corpus, tmp_path, hookpoint):
    run(
        "cache", "--subject", subject, "--corpus", corpus, "--coder", f"sae={coder}{hookpoint}", "--ctx-len", CTX_LEN,
        "--tokens", "1k", "--device", "cpu", "--force", "--out", tmp_path / "store", "--set", "corpus.packing=document",
        "--set", "batch_tokens=256",
    )  # fmt: skip
    store = open_store(tmp_path / "store")
    assert len(set(store.context_lengths.tolist())) > 3, "contexts of one length would not show what padding does"
    reader = store.coder("sae")
    assert reader.record.hookpoints == ("backbone.layers.1@out",)
    found = {}
    for latent in range(reader.width):
        positions, values = reader.activations(latent)
        found |= {(int(p), latent): float(v) for p, v in zip(positions, values, strict=True)}
    wanted = by_hand(subject, coder, store)
    # A tie at the edge of the top k may fall either way with another batch; none is large.
    assert len(wanted) > 1000 and len(found.keys() ^ wanted.keys()) <= len(wanted) * 1e-3
    both = found.keys() & wanted.keys()
    assert [found[key] for key in both] == pytest.approx([wanted[key] for key in both], rel=2e-3, abs=2e-3)
