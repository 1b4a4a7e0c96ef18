"""The hookpoints that published coders name, found in a model of the architecture that they were trained on."""

import pytest
import torch
import transformers

from autointerp.subject.published import published_hookpoint
from tests.parity_cases import cases

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 21, "num_attention_heads": 2, "vocab_size": 16}
CONFIGS = {
    "gemma2": ("Gemma2", SMALL | {"num_key_value_heads": 1, "head_dim": 4}),
    "gemma3": ("Gemma3", SMALL | {"num_key_value_heads": 1, "head_dim": 4}),
    "llama": ("Llama", SMALL),
    "qwen3": ("Qwen3", SMALL | {"num_key_value_heads": 1, "head_dim": 4}),
    "gpt2": ("GPT2", {"n_embd": 8, "n_layer": 21, "n_head": 2, "vocab_size": 16}),
}
FOUND = {
    # name in the files: (architecture, module, rule that makes what the coder reads from what the module gives)
    "layers.5@out": ("gemma2", "model.layers.5@out", None),
    "layers.5.post_feedforward_layernorm@out": ("gemma2", "model.layers.5.post_feedforward_layernorm@out", None),
    "layers.5.self_attn.o_proj@in": ("gemma2", "model.layers.5.self_attn.o_proj@in", None),
    "layers.5.pre_feedforward_layernorm@in": ("gemma2", "model.layers.5.pre_feedforward_layernorm@in", None),
    "model.layers.17.output": ("gemma3", "model.layers.17@out", None),
    "model.layers.17.self_attn.o_proj.input": ("gemma3", "model.layers.17.self_attn.o_proj@in", None),
    "model.layers.17.pre_feedforward_layernorm.output": ("gemma3", "model.layers.17.pre_feedforward_layernorm@out", None),
    "model.layers.17.post_feedforward_layernorm.output": ("gemma3", "model.layers.17.post_feedforward_layernorm@out", None),
    "model.layers.1.pre_feedforward_layernorm.output": ("gemma3", "model.layers.1.pre_feedforward_layernorm@out", None),
    "layers.19@out": ("llama", "model.layers.19@out", None),
    "blocks.15.hook_resid_post": ("llama", "model.layers.15@out", None),
    "blocks.15.ln2.hook_normalized": ("llama", "model.layers.15.post_attention_layernorm@in", "rms"),
    "blocks.15.hook_mlp_out": ("llama", "model.layers.15.mlp@out", None),
    "blocks.1.hook_resid_mid": ("llama", "model.layers.1.post_attention_layernorm@in", None),
    "blocks.2.hook_resid_mid": ("llama", "model.layers.2.post_attention_layernorm@in", None),
    "blocks.2.hook_mlp_out": ("llama", "model.layers.2.mlp@out", None),
    "blocks.4.mlp.hook_in": ("qwen3", "model.layers.4.post_attention_layernorm@out", None),
    "blocks.4.hook_mlp_out": ("qwen3", "model.layers.4.mlp@out", None),
    "blocks.3.hook_resid_post": ("gpt2", "transformer.h.3@out", None),
    "blocks.3.hook_mlp_out": ("gpt2", "transformer.h.3.mlp@out", None),
    "blocks.5.attn.hook_z": ("gpt2", "transformer.h.5.attn.c_proj@in", None),
    "blocks.6.hook_resid_pre": ("gpt2", "transformer.h.6@in", None),
    "blocks.8.hook_resid_pre": ("gpt2", "transformer.h.8@in", None),
    "blocks.8.hook_resid_mid": ("gpt2", "transformer.h.8.ln_2@in", None),
    "blocks.8.hook_resid_post": ("gpt2", "transformer.h.8@out", None),
    "blocks.8.mlp.hook_post": ("gpt2", "transformer.h.8.mlp.c_proj@in", None),
    "blocks.8.ln2.hook_normalized": ("gpt2", "transformer.h.8.ln_2@in", "layer_norm"),
    "blocks.8.hook_mlp_out": ("gpt2", "transformer.h.8.mlp@out", None),
}
ELSEWHERE = {"saelens", "dictionary_learning", "sparsify"}


@pytest.fixture(scope="module")
def models():
    built = {}
    with torch.device("meta"):
        for name, (family, values) in CONFIGS.items():
            config = getattr(transformers, f"{family}{'Text' * (family == 'Gemma3')}Config")(**values)
            kind = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
            built[name] = getattr(transformers, kind)(config)
    return built


@pytest.mark.parametrize("name", FOUND)
def test_found(models, name):
    family, module, rule = FOUND[name]
    hook = published_hookpoint(name, models[family])
    assert hook.hookpoint == module
    assert [each.name for each in hook.inputs] == ([] if rule is None else [rule])


def test_every_name_in_the_cases_is_tested():
    manifests = [case.manifest for case in cases() if case.manifest["format"] not in ELSEWHERE]
    assert {manifest[key] for manifest in manifests for key in ("hookpoint", "target")} - {None} == FOUND.keys()
