"""Loading, hookpoints, hooks and the recorder, on a tiny random Llama."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from autointerp.coders.inputs import Rms
from autointerp.coders.load import load_coder
from autointerp.demo import bundled
from autointerp.errors import ConfigError, InputError, ResourceError
from autointerp.subject.corpus import Context
from autointerp.subject.hookpoints import resolve_hookpoint, resolve_patterns
from autointerp.subject.hooks import read_hookpoints
from autointerp.subject.model import load_subject
from autointerp.subject.recorder import Reading, Recorder, TokenFilter

LLAMA = [
    "",
    "model",
    "model.embed_tokens",
    "model.layers",
    "model.layers.0",
    "model.layers.0.mlp",
    "model.layers.1",
    "model.layers.1.mlp",
    "lm_head",
]
GEMMA3 = [
    "",
    "model",
    "model.language_model",
    "model.language_model.layers.0",
    "model.language_model.layers.0.mlp",
    "model.vision_tower.layers.0",
]
GPT2 = ["", "transformer", "transformer.wte", "transformer.h.0", "transformer.h.0.mlp"]
NEOX = ["", "gpt_neox", "gpt_neox.embed_in", "gpt_neox.layers.0", "gpt_neox.layers.0.attention"]


@pytest.fixture(scope="module")
def subject(tiny_subject):
    return load_subject(str(tiny_subject), device="cpu")


class TestLoading:
    def test_what_is_loaded(self, subject):
        assert (subject.bos_id, subject.num_embeddings, subject.max_context, subject.dtype) == (0, 400, 512, "float32")
        assert not any(parameter.requires_grad for parameter in subject.model.parameters()) and not subject.model.training

    def test_the_bundled_one_loads_with_every_transformers(self):
        tokenizer = load_subject(str(bundled("model")), device="cpu").tokenizer
        text = "def f(x):\n    return <|user|>"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.all_special_ids == list(range(7)) and tokenizer.decode(ids) == text and ids[-1] == 4

    def test_the_digest_is_of_weights_whatever_the_folder_and_the_split(self, subject, tiny_subject, tmp_path):
        import shutil

        shutil.copytree(tiny_subject, tmp_path / "copy")
        tensors = load_file(tmp_path / "copy" / "model.safetensors")
        (tmp_path / "copy" / "model.safetensors").unlink()
        names = sorted(tensors)
        for part, chosen in enumerate((names[::2], names[1::2])):
            save_file(
                {name: tensors[name] for name in chosen},
                tmp_path / "copy" / f"model-0000{part + 1}-of-00002.safetensors",
                {"format": "pt"},
            )
        weight_map = {name: f"model-0000{index % 2 + 1}-of-00002.safetensors" for index, name in enumerate(names)}
        (tmp_path / "copy" / "model.safetensors.index.json").write_text(
            __import__("json").dumps({"metadata": {}, "weight_map": weight_map})
        )
        assert load_subject(str(tmp_path / "copy"), device="cpu").weights_digest == subject.weights_digest
        from tests.tiny import tiny_subject as make

        assert load_subject(str(make(tmp_path / "other", seed=1)), device="cpu").weights_digest != subject.weights_digest

    @pytest.mark.parametrize(
        ("name", "sentence"),
        [
            ("/no/such/model", "no subject at /no/such/model: no such folder, and not a hub id"),
            ("nobody/nothing", "no subject nobody/nothing: no such folder here, and the hub did not give it"),
            ("a/b/c", "no such folder, and not a hub id"),
        ],
    )
    def test_no_such_subject(self, name, sentence):
        with pytest.raises(InputError, match=sentence):
            load_subject(name)

    def test_folders_that_hold_no_model(self, tmp_path):
        with pytest.raises(InputError, match=r"is a folder without config.json"):
            load_subject(str(tmp_path))
        (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
        with pytest.raises(InputError, match="cannot be loaded"):
            load_subject(str(tmp_path))

    def test_options_that_cannot_be(self, tiny_subject):
        with pytest.raises(ConfigError, match="dtype = 'float23' is not known; did you mean 'float32'"):
            load_subject(str(tiny_subject), dtype="float23")
        with pytest.raises(ConfigError, match="device = 'gpux' is not known"):
            load_subject(str(tiny_subject), device="gpux")
        if not torch.cuda.is_available():
            with pytest.raises(ResourceError, match="sees no CUDA device"):
                load_subject(str(tiny_subject), device="cuda")


class TestHookpoints:
    @pytest.mark.parametrize(
        ("modules", "published", "full"),
        [
            (LLAMA, "layers.1", "model.layers.1@out"),
            (LLAMA, "model.layers.1.mlp@in", "model.layers.1.mlp@in"),
            (LLAMA, "embed_tokens", "model.embed_tokens@out"),
            (GEMMA3, "layers.0.mlp@in", "model.language_model.layers.0.mlp@in"),
            (GEMMA3, "model.layers.0", "model.language_model.layers.0@out"),
            (GPT2, "h.0.mlp", "transformer.h.0.mlp@out"),
            (NEOX, "layers.0.attention", "gpt_neox.layers.0.attention@out"),
            (["", "layers.0", "layers.1"], "model.layers.1", "layers.1@out"),
        ],
    )
    def test_published_names(self, modules, published, full):
        assert resolve_hookpoint(published, modules) == full

    def test_default_side(self):
        assert resolve_hookpoint("layers.0.mlp", LLAMA, default_side="in") == "model.layers.0.mlp@in"
        assert resolve_hookpoint("layers.0.mlp@out", LLAMA, default_side="in") == "model.layers.0.mlp@out"

    def test_near_misses(self):
        with pytest.raises(InputError, match=r"no module 'model.layer.1' .*; did you mean 'model.layers.1'\?"):
            resolve_hookpoint("model.layer.1@out", LLAMA)
        with pytest.raises(InputError, match="ends in @output; expected"):
            resolve_hookpoint("layers.1@output", LLAMA)
        with pytest.raises(InputError, match=r"fits several modules \(a.x.mlp, b.x.mlp\)"):
            resolve_hookpoint("x.mlp", ["a.x.mlp", "b.x.mlp"])

    def test_globs_stay_within_a_part_and_keep_the_models_order(self):
        assert resolve_patterns(["layers.*"], LLAMA) == ["model.layers.0@out", "model.layers.1@out"]
        assert resolve_patterns(["model.layers.[1]", "layers.*.mlp@in"], LLAMA) == [
            "model.layers.0.mlp@in",
            "model.layers.1@out",
            "model.layers.1.mlp@in",
        ]
        with pytest.raises(InputError, match="no module of the subject matches"):
            resolve_patterns(["blocks.*"], LLAMA)

    def test_widths_and_what_fits_instead(self, subject):
        assert subject.widths(["model.layers.1.mlp.down_proj@in", "model.layers.1@out"]) == {
            "model.layers.1.mlp.down_proj@in": 64,
            "model.layers.1@out": 32,
        }
        with pytest.raises(
            InputError, match=r"width 64, and hookpoint model.layers.1@out of .* has width 32; .*model.layers.1.mlp"
        ):
            subject.check_width("model.layers.1@out", 64, what="coder 'sae'")
        with pytest.raises(InputError, match=r"no hookpoint of .* is 5 wide"):
            subject.check_width("model.layers.1@out", 5, what="coder 'sae'")

    def test_names_by_site(self, subject):
        assert subject.resolve("blocks.1.hook_resid_post") == "model.layers.1@out"
        assert subject.resolve("blocks.2.attn.hook_z", default_side="out") == "model.layers.2.self_attn.o_proj@in"
        assert subject.resolve("model.layers.0.mlp.input") == "model.layers.0.mlp@in"
        assert subject.published("hook_resid_mid", layer=0).hookpoint == "model.layers.0.post_attention_layernorm@in"
        subject.check_width(subject.resolve("blocks.1.mlp.hook_post"), 64, what="coder 'sae'")

    def test_what_no_module_gives_out_is_no_hookpoint_alone(self, subject):
        found = subject.published("blocks.1.ln2.hook_normalized")
        assert found.hookpoint == "model.layers.1.post_attention_layernorm@in" and found.inputs == (Rms(1e-6),)
        with pytest.raises(
            InputError, match=r"is model.layers.1.post_attention_layernorm@in after the rule rms, and no module"
        ):
            subject.resolve("blocks.1.ln2.hook_normalized")


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class TestHooks:
    def test_values_are_the_models_own_and_the_head_never_runs(self, subject):
        tokens = torch.arange(10, 34).view(2, 12)
        with torch.no_grad():
            hidden = subject.model(input_ids=tokens, output_hidden_states=True).hidden_states
        before = count_hooks(subject.model)  # transformers 5 leaves hooks of its own behind
        ran = []
        watched = [subject.model.lm_head, subject.model.get_submodule("model.layers.2")]
        handles = [module.register_forward_pre_hook(lambda m, a: ran.append(m)) for module in watched]
        seen = read_hookpoints(
            subject.model, tokens, ["model.layers.1@out", "model.layers.1@in", "model.layers.0@out", "model.layers.0@in"]
        )
        for handle in handles:
            handle.remove()
        assert not ran
        assert torch.equal(seen["model.layers.1@out"], hidden[2])
        assert torch.equal(seen["model.layers.1@in"], seen["model.layers.0@out"])
        assert torch.equal(seen["model.layers.0@in"], hidden[0])
        assert count_hooks(subject.model) == before

    def test_tuples_keywords_and_flat_batches(self):
        class Inner(torch.nn.Module):
            def forward(self, *, mask=None, hidden_states):
                return (hidden_states * 2, None)

        class Experts(torch.nn.Module):
            def forward(self, flat):
                return flat + 1

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.experts, self.never = Inner(), Experts(), Inner()
                self.embed = torch.nn.Embedding(5, 3)

            def forward(self, input_ids, use_cache):
                x = self.inner(hidden_states=self.embed(input_ids))[0]
                return self.experts(x.view(-1, 3)).view(x.shape)

        model, tokens = Model(), torch.tensor([[0, 1], [2, 3]])
        seen = read_hookpoints(model, tokens, ["inner@in", "inner@out", "experts@in", "experts@out"])
        assert torch.equal(seen["inner@out"], seen["inner@in"] * 2) and torch.equal(seen["experts@in"], seen["inner@out"])
        assert seen["experts@out"].shape == (2, 2, 3)
        with pytest.raises(InputError, match="hookpoint never@out did not fire"):
            read_hookpoints(model, tokens, ["never@out"])
        with pytest.raises(InputError, match=r"embed@in carries a tensor of shape \(2, 2\) and type torch.int64"):
            read_hookpoints(model, tokens, ["embed@in"])


def contexts_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Context(tokens=rng.integers(5, 400, n).astype(np.uint32), segments=[(i, 0)], is_template=None, documents=[])
        for i, n in enumerate(lengths)
    ]


def record(subject, coders, contexts, *, token_filter="bos", batch_tokens=64, ctx_len=16):
    readings = {name: Reading(coder, subject.resolve(coder.spec.hookpoint)) for name, coder in coders.items()}
    recorder = Recorder(
        subject, readings, ctx_len=ctx_len, token_filter=TokenFilter.parse(token_filter), batch_tokens=batch_tokens
    )
    found = {name: {} for name in coders}
    num_tokens = 0
    for size, batch in recorder.batches(contexts):
        num_tokens += size
        for acts in batch:
            assert acts.latents.dtype == np.uint32 and acts.positions.dtype == np.int64 and acts.values.dtype == np.float32
            for key in zip(acts.positions.tolist(), acts.latents.tolist(), acts.values.tolist(), strict=True):
                assert key[:2] not in found[acts.coder]
                found[acts.coder][key[:2]] = key[2]
    assert num_tokens == sum(len(context.tokens) for context in contexts)
    return found


@pytest.fixture(scope="module")
def coders(tiny_sae, tiny_transcoder):
    return {"sae": load_coder(tiny_sae), "transcoder": load_coder(tiny_transcoder)}


class TestRecorder:
    @pytest.mark.parametrize("batch_tokens", [1, 50, 1000])
    def test_equals_one_context_at_a_time(self, subject, coders, batch_tokens):
        contexts = contexts_of(16, 3, 16, 1, 9)
        found = record(subject, coders, contexts, batch_tokens=batch_tokens)
        for name, coder in coders.items():
            naive = {}
            for index, context in enumerate(contexts):
                tokens = torch.tensor([[0, *context.tokens.tolist()]])
                hookpoint = subject.resolve(coder.spec.hookpoint)
                dense = coder.encode_dense(read_hookpoints(subject.model, tokens, [hookpoint])[hookpoint][0, 1:])
                naive |= {(index * 16 + t, latent): dense[t, latent].item() for t, latent in dense.nonzero().tolist()}
            assert found[name].keys() == naive.keys() and len(naive) > 50
            assert list(found[name].values()) == pytest.approx([naive[key] for key in found[name]], rel=1e-4, abs=1e-5)

    def test_encodes_in_float32_what_a_bfloat16_subject_gives(self, tiny_subject, tiny_sae, coders):
        subject = load_subject(str(tiny_subject), device="cpu", dtype="bfloat16")
        contexts = contexts_of(16, 16, 16)
        found = record(subject, {"sae": coders["sae"]}, contexts, batch_tokens=64)["sae"]
        tokens = torch.tensor([[0, *context.tokens.tolist()] for context in contexts])
        with torch.no_grad():
            hidden = subject.model(input_ids=tokens, output_hidden_states=True).hidden_states[2][:, 1:]
        assert hidden.dtype == torch.bfloat16
        tensors = {name: tensor.double() for name, tensor in load_file(tiny_sae / "sae.safetensors").items()}
        pre = (hidden.flatten(0, 1).double() - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]
        values, latents = pre.relu().topk(4)
        wanted = {(t, int(index)): float(v) for t in range(48) for v, index in zip(values[t], latents[t], strict=True) if v > 0}
        assert found.keys() == wanted.keys() and len(wanted) > 100
        assert [found[key] for key in wanted] == pytest.approx(list(wanted.values()), rel=1e-5, abs=1e-5)

    def test_filters(self, subject, coders):
        context = contexts_of(16)[0]
        context.tokens[[2, 5]] = 0, 3
        context = Context(tokens=context.tokens, segments=[(0, 0)], is_template=np.arange(16) >= 12, documents=[])
        kept = {
            name: {position for position, _ in record(subject, coders, [context], token_filter=name)["sae"]}
            for name in ("none", "bos", "special", "template", "first:4", "special,first:4")
        }
        everything = set(range(16))
        assert kept["none"] == everything and kept["bos"] == everything - {2} and kept["special"] == everything - {2, 5}
        assert kept["template"] == set(range(12)) - {2} and kept["first:4"] == everything - {0, 1, 2, 3}
        assert kept["special,first:4"] == everything - {0, 1, 2, 3, 5}

    def test_filter_names(self):
        assert TokenFilter.parse("first:3, special").name == "special,first:3"
        assert [TokenFilter.parse(name).name for name in ("bos", "none", "template", "bos,special")] == [
            "bos",
            "none",
            "template",
            "special",
        ]
        with pytest.raises(ConfigError, match=r"'specials' is no filter; did you mean 'special'\?"):
            TokenFilter.parse("specials")

    def test_without_bos_nothing_is_prepended(self, coders, tmp_path):
        from tests.tiny import tiny_subject as make

        subject = load_subject(str(make(tmp_path, bos=False)), device="cpu")
        assert subject.bos_id is None
        context = contexts_of(8)[0]
        found = record(subject, {"sae": coders["sae"]}, [context])["sae"]
        tokens = torch.from_numpy(context.tokens.astype(np.int64))[None]
        dense = coders["sae"].encode_dense(
            read_hookpoints(subject.model, tokens, ["model.layers.1@out"])["model.layers.1@out"][0]
        )
        assert set(found) == {tuple(item) for item in dense.nonzero().tolist()}

    def test_what_does_not_fit(self, subject, coders, tmp_path):
        from tests.tiny import tiny_sparsify

        with pytest.raises(
            InputError, match=r"contexts of 512 tokens and BOS do not fit .* positions for 512; use a ctx_len of at most 511"
        ):
            record(subject, coders, [], ctx_len=512)
        wide = load_coder(tiny_sparsify(tmp_path, d=64, width=80))
        with pytest.raises(InputError, match=r"coder 'wide' reads vectors of width 64, and hookpoint model.layers.1@out"):
            record(subject, {"wide": wide}, [])
