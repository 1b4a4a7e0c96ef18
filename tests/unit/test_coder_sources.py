"""Coders that come from no published file: neurons, given directions, random directions, against slow equations."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from autointerp.coders.activations import Relu
from autointerp.coders.coder import Coder, CoderSpec
from autointerp.coders.inputs import UnitNorm
from autointerp.coders.load import load_coder
from autointerp.coders.random_coder import random_coder
from autointerp.errors import InputError, StoreError
from autointerp.subject.hooks import read_hookpoints
from autointerp.subject.model import Subject
from autointerp.subject.neurons import neurons
from tests.tiny import tiny_model


def as_subject(model):
    model.eval().requires_grad_(False)
    return Subject(
        model=model, tokenizer=None, name="tiny", revision=None, weights_digest="sha256:0", quantization=None, dtype="float32"
    )


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def neox():
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
            max_position_embeddings=16, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


FAMILIES = {
    "llama": (lambda: tiny_model(d=32, layers=2, vocab_size=50), "layers.1.mlp", "model.layers.1.mlp.down_proj", 64),
    "gpt2": (gpt2, "h.1.mlp", "transformer.h.1.mlp.c_proj", 32),
    "neox": (neox, "gpt_neox.layers.1.mlp", "gpt_neox.layers.1.mlp.dense_4h_to_h", 20),
}
TOKENS = torch.tensor([[3, 7, 11, 2, 40, 5, 9]])


@pytest.fixture(params=FAMILIES)
def family(request):
    make, place, path, width = FAMILIES[request.param]
    return as_subject(make()), place, path, width


def slow_top(values, k):
    """The k largest of a row that are positive, by sorting in Python."""
    ranked = sorted(enumerate(values.tolist()), key=lambda item: -item[1])[:k]
    return {index: value for index, value in ranked if value > 0}


def rows_of(acts, num):
    rows = [{} for _ in range(num)]
    for row, latent, value in zip(acts.rows.tolist(), acts.latents.tolist(), acts.values.tolist(), strict=True):
        assert latent not in rows[row]
        rows[row][latent] = value
    return rows


class TestNeurons:
    def test_the_k_largest_of_what_the_down_projection_reads(self, family):
        subject, place, path, width = family
        coder = neurons(subject, f"neurons:{place}?k=5")
        assert coder.encoder_LD is None and coder.spec.hookpoint == f"{path}@in" and coder.spec.target == f"{path}@out"
        assert (coder.spec.width, coder.spec.d_in, coder.spec.k) == (width, width, 5)
        x = read_hookpoints(subject.model, TOKENS, [f"{path}@in"])[f"{path}@in"][0]
        assert (x < 0).any()
        before = x.clone()
        for found, values in zip(rows_of(coder.encode(x), len(x)), x, strict=True):
            assert found == slow_top(values, 5) and len(found) <= 5
        assert torch.equal(x, before)  # what other coders read from the same tensor

    @pytest.mark.parametrize("rotate", [None, 3])
    def test_decoder_rows_are_the_columns_of_the_down_projection(self, family, rotate):
        subject, place, path, width = family
        coder = neurons(subject, f"neurons:{place}?k=4" + (f"&rotate={rotate}" if rotate is not None else ""))
        x = torch.randn(6, width)
        everything = x if coder.encoder_LD is None else x @ coder.encoder_LD.T
        written = everything @ coder.decoder_LE + coder.decoder_bias_E
        assert written.numpy() == pytest.approx(subject.model.get_submodule(path)(x).numpy(), abs=1e-4)

    def test_rotation(self):
        subject = as_subject(tiny_model(d=32, layers=2, vocab_size=50))
        first, again, other = (neurons(subject, f"neurons:layers.0.mlp?k=6&rotate={seed}") for seed in (0, 0, 1))
        assert torch.equal(first.encoder_LD, again.encoder_LD) and not torch.allclose(first.encoder_LD, other.encoder_LD)
        assert torch.allclose(first.encoder_LD @ first.encoder_LD.T, torch.eye(64), atol=1e-5)
        assert (
            first.spec.digest == again.spec.digest != other.spec.digest != neurons(subject, "neurons:layers.0.mlp").spec.digest
        )
        x = torch.randn(4, 64)
        for found, values in zip(rows_of(first.encode(x), 4), x, strict=True):
            wanted = slow_top(torch.tensor([float(row @ values) for row in first.encoder_LD]), 6)
            assert found == pytest.approx(wanted, abs=1e-5)

    def test_named_by_mlp_block_or_projection(self):
        subject = as_subject(tiny_model(d=32, layers=2, vocab_size=50))
        places = ("layers.1.mlp", "layers.1", "model.layers.1.mlp.down_proj")
        assert {neurons(subject, f"neurons:{place}").spec.hookpoint for place in places} == {"model.layers.1.mlp.down_proj@in"}
        assert neurons(subject, "neurons:layers.1.mlp").spec.k == 32

    @pytest.mark.parametrize(
        ("source", "sentence"),
        [
            ("neurons:layers.7.mlp", "the subject has no module 'layers.7.mlp'"),
            (
                "neurons:layers.1.self_attn",
                r"has no down projection \(.*\); name one of its linear modules: model.layers.1.self",
            ),
            ("neurons:model.norm", "no linear module at all"),
            ("neurons:layers.1.mlp?k=65", r"keeps k = 65 neurons and model.layers.1.mlp.down_proj reads 64; expected 1 to 64"),
            ("neurons:layers.1.mlp?k=0", "keeps k = 0 neurons"),
            ("neurons:layers.1.mlp?k=many", "k = 'many'; expected a whole number"),
            ("neurons:layers.1.mlp?rotat=1", "no option 'rotat'; did you mean 'rotate'"),
        ],
    )
    def test_what_cannot_be_made(self, source, sentence):
        with pytest.raises(InputError, match=sentence):
            neurons(as_subject(tiny_model(d=32, layers=2, vocab_size=50)), source)

    def test_need_a_subject(self):
        with pytest.raises(InputError, match="made from a subject's weights"):
            load_coder("neurons:layers.1.mlp?k=4")


def test_identity_in_chunks_of_latents_equals_the_whole(monkeypatch):
    monkeypatch.setattr("autointerp.coders.coder.ACTS_PER_CHUNK", 1)
    width = 20_000
    x = torch.randn(3, width)
    coder = Coder(
        spec=CoderSpec(format="", source="", digest="", width=width, d_in=width, d_out=2, activation="relu"),
        encoder_LD=None,
        encoder_bias_L=torch.linspace(-1, 1, width),
        decoder_LE=torch.zeros(width, 2),
        decoder_bias_E=torch.zeros(2),
        activation=Relu(),
    )
    assert torch.equal(coder.encode_dense(x), (x + coder.encoder_bias_L).clamp(min=0))
    assert len(list(coder.encode_chunks(x))) > 1


DIRECTIONS = torch.tensor([[1.0, 0, -2], [0.5, 0.5, 0.5]])
BIAS = torch.tensor([0.25, -1])
X = torch.tensor([[1.0, 2, 0], [0, 0, 1], [-2, 3, 1], [0.0, 0, 0]])


def slow_directions(threshold, bias=BIAS):
    """Every row's latents by the equation, one product at a time."""
    rows = []
    for x in X.tolist():
        found = {}
        for i, direction in enumerate(DIRECTIONS.tolist()):
            p = sum(a * b for a, b in zip(x, direction, strict=True)) + float(bias[i])
            if p > threshold[i]:
                found[2 * i] = p
            if -p > threshold[i]:
                found[2 * i + 1] = -p
        rows.append(found)
    return rows


def saved(path, *, names=None, metadata=None, **tensors):
    values = {"directions": DIRECTIONS, "bias": BIAS} | tensors
    values = {name: tensor for name, tensor in values.items() if tensor is not None}
    if path.suffix == ".npz":
        arrays = {name: tensor.numpy() for name, tensor in values.items()}
        np.savez(path, **arrays, **({} if names is None else {"names": np.array(names)}))
    else:
        save_file(values, path, metadata=(metadata or {}) | ({} if names is None else {"names": json.dumps(names)}))
    return path


class TestDirections:
    @pytest.mark.parametrize("ending", ["safetensors", "npz"])
    def test_two_signs_are_two_latents(self, tmp_path, ending):
        file = saved(tmp_path / f"a.{ending}", names=["truth", "\u00e4"], threshold=torch.tensor([0.5, 0]))
        coder = load_coder(f"directions:{file}")
        assert coder.spec.labels == ("+truth", "-truth", "+\u00e4", "-\u00e4") and coder.spec.width == 4
        assert rows_of(coder.encode(X), 4) == slow_directions([0.5, 0])
        assert torch.equal(coder.decoder_rows(), torch.stack([DIRECTIONS[0], -DIRECTIONS[0], DIRECTIONS[1], -DIRECTIONS[1]]))

    def test_threshold_of_all(self, tmp_path):
        file = saved(tmp_path / "a.npz", threshold=torch.tensor([9.0, 9]))
        coder, other = load_coder(f"directions:{file}?threshold=0.75"), load_coder(f"directions:{file}")
        assert rows_of(coder.encode(X), 4) == slow_directions([0.75, 0.75])
        assert coder.spec.digest == other.spec.digest and coder.spec.reading != other.spec.reading

    def test_any_name_of_the_only_matrix_and_a_hookpoint_in_the_file(self, tmp_path):
        file = saved(
            tmp_path / "a.safetensors", directions=None, bias=None, probes=DIRECTIONS, metadata={"hookpoint": "layers.1@out"}
        )
        coder = load_coder(f"directions:{file}")
        assert coder.spec.hookpoint == "layers.1@out" and coder.spec.labels == ()
        assert rows_of(coder.encode(X), 4) == slow_directions([0, 0], bias=torch.zeros(2))

    def test_what_cannot_be_read(self, tmp_path):
        cases = [
            (saved(tmp_path / "a.npz", names=["one"]), "", StoreError, "1 names for 2 directions"),
            (saved(tmp_path / "b.npz", threshold=torch.tensor([-1.0, 0])), "", StoreError, "holds negative values"),
            (saved(tmp_path / "c.npz", bias=torch.zeros(3)), "", StoreError, r"bias has shape \(3,\); expected \(2,\)"),
            (saved(tmp_path / "d.npz", directions=None), "", StoreError, r"no matrix of directions; .* found bias \(2,\)"),
            (saved(tmp_path / "e.npz", directions=DIRECTIONS[0]), "", StoreError, "no matrix of directions"),
            (saved(tmp_path / "f.npz"), "?threshold=-1", InputError, "threshold = '-1'; expected a number of at least 0"),
            (saved(tmp_path / "f.npz"), "?treshold=1", InputError, "did you mean 'threshold'"),
            (saved(tmp_path / "g.safetensors", metadata={"names": "{}"}), "", StoreError, "'names' is no JSON list"),
            (tmp_path / "h.pt", "", InputError, "expected a .safetensors or .npz file"),
            (tmp_path / "h.npz", "", StoreError, "does not exist"),
        ]
        for file, option, kind, sentence in cases:
            with pytest.raises(kind, match=sentence):
                load_coder(f"directions:{file}{option}")

    def test_pickled_names_are_refused(self, tmp_path):
        np.savez(tmp_path / "a.npz", directions=DIRECTIONS.numpy(), names=np.array(["x", None], dtype=object))
        with pytest.raises(StoreError, match="pickled objects"):
            load_coder(f"directions:{tmp_path / 'a.npz'}")


class TestRandomCoder:
    def test_unit_rows_tied_weights_and_k(self, tiny_sae):
        coder = load_coder(tiny_sae)
        control = random_coder(coder, k=4, seed=0)
        assert control.encoder_LD is control.decoder_LE and control.decoder_LE.shape == (64, 32)
        assert control.decoder_LE.norm(dim=1).numpy() == pytest.approx(np.ones(64), abs=1e-6)
        assert not torch.allclose(control.decoder_LE, coder.decoder_LE)
        x = torch.randn(5, 32)
        for found, values in zip(rows_of(control.encode(x), 5), x, strict=True):
            pre = torch.tensor([float(row @ values) for row in control.decoder_LE])
            assert found == pytest.approx(slow_top(pre, 4), abs=1e-5) and len(found) == 4
        assert (control.spec.width, control.spec.k, control.spec.hookpoint) == (64, 4, coder.spec.hookpoint)

    def test_directions_have_no_preferred_one(self, tiny_sae):
        control = random_coder(load_coder(tiny_sae), k=4, seed=0)
        cosines = control.decoder_LE @ control.decoder_LE.T - torch.eye(64)
        # 2016 pairs in 32 dimensions: the mean of cos is 0 within 5 standard errors, that of cos^2 is 1/32.
        pairs = cosines[np.triu_indices(64, 1)]
        assert abs(float(pairs.mean())) < 5 / np.sqrt(32 * len(pairs))
        assert float(pairs.pow(2).mean()) == pytest.approx(1 / 32, rel=0.2)

    def test_seed_and_coder_decide_the_draw(self, tiny_sae):
        coder = load_coder(tiny_sae)
        first, again = random_coder(coder, k=4, seed=0), random_coder(coder, k=4, seed=0)
        other = random_coder(replace(coder, spec=replace(coder.spec, digest="sha256:other")), k=4, seed=0)
        assert torch.equal(first.decoder_LE, again.decoder_LE) and first.spec.digest == again.spec.digest
        assert len({c.spec.digest for c in (first, other, random_coder(coder, k=4, seed=1))}) == 3
        assert not torch.equal(first.decoder_LE, other.decoder_LE)

    def test_reads_as_the_coder_does_and_decodes_to_the_same_space(self, tiny_transcoder):
        coder = load_coder(tiny_transcoder).reading_through(UnitNorm())
        control = random_coder(coder, k=3, seed=0)
        assert control.inputs == coder.inputs and control.spec.reading["inputs"] == ["unit_norm"]
        x = torch.randn(4, 32)
        assert [r.keys() for r in rows_of(control.encode(x), 4)] == [r.keys() for r in rows_of(control.encode(7 * x), 4)]
        assert not control.spec.is_transcoder and control.spec.target is None and control.skip_ED is None
