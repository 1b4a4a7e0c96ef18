"""Promoted and suppressed tokens: against the model's own modules, one latent at a time; norms of Gemma 2; padding rows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from autointerp.errors import InputError
from autointerp.subject import logits
from autointerp.subject.logits import token_logits

D, V = 16, 70


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=D,
            num_hidden_layers=2,
            num_attention_heads=2,
            head_dim=8,
            num_key_value_heads=2,
        )
    )


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=D, n_layer=2, n_head=2, n_positions=16))


def gemma2():
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=D,
            num_hidden_layers=2,
            num_attention_heads=2,
            head_dim=8,
            num_key_value_heads=2,
        )
    )


def subject_of(make):
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return SimpleNamespace(model=model, name="tiny")


def expected(model, row, norms, is_token, k):
    with torch.no_grad():
        for norm in norms:
            row = norm(row)
        values = model.get_output_embeddings().weight @ row
    values = (values - values[torch.from_numpy(is_token)].mean()).numpy()
    ids = sorted(np.flatnonzero(is_token).tolist(), key=lambda i: -values[i])
    return ids[:k], ids[::-1][:k], values


CASES = {
    "llama residual": (llama, "model.layers.0@out", lambda m: [m.model.norm]),
    "llama mlp": (llama, "model.layers.0.mlp@out", lambda m: [m.model.norm]),
    "llama attention": (llama, "model.layers.0.self_attn@out", lambda m: [m.model.norm]),
    "gpt2 residual": (gpt2, "transformer.h.1@out", lambda m: [m.transformer.ln_f]),
    "gemma2 residual": (gemma2, "model.layers.1@out", lambda m: [m.model.norm]),
    "gemma2 transcoder": (
        gemma2,
        "model.layers.1.mlp@out",
        lambda m: [m.model.layers[1].post_feedforward_layernorm, m.model.norm],
    ),
    "gemma2 attention": (
        gemma2,
        "model.layers.0.self_attn@out",
        lambda m: [m.model.layers[0].post_attention_layernorm, m.model.norm],
    ),
    "gemma2 what an mlp reads": (gemma2, "model.layers.1.mlp@in", lambda m: [m.model.norm]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_tokens_are_those_of_the_models_own_modules(case, block, monkeypatch):
    make, hookpoint, norms = CASES[case]
    subject = subject_of(make)
    monkeypatch.setattr(logits, "_BLOCK_BYTES", block)
    monkeypatch.setattr(logits, "_VOCABULARY_ROWS", 32)
    rows = torch.randn(7, D)
    is_token = np.arange(60) % 10 != 3  # shorter than the unembedding, with holes
    blocks = list(token_logits(subject, rows, written_to=hookpoint, is_token=is_token, num_tokens=5))
    assert sum(len(b.promoted) for b in blocks) == 7
    found = [
        (b.promoted[i], b.promoted_logits[i], b.suppressed[i], b.suppressed_logits[i])
        for b in blocks
        for i in range(len(b.promoted))
    ]
    padded = np.append(is_token, np.zeros(10, bool))
    for row, (up, up_values, down, down_values) in zip(rows, found, strict=True):
        most, least, values = expected(subject.model, row, norms(subject.model), padded, 5)
        assert up.tolist() == most and down.tolist() == least
        np.testing.assert_allclose(up_values, values[most], atol=1e-4)
        np.testing.assert_allclose(down_values, values[least], atol=1e-4)


def test_a_small_vocabulary_gives_all_it_has():
    [block] = token_logits(
        subject_of(llama), torch.randn(2, D), written_to="model.layers.0@out", is_token=np.ones(V, bool), num_tokens=500
    )
    assert block.promoted.shape == (2, V)
    assert (block.promoted[0] == block.suppressed[0][::-1]).all()


def test_what_is_not_written_to_the_residual_stream():
    with pytest.raises(InputError, match="writes vectors of width 9 to h@out and the residual stream of tiny has width 16"):
        list(token_logits(subject_of(llama), torch.randn(2, 9), written_to="h@out", is_token=np.ones(V, bool)))


def test_bfloat16_weights_are_read_as_float32():
    subject = subject_of(gpt2)
    subject.model.to(torch.bfloat16)
    rows = torch.randn(3, D)
    [block] = token_logits(subject, rows, written_to="transformer.h.0@out", is_token=np.ones(V, bool), num_tokens=3)
    exact = subject.model.float()
    for i, row in enumerate(rows):
        assert block.promoted[i].tolist() == expected(exact, row, [exact.transformer.ln_f], np.ones(V, bool), 3)[0]
