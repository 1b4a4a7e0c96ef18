"""What is read at each published hook, against each architecture's block computed by hand from its weights.

The oracle takes the block's input from the model's own hidden states and the attention's heads from the one hook that cannot be
recomputed in a line; everything after that is written out here, and must end in the model's own next hidden state.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from autointerp.coders.inputs import LayerNorm, Rms
from autointerp.errors import InputError
from autointerp.subject.hooks import read_hookpoints
from autointerp.subject.model import load_subject
from autointerp.subject.published import PublishedHook, published_hookpoint
from tests.tiny import tiny_tokenizer

D, HEADS, HEAD_DIM, LAYERS = 24, 3, 10, 3
BASE = {
    "vocab_size": 61, "hidden_size": D, "intermediate_size": 37, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
GROUPED = BASE | {"num_key_value_heads": 1, "head_dim": HEAD_DIM}
GPT2 = {"vocab_size": 61, "n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "n_inner": 37}
VISION = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
GEMMA3 = GROUPED | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_experts_per_tok": 2}
MODELS = {
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 4}),
    "qwen2": ("Qwen2", BASE | {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3", GROUPED),
    "gemma": ("Gemma", GROUPED),
    "gemma2": ("Gemma2", GROUPED | {"sliding_window": 4}),
    "gpt2": ("GPT2", GPT2),
    "gpt_neox": ("GPTNeoX", BASE),
    "gpt_neox_sequential": ("GPTNeoX", BASE | {"use_parallel_residual": False}),
    "mamba": ("Mamba", {"vocab_size": 61, "hidden_size": D, "num_hidden_layers": LAYERS, "state_size": 4}),
    "qwen3_moe": ("Qwen3Moe", GROUPED | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 12}),
    "gpt_oss": ("GptOss", GROUPED | EXPERTS | {"num_local_experts": 4, "intermediate_size": 36}),
    "olmo2": ("Olmo2", BASE),
}
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(1, 61, (2, 11)))


def build(name):
    torch.manual_seed(0)
    if name == "gemma3":
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GEMMA3))
    elif name == "gemma3_multimodal":
        config = transformers.Gemma3Config(text_config=GEMMA3, vision_config=VISION, mm_tokens_per_image=4)
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        family, values = MODELS[name]
        config = getattr(transformers, f"{family}Config")(**values)
        model = getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # gains and biases too, which models start at one and zero
            parameter.normal_(std=0.4)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def models():
    return cache(build)


@dataclass
class Block:
    """The parts of one block, by what they are called in each architecture."""

    model: torch.nn.Module
    index: int

    @property
    def name(self):
        return self.model.config.get_text_config().model_type

    @property
    def path(self):
        kind = type(self.model).__name__
        if kind == "Gemma3ForConditionalGeneration":
            return f"model.language_model.layers.{self.index}"
        return {"GPT2LMHeadModel": "transformer.h", "GPTNeoXForCausalLM": "gpt_neox.layers"}.get(kind, "model.layers") + (
            f".{self.index}"
        )

    def norm(self, which):
        """Return (gain, bias, eps) of a norm, the gain as the number that is multiplied with."""
        module = self.model.get_submodule(f"{self.path}.{which}")
        config = self.model.config.get_text_config()
        eps = {"gpt2": "layer_norm_epsilon", "gpt_neox": "layer_norm_eps"}.get(self.name, "rms_norm_eps")
        gain = 1 + module.weight if self.name.startswith("gemma") else module.weight
        return gain, getattr(module, "bias", None), getattr(config, eps)

    def linear(self, which, x):
        module = self.model.get_submodule(f"{self.path}.{which}")
        weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        return F.linear(x, weight, module.bias)


def rms(x, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def layer_norm(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def by_hand(block, pre, z):
    """Return what each name stands for in a block that gets `pre`, with heads `z`."""
    if block.name in ("gpt2", "gpt_neox"):
        return layer_norm_block(block, pre, z)
    has_post_norms = block.name in ("gemma2", "gemma3_text")
    gain1, _, eps = block.norm("input_layernorm")
    attn_out = block.linear("self_attn.o_proj", z)
    if has_post_norms:
        gain, _, _ = block.norm("post_attention_layernorm")
        attn_out = gain * rms(attn_out, eps)
    mid = pre + attn_out
    gain2, _, _ = block.norm("pre_feedforward_layernorm" if has_post_norms else "post_attention_layernorm")
    mlp_in = gain2 * rms(mid, eps)
    found = {"hook_resid_mid": mid, "hook_attn_out": attn_out, "mlp.hook_in": mlp_in, "ln2.hook_normalized": rms(mid, eps)}
    found |= {"ln1.hook_normalized": rms(pre, eps), "hook_mlp_in": mlp_in if block.name == "gemma3_text" else mid}
    if block.name in ("gpt_oss", "qwen3_moe"):
        mlp = block.model.get_submodule(f"{block.path}.mlp")(mlp_in)
        mlp_raw = mlp[0] if isinstance(mlp, tuple) else mlp
    else:
        gate = block.linear("mlp.gate_proj", mlp_in)
        gate = F.gelu(gate, approximate="tanh") if block.name.startswith("gemma") else F.silu(gate)
        found["mlp.hook_post"] = gate * block.linear("mlp.up_proj", mlp_in)
        mlp_raw = block.linear("mlp.down_proj", found["mlp.hook_post"])
    mlp_out = mlp_raw
    if has_post_norms:
        gain, _, _ = block.norm("post_feedforward_layernorm")
        mlp_out = gain * rms(mlp_raw, eps)
    return found | {"mlp.hook_out": mlp_raw, "hook_mlp_out": mlp_out, "hook_resid_post": mid + mlp_out}


def layer_norm_block(block, pre, z):
    is_neox = block.name == "gpt_neox"
    is_parallel = is_neox and block.model.config.use_parallel_residual
    attn_out = block.linear("attention.dense" if is_neox else "attn.c_proj", z)
    mid = pre + attn_out
    read = pre if is_parallel else mid
    gain, bias, eps = block.norm("post_attention_layernorm" if is_neox else "ln_2")
    mlp_in = gain * layer_norm(read, eps) + bias
    up = block.linear("mlp.dense_h_to_4h" if is_neox else "mlp.c_fc", mlp_in)
    post = F.gelu(up) if is_neox else F.gelu(up, approximate="tanh")
    mlp_out = block.linear("mlp.dense_4h_to_h" if is_neox else "mlp.c_proj", post)
    found = {"hook_attn_out": attn_out, "mlp.hook_in": mlp_in, "mlp.hook_post": post, "hook_resid_post": mid + mlp_out}
    found |= {"ln1.hook_normalized": layer_norm(pre, eps), "ln2.hook_normalized": layer_norm(read, eps), "hook_mlp_in": read}
    return found | {"mlp.hook_out": mlp_out, "hook_mlp_out": mlp_out} | ({} if is_parallel else {"hook_resid_mid": mid})


def read(model, name):
    """Return the tensor of a published name: what is read, after the rules."""
    hook = published_hookpoint(name, model)
    x = read_hookpoints(model, TOKENS, [hook.hookpoint])[hook.hookpoint]
    for rule in hook.inputs:
        x = rule.apply(x.flatten(0, 1))[0].view(x.shape)
    return x


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


def hidden_states(model):
    return model(input_ids=TOKENS, output_hidden_states=True, use_cache=False).hidden_states


BLOCKS = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_multimodal", "gpt2", "gpt_neox",
    "gpt_neox_sequential", "qwen3_moe", "gpt_oss",
]  # fmt: skip


class TestEveryHook:
    @pytest.mark.parametrize("index", range(LAYERS))
    @pytest.mark.parametrize("family", BLOCKS)
    def test_of_a_block(self, models, family, index):
        model = models(family)
        hidden = hidden_states(model)
        z = read(model, f"blocks.{index}.attn.hook_z")
        assert z.shape == (2, 11, D if family in ("qwen2", "gpt2") or "neox" in family else HEADS * HEAD_DIM)
        wanted = by_hand(Block(model, index), hidden[index], z) | {"hook_resid_pre": hidden[index]}
        for name, tensor in wanted.items():
            close(read(model, f"blocks.{index}.{name}"), tensor)
        if index + 1 < LAYERS:  # the last of the hidden states has gone through the final norm
            close(wanted["hook_resid_post"], hidden[index + 1])
        apart = {name: tensor for name, tensor in wanted.items() if tensor.shape[-1] == D}
        same = {frozenset((a, b)) for a in apart for b in apart if a < b and torch.allclose(apart[a], apart[b], atol=1e-2)}
        allowed = {frozenset(pair) for pair in SAME.get(family, SAME[None])}
        assert same == allowed, "two hooks that should differ carry the same, so this test could not tell them apart"

    @pytest.mark.parametrize("family", [*BLOCKS, "mamba"])
    def test_of_the_embedding_and_the_end_of_the_last_block(self, models, family):
        model = models(family)
        rows = model.get_input_embeddings().weight[TOKENS]
        close(read(model, "hook_embed"), rows * D**0.5 if family.startswith("gemma") else rows)
        last, norm = read(model, f"blocks.{LAYERS - 1}.hook_resid_post"), FINAL.get(family, "model.norm")
        close(model.get_submodule(norm)(last), hidden_states(model)[-1])

    def test_of_a_recurrent_model(self, models):
        model = models("mamba")
        hidden = hidden_states(model)  # in these, block i's output is at i, and the last comes again after the final norm
        for index in range(LAYERS):
            before = read(model, f"blocks.{index}.hook_resid_pre")
            close(before, read(model, f"blocks.{index - 1}.hook_resid_post") if index else model.backbone.embeddings(TOKENS))
            block = model.backbone.layers[index]
            normed = block.norm.weight * rms(before, model.config.layer_norm_epsilon)
            after = read(model, f"blocks.{index}.hook_resid_post")
            close(after, before + block.mixer(normed))
            assert any(torch.allclose(after, state, atol=1e-5) for state in hidden)
        with pytest.raises(InputError, match=r"no 'blocks.1.hook_mlp_out' is known of a mamba model, .*; did you mean"):
            published_hookpoint("blocks.1.hook_mlp_out", model)

    @pytest.mark.parametrize("family", [*BLOCKS, "mamba", "olmo2"])
    def test_padding_on_the_right_changes_nothing(self, models, family):
        model = models(family)
        hookpoint = published_hookpoint(f"blocks.{LAYERS - 1}.hook_resid_post", model).hookpoint
        padded = torch.cat([TOKENS, torch.zeros(2, 6, dtype=torch.int64)], dim=1)
        whole = read_hookpoints(model, padded, [hookpoint])[hookpoint]
        close(whole[:, :11], read_hookpoints(model, TOKENS, [hookpoint])[hookpoint])
        other = torch.cat([TOKENS, TOKENS[:, :6].flip(1)], dim=1)
        close(read_hookpoints(model, other, [hookpoint])[hookpoint][:, :11], whole[:, :11])

    @pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox"])
    def test_attention_is_given_no_mask_and_may_use_its_fast_kernels(self, models, family, monkeypatch):
        model, masks, attend = models(family), [], F.scaled_dot_product_attention

        def noted(*args, attn_mask=None, **kwargs):
            masks.append(attn_mask)
            return attend(*args, attn_mask=attn_mask, **kwargs)

        monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
        hookpoint = published_hookpoint(f"blocks.{LAYERS - 1}.hook_resid_post", model).hookpoint
        read_hookpoints(model, TOKENS, [hookpoint])
        assert masks == [None] * LAYERS

    @pytest.mark.parametrize("family", BLOCKS)
    def test_all_at_once_is_one_at_a_time(self, models, family):
        model = models(family)
        known = ("hook_resid_pre", "hook_attn_out", "attn.hook_z", "ln2.hook_normalized", "mlp.hook_in", "mlp.hook_out")
        names = [f"blocks.{index}.{name}" for index in (2, 0) for name in (*known, "hook_mlp_out", "hook_resid_post")]
        hookpoints = [published_hookpoint(name, model).hookpoint for name in names]
        at_once = read_hookpoints(model, TOKENS, hookpoints)
        assert at_once.keys() == set(hookpoints)
        for hookpoint, tensor in at_once.items():
            assert torch.equal(tensor, read_hookpoints(model, TOKENS, [hookpoint])[hookpoint])

    @pytest.mark.parametrize("family", [*BLOCKS, "mamba", "olmo2"])
    def test_the_forward_pass_stops_there(self, models, family):
        model, ran = models(family), []
        handle = model.get_output_embeddings().register_forward_pre_hook(lambda m, a: ran.append(m))
        last = published_hookpoint(f"blocks.{LAYERS - 2}.hook_resid_post", model)
        after = model.get_submodule(last.hookpoint.removesuffix("@out").replace(str(LAYERS - 2), str(LAYERS - 1)))
        other = after.register_forward_pre_hook(lambda m, a: ran.append(m))
        read_hookpoints(model, TOKENS, [last.hookpoint])
        handle.remove()
        other.remove()
        assert not ran


FINAL = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm", "mamba": "backbone.norm_f"}
FINAL |= {"gpt_neox_sequential": "gpt_neox.final_layer_norm", "gemma3_multimodal": "model.language_model.norm"}
_RAW = ("hook_mlp_in", "hook_resid_mid")
_MLP = ("hook_mlp_out", "mlp.hook_out")
SAME = {
    None: [_RAW, _MLP],
    "gemma2": [_RAW],
    "gemma3": [("hook_mlp_in", "mlp.hook_in")],
    "gemma3_multimodal": [("hook_mlp_in", "mlp.hook_in")],
    "gpt_neox": [("hook_mlp_in", "hook_resid_pre"), _MLP, ("ln1.hook_normalized", "ln2.hook_normalized")],
}


class TestNames:
    def test_gemma_scope_2_says_input_and_output(self, models):
        for family, prefix in (("gemma3", "model"), ("gemma3_multimodal", "model.language_model")):
            for published, hookpoint in (
                ("model.layers.1.output", "layers.1@out"),
                ("model.layers.1.pre_feedforward_layernorm.output", "layers.1.pre_feedforward_layernorm@out"),
                ("model.layers.1.self_attn.o_proj.input", "layers.1.self_attn.o_proj@in"),
                ("layers.1.mlp", "layers.1.mlp@out"),
                ("model.language_model.layers.1.mlp@in", "layers.1.mlp@in"),
            ):
                assert published_hookpoint(published, models(family)) == PublishedHook(f"{prefix}.{hookpoint}")
        assert published_hookpoint("layers.1.mlp", models("llama"), default_side="in").hookpoint == "model.layers.1.mlp@in"

    def test_names_without_a_block_get_one(self, models):
        found = published_hookpoint("hook_resid_mid", models("gemma2"), layer=2)
        assert found == PublishedHook("model.layers.2.pre_feedforward_layernorm@in")
        assert published_hookpoint("mlp.hook_in", models("qwen3"), layer=0).hookpoint.endswith("0.post_attention_layernorm@out")
        with pytest.raises(
            InputError, match=r"'mlp.hook_in' has no number of a block; expected one such as 'blocks.5.mlp.hook"
        ):
            published_hookpoint("mlp.hook_in", models("qwen3"))

    def test_a_multimodal_subject_loaded_from_a_folder(self, models, tmp_path):
        models("gemma3_multimodal").save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        subject = load_subject(str(tmp_path), device="cpu")
        assert type(subject.model) is transformers.Gemma3ForConditionalGeneration and subject.max_context == 64
        assert subject.resolve("blocks.1.hook_resid_post") == "model.language_model.layers.1@out"
        assert subject.resolve("model.layers.1.output") == "model.language_model.layers.1@out"
        assert subject.widths([subject.resolve("blocks.2.attn.hook_z")]).popitem()[1] == HEADS * HEAD_DIM

    @pytest.mark.parametrize("family", ["gemma2", "gpt2"])
    def test_the_bare_model_has_the_same(self, models, family):
        model = models(family)
        bare = getattr(model, model.base_model_prefix)
        for name in ("blocks.1.hook_resid_mid", "blocks.1.attn.hook_z", "hook_embed"):
            inner, outer = published_hookpoint(name, bare), published_hookpoint(name, model)
            assert outer.hookpoint == f"{model.base_model_prefix}.{inner.hookpoint}"
        assert published_hookpoint(outer.hookpoint, bare) == inner

    def test_the_norms_own_epsilon_comes_along(self):
        config = transformers.LlamaConfig(**GROUPED, rms_norm_eps=0.125)
        hook = published_hookpoint("blocks.1.ln2.hook_normalized", transformers.LlamaForCausalLM(config))
        assert hook == PublishedHook("model.layers.1.post_attention_layernorm@in", (Rms(0.125),))
        config = transformers.GPT2Config(**GPT2, layer_norm_epsilon=0.25)
        hook = published_hookpoint("blocks.1.ln2.hook_normalized", transformers.GPT2LMHeadModel(config))
        assert hook == PublishedHook("transformer.h.1.ln_2@in", (LayerNorm(0.25),))

    @pytest.mark.parametrize(
        ("family", "name", "sentence"),
        [
            ("llama", "blocks.1.hook_resid_pots", r"known of a llama model, .*; did you mean 'blocks.1.hook_resid_post'\?"),
            ("llama", "blocks.3.hook_resid_post", "is of block 3, and the subject has 3, counted from 0"),
            ("llama", "blocks.1.hook_resid_post@out", r"did you mean 'blocks.1.hook_resid_post'\?"),
            ("llama", "hook_embd", "'hook_embd' has no number of a block"),
            ("llama", "model.layer.1.output", r"no module 'model.layer.1' .*; did you mean 'model.layers.1'\?"),
            ("gpt_neox", "blocks.1.hook_resid_mid", "is known of a gpt_neox model with parallel attention and MLP"),
            ("qwen3_moe", "blocks.1.mlp.hook_post", "is known of a qwen3_moe model"),
            ("olmo2", "blocks.1.hook_resid_mid", "is known of a olmo2 model, where a module's own path, as MODULE.PATH@in or"),
            ("olmo2", "hook_embed", "known: blocks.0.hook_resid_post, blocks.0.hook_resid_pre$"),
        ],
    )
    def test_near_misses(self, models, family, name, sentence):
        with pytest.raises(InputError, match=sentence):
            published_hookpoint(name, models(family))

    def test_any_model_has_ends_of_blocks(self, models):
        model = models("olmo2")
        hidden = hidden_states(model)
        for index in range(LAYERS - 1):
            assert torch.equal(read(model, f"blocks.{index}.hook_resid_pre"), hidden[index])
            assert torch.equal(read(model, f"blocks.{index}.hook_resid_post"), hidden[index + 1])
