"""SAELens: golden rows by hand, old and new configurations, what is folded, centred and refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from autointerp.coders.load import load_coder
from autointerp.errors import InputError, StoreError
from tests.coder_fixtures import B_DEC, B_ENC, JUMP, SUB, THRESHOLD, W_DEC, W_ENC, W_SKIP, D, F, X, as_rows, check

PLAIN = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
JUMP_OUT = [[-2.01758, 0.13086, 1.77930, -0.52246], [-0.91113, 1.30371, -0.10547, -0.54297]]
ALL_1 = {0: 0.75, 1: 0.78516, 2: 0.53906, 3: 0.76172, 4: 0.79688, 5: 0.55078, 6: 0.77344, 7: 0.80859}
SUB_OUT = [[-2.25195, 0.13086, 2.01367, -0.60059], [-0.62598, 0.59961, 0.54590, -0.44336]]
TOPK = [JUMP[0], {0: 0.875, 3: 0.88672, 6: 0.89844}]
TOPK_OUT = [JUMP_OUT[0], [-0.11914, 1.46094, -0.58301, -0.53418]]


def saelens(folder, tensors=PLAIN, drop=(), metadata=None, **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    settings = {"architecture": "standard", "d_in": D, "d_sae": F, "apply_b_dec_to_input": False, "dtype": "float32"} | config
    settings |= {"metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.5.hook_resid_post"} | (metadata or {})}
    (folder / "cfg.json").write_text(json.dumps({name: value for name, value in settings.items() if name not in drop}))
    return folder


def jump(**tensors):
    return PLAIN | {"threshold": THRESHOLD} | tensors


class TestGolden:
    def test_relu(self, tmp_path):
        rows = [
            {1: 1.25391, 3: 0.01172, 4: 1.26562, 6: 0.02344, 7: 1.27734},
            {0: 0.875, 1: 0.62891, 2: 0.38281, 3: 0.88672, 4: 0.64062, 5: 0.39453, 6: 0.89844, 7: 0.65234},
        ]
        outputs = [[-2.01172, 0.15430, 1.75879, -0.52539], [-0.58691, 0.98242, 0.28809, -0.57617]]
        check(load_coder(saelens(tmp_path / "a")), rows, outputs)

    def test_relu_after_subtracting_the_bias(self, tmp_path):
        check(load_coder(saelens(tmp_path / "a", apply_b_dec_to_input=True)), [SUB, ALL_1], SUB_OUT)
        # True where nothing is said.
        check(load_coder(saelens(tmp_path / "b", drop=["apply_b_dec_to_input"])), [SUB, ALL_1], SUB_OUT)

    def test_jumprelu(self, tmp_path):
        check(load_coder(saelens(tmp_path / "a", jump(), architecture="jumprelu")), JUMP, JUMP_OUT)

    def test_jumprelu_skip_transcoder(self, tmp_path):
        folder = saelens(
            tmp_path / "a",
            jump(W_skip=W_SKIP),
            architecture="jumprelu_skip_transcoder",
            d_out=D,
            metadata={"hook_name_out": "blocks.5.hook_mlp_out"},
        )
        coder = load_coder(folder)
        check(coder, JUMP, [[-1.14258, -0.11914, 1.15430, 0.35254], [-1.28613, 1.92871, -0.35547, -0.91797]])
        assert coder.spec.is_transcoder and coder.spec.target == "blocks.5.hook_mlp_out"

    def test_topk(self, tmp_path):
        coder = load_coder(saelens(tmp_path / "a", architecture="topk", k=3))
        check(coder, TOPK, TOPK_OUT)
        assert coder.spec.k == 3 and coder.spec.reading["k"] == 3

    def test_topk_rescaled_by_the_decoder_s_norms(self, tmp_path):
        rows = [{1: 1.40191, 4: 1.30458, 7: 1.23678}, {0: 0.84722, 3: 0.82945, 6: 0.84041}]
        coder = load_coder(saelens(tmp_path / "a", architecture="topk", k=3, rescale_acts_by_decoder_norm=True))
        check(coder, rows, TOPK_OUT)

    def test_layer_norm(self, tmp_path):
        rows = [{1: 1.54129, 4: 1.55301, 7: 1.56473}, {3: 0.72248, 5: 0.72111, 6: 0.73420}]
        outputs = [[-3.08977, -0.22992, 2.07560, -1.11355], [0.87386, 0.95395, -0.82618, 0.56739]]
        settings = {"architecture": "topk", "k": 3, "normalize_activations": "layer_norm", "apply_b_dec_to_input": True}
        coder = load_coder(saelens(tmp_path / "a", **settings))
        check(coder, rows, outputs)
        assert coder.spec.reading["inputs"] == ["standardise"]

    def test_constant_norm_rescale(self, tmp_path):
        rows = [
            {1: 1.21658, 3: 0.00799, 4: 1.22830, 6: 0.01971, 7: 1.24002},
            {0: 0.94404, 1: 0.67206, 2: 0.40007, 3: 0.95576, 4: 0.68378, 5: 0.41179, 6: 0.96748, 7: 0.69550},
        ]
        outputs = [[-2.01689, 0.15424, 1.76002, -0.52136], [-0.58937, 0.99567, 0.29370, -0.59547]]
        check(load_coder(saelens(tmp_path / "a", normalize_activations="constant_norm_rescale")), rows, outputs)

    def test_gated(self, tmp_path):
        index = torch.arange(F)
        tensors = {"W_enc": W_ENC, "W_dec": W_DEC, "b_dec": B_DEC, "b_gate": B_ENC}
        tensors |= {"r_mag": (index % 4 - 2) / 8, "b_mag": (index % 2) / 4 - 1 / 8}
        rows = [
            {1: 1.22812, 3: 0.26664, 4: 0.84850, 7: 1.54144},
            {0: 0.65380, 1: 0.67656, 2: 0.125, 3: 1.25815, 4: 0.36175, 5: 0.34562, 6: 0.875, 7: 0.83322},
        ]
        outputs = [[-1.85570, 0.33665, 1.56237, -0.42766], [-0.64458, 1.34638, -0.07208, -0.49288]]
        check(load_coder(saelens(tmp_path / "a", tensors, architecture="gated")), rows, outputs)

    def test_matching_pursuit_by_hand(self, tmp_path):
        # Three directions; the first takes 3 of (3, 1), then the second 1; the third never leads.
        dictionary = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, 0.8]])
        tensors = {"W_dec": dictionary, "b_dec": torch.tensor([0.5, -0.5])}
        folder = saelens(tmp_path / "a", tensors, architecture="matching_pursuit", d_in=2, d_sae=3, apply_b_dec_to_input=True)
        coder = load_coder(folder)
        x = torch.tensor([[3.5, 0.5], [-2.5, 3.5], [0.5, -0.5]])
        # (-3, 4) is five times the third direction; (0, 0) is nothing.
        assert as_rows(coder.encode(x), 3) == [{0: 3.0, 1: 1.0}, pytest.approx({2: 5.0}), {}]
        assert torch.allclose(coder.decode(coder.encode(x), x), x)


class TestConfigurations:
    def test_flat_ones_of_before_version_6(self, tmp_path):
        config = {
            "d_in": D,
            "d_sae": F,
            "hook_point": "blocks.8.hook_resid_pre",
            "model_name": "gpt2-small",
            "context_size": 128,
        }
        config |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "normalize_activations": False}
        folder = saelens(tmp_path / "a", PLAIN | {"scaling_factor": torch.ones(F)})
        (folder / "cfg.json").write_text(json.dumps(config | {"apply_b_dec_to_input": False, "prepend_bos": True}))
        spec = load_coder(f"{folder}?centre=no").spec
        assert (spec.activation, spec.k, spec.hookpoint, spec.model) == ("topk", 3, "blocks.8.hook_resid_pre", "gpt2-small")
        assert any("begin with BOS" in note for note in spec.notes) and any("128 tokens" in note for note in spec.notes)
        check(load_coder(f"{folder}?centre=no"), TOPK, TOPK_OUT)

    def test_fine_tuning_scales_what_is_decoded_and_not_what_is_active(self, tmp_path):
        factor = torch.linspace(0.5, 2, F)
        folder = saelens(tmp_path / "a", PLAIN | {"scaling_factor": factor}, finetuning_scaling_factor=True)
        coder, plain = load_coder(folder), load_coder(saelens(tmp_path / "b"))
        assert torch.equal(coder.encode_dense(X), plain.encode_dense(X))
        assert torch.allclose(coder.decode(coder.encode(X), X), plain.encode_dense(X) * factor @ W_DEC + B_DEC)
        with pytest.raises(StoreError, match="does not say finetuning_scaling_factor"):
            load_coder(saelens(tmp_path / "c", PLAIN | {"scaling_factor": factor}))

    def test_log_threshold(self, tmp_path):
        folder = saelens(tmp_path / "a", PLAIN | {"log_threshold": THRESHOLD.log()}, architecture="jumprelu")
        check(load_coder(folder), JUMP, JUMP_OUT)

    def test_names_of_hugging_face_come_first(self, tmp_path):
        metadata = {"hf_hook_name": "model.layers.5.output", "hook_name": "blocks.5.hook_resid_post"}
        assert load_coder(saelens(tmp_path / "a", metadata=metadata)).spec.hookpoint == "model.layers.5.output"

    def test_chosen_by_the_hook_s_name(self, tmp_path):
        saelens(tmp_path / "one")
        saelens(tmp_path / "two", metadata={"hook_name": "blocks.6.hook_resid_post"})
        assert load_coder(tmp_path, hookpoint="blocks.6.hook_resid_post").spec.source.endswith("two")

    def test_published_l0_adds_up_the_frequencies(self, tmp_path):
        folder = saelens(tmp_path / "a")
        save_file({"sparsity": torch.full((F,), -0.5)}, folder / "sparsity.safetensors")
        spec = load_coder(folder).spec
        assert spec.l0 == pytest.approx(F * 10**-0.5) and "l0" in spec.inferred


class TestScaleAndFolding:
    def test_a_factor_is_demanded_and_folded(self, tmp_path):
        folder = saelens(tmp_path / "a", jump(), architecture="jumprelu", normalize_activations="expected_average_only_in")
        with pytest.raises(InputError, match=r"inputs times a constant .* give it as \?scale=NUMBER"):
            load_coder(folder)
        coder = load_coder(f"{folder}?scale=2")
        pre = X * 2 @ W_ENC + B_ENC
        acts = pre * (pre > THRESHOLD)
        assert torch.allclose(coder.encode_dense(X), acts) and coder.spec.reading["scale"] == 2
        assert torch.allclose(coder.decode(coder.encode(X), X), (acts @ W_DEC + B_DEC) / 2)
        with pytest.raises(InputError, match="expected a number above 0"):
            load_coder(f"{folder}?scale=0")
        with pytest.raises(InputError, match="is for coders normalised by expected_average_only_in, not none"):
            load_coder(f"{saelens(tmp_path / 'b')}?scale=2")

    def test_decoder_norms(self, tmp_path):
        folder = saelens(tmp_path / "a", jump(), architecture="jumprelu")
        plain, folded = load_coder(folder), load_coder(f"{folder}?fold_decoder_norm=yes")
        assert torch.allclose(folded.decoder_rows().norm(dim=1), torch.ones(F))
        assert torch.allclose(folded.encode_dense(X), plain.encode_dense(X) * W_DEC.norm(dim=1))
        assert torch.allclose(folded.decode(folded.encode(X), X), plain.decode(plain.encode(X), X), atol=1e-6)
        assert folded.spec.reading["fold_decoder_norm"] is True and folded.spec.digest == plain.spec.digest
        with pytest.raises(InputError, match="would change which latents of a topk coder are active"):
            load_coder(f"{saelens(tmp_path / 'b', architecture='topk', k=3)}?fold_decoder_norm=yes")
        with pytest.raises(InputError, match="fold_decoder_norm=maybe is not possible; expected yes or no"):
            load_coder(f"{folder}?fold_decoder_norm=maybe")


class TestCentring:
    """LayerNorm models that TransformerLens has rewritten lack the mean of their residual stream."""

    @pytest.mark.parametrize(
        ("folder", "metadata", "centred"),
        [
            ("a", {"model_from_pretrained_kwargs": {"center_writing_weights": True}}, True),
            ("a", {"model_from_pretrained_kwargs": {"center_writing_weights": False}}, False),
            ("a", {"model_from_pretrained_kwargs": {}}, False),
            ("models--jbloom--GPT2-Small-SAEs-Reformatted", {"model_from_pretrained_kwargs": {}}, True),
            ("models--jbloom--GPT2-Small-SAEs-Reformatted", {"hook_name": "blocks.5.attn.hook_z"}, False),
            ("models--jbloom--GPT2-Small-SAEs-Reformatted", {"model_name": "gemma-2b"}, False),
        ],
    )
    def test_said_by_the_files_or_known_of_the_release(self, tmp_path, folder, metadata, centred):
        coder = load_coder(saelens(tmp_path / folder / "blocks.5", metadata={"model_name": "gpt2-small"} | metadata))
        assert (coder.spec.reading["inputs"] == ["centre"]) is centred
        x = X - X.mean(dim=1, keepdim=True) if centred else X
        assert torch.allclose(coder.encode_dense(X), (x @ W_ENC + B_ENC).relu(), atol=1e-6)

    def test_files_of_before_it_could_be_left_out(self, tmp_path):
        folder = saelens(tmp_path / "a")
        config = {"d_in": D, "d_sae": F, "hook_point": "blocks.8.hook_resid_pre", "model_name": "gpt2-small"}
        (folder / "cfg.json").write_text(json.dumps(config))
        spec = load_coder(folder).spec
        assert spec.reading["inputs"] == ["centre"] and "before SAELens" in spec.inferred["centre"]
        assert load_coder(f"{folder}?centre=no").spec.reading["inputs"] == []
        # A conversion from elsewhere has the key of the training version, empty.
        (folder / "cfg.json").write_text(json.dumps(config | {"sae_lens_training_version": None}))
        assert load_coder(folder).spec.reading["inputs"] == []

    def test_not_before_standardising_which_does_it_too(self, tmp_path):
        kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}, "model_name": "gpt2"}
        spec = load_coder(saelens(tmp_path / "a", normalize_activations="layer_norm", metadata=kwargs)).spec
        assert spec.reading["inputs"] == ["standardise"]

    def test_a_release_with_a_normalisation_that_its_files_lack(self, tmp_path):
        folder = saelens(tmp_path / "models--JoshEngels--Mistral-7B-Residual-Stream-SAEs" / "a")
        spec = load_coder(folder).spec
        assert spec.reading["inputs"] == ["unit_norm"] and "inputs" in spec.inferred
        assert load_coder(f"{folder}?normalize=none").spec.reading["inputs"] == []


class TestRefused:
    @pytest.mark.parametrize(
        ("config", "sentence"),
        [
            ({"architecture": "temporal"}, "depend on the whole sequence"),
            ({"architecture": "batchtopk"}, "training checkpoint whose activations depend on the batch"),
            ({"architecture": "jumprelus"}, "did you mean 'jumprelu'"),
            ({"activation_fn": "tanh-relu"}, "activation_fn = 'tanh-relu' is not one"),
            ({"architecture": "topk"}, "k = None; expected a whole number"),
            ({"architecture": "topk", "k": 9}, "k = 9 does not fit 8 latents"),
            ({"d_in": "4"}, "d_in = '4'; expected a whole number"),
            ({"d_sae": 16}, r"expected \(4, 16\)|expected \(16, 4\)"),
            ({"normalize_activations": "covariance_whitening"}, "these weights are of before"),
            ({"normalize_activations": "constant_scalar_rescale"}, "belongs to temporal"),
            ({"normalize_activations": "layernorm"}, "did you mean 'layer_norm'"),
            ({"architecture": "transcoder", "d_out": D, "apply_b_dec_to_input": True}, "for a transcoder"),
            ({"architecture": "gated"}, "holds b_enc, which the architecture 'gated' does not have"),
            ({"metadata": {"hook_head_index": 3}}, "reads head 3 of .* alone"),
        ],
    )
    def test_in_a_sentence(self, tmp_path, config, sentence):
        with pytest.raises(InputError, match=sentence):
            load_coder(saelens(tmp_path / "a", **config))

    def test_matching_pursuit_with_a_factor(self, tmp_path):
        tensors = {"W_dec": W_DEC, "b_dec": B_DEC}
        settings = {"architecture": "matching_pursuit", "normalize_activations": "expected_average_only_in"}
        with pytest.raises(InputError, match="its dictionary is also its encoder"):
            load_coder(f"{saelens(tmp_path / 'a', tensors, **settings)}?scale=2")
