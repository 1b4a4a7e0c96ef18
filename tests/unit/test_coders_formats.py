"""Loaders and equations against the golden values of the published formats' upstream packages."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from autointerp.coders.activations import GroupMax, JumpRelu, Relu, TopK
from autointerp.coders.coder import Coder, CoderSpec
from autointerp.coders.load import FORMATS, coder_paths, load_coder
from autointerp.errors import InputError, StoreError
from tests.coder_fixtures import B_DEC, B_ENC, JUMP, SUB, THRESHOLD, TOPK_ROW_1, W_DEC, W_ENC, W_SKIP, D, F, X, as_rows, check


def sparsify(folder, tensors=None, **config):
    folder.mkdir(parents=True, exist_ok=True)
    values = {"encoder.weight": W_ENC.T.contiguous(), "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    values |= {"W_skip": W_SKIP} if config.get("skip_connection") else {}
    save_file(values if tensors is None else tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": F, "k": 3} | config))
    return folder


def gemma(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    values = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD}
    arrays = {name: tensor.numpy() for name, tensor in values.items()} | changes
    np.savez(folder / "params.npz", **{name: array for name, array in arrays.items() if array is not None})
    return folder


class TestGoldenSparsify:
    def test_topk(self, tmp_path):
        coder = load_coder(sparsify(tmp_path / "layers.5", multi_topk=True, unknown_key=7, normalize_decoder=True))
        check(coder, [SUB, TOPK_ROW_1], [[-2.25195, 0.13086, 2.01367, -0.60059], [-1.31445, 0.13086, 1.07617, -0.28809]])
        assert coder.spec.hookpoint == "layers.5@out" and coder.spec.target is None and not coder.spec.is_transcoder

    def test_groupmax_keeps_one_of_each_group_and_no_zero(self, tmp_path):
        coder = load_coder(sparsify(tmp_path / "layers.5", activation="groupmax", k=4))
        row_1 = {1: 0.78516, 3: 0.76172, 4: 0.79688, 7: 0.80859}
        check(coder, [SUB, row_1], [[-2.25195, 0.13086, 2.01367, -0.60059], [-1.31445, 0.51172, 0.50488, -0.47852]])

    def test_skip_transcoder_that_says_transcode(self, tmp_path):
        coder = load_coder(sparsify(tmp_path / "layers.5.mlp", skip_connection=True, transcode=True))
        acts = [JUMP[0], {0: 0.875, 3: 0.88672, 6: 0.89844}]
        check(coder, acts, [[-1.14258, -0.11914, 1.15430, 0.35254], [-0.49414, 2.08594, -0.83301, -0.90918]])
        assert (coder.spec.hookpoint, coder.spec.target) == ("layers.5.mlp@in", "layers.5.mlp@out")
        assert coder.spec.reading["subtract_b_dec"] is False

    def test_skip_transcoder_of_before_the_key(self, tmp_path):
        coder = load_coder(sparsify(tmp_path / "layers.5.mlp", skip_connection=True))
        check(coder, [SUB, TOPK_ROW_1], [[-1.37695, -0.11914, 1.38867, 0.27441], [-1.68945, 0.75586, 0.82617, -0.66309]])
        assert coder.spec.is_transcoder and coder.spec.reading["subtract_b_dec"] is True

    def test_legacy_signed_takes_the_largest_by_magnitude(self, tmp_path):
        coder = load_coder(sparsify(tmp_path / "layers.5", signed=True))
        pre = (X - B_DEC) @ W_ENC + B_ENC
        for row, found in enumerate(as_rows(coder.encode(X))):
            top = pre[row].abs().topk(3).indices.tolist()
            assert found == pytest.approx({index: pre[row, index].item() for index in top})
            assert coder.spec.reading["signed"] is True
        assert min(as_rows(coder.encode(X))[0].values()) < 0

    def test_width_from_the_expansion_factor(self, tmp_path):
        for value in (0, None):
            coder = load_coder(sparsify(tmp_path / f"a{value}" / "layers.5", num_latents=value, expansion_factor=2))
            assert coder.spec.width == F


class TestGoldenGemmaScope:
    def test_jump_relu(self, tmp_path):
        coder = load_coder(gemma(tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"))
        check(coder, JUMP, [[-2.01758, 0.13086, 1.77930, -0.52246], [-0.91113, 1.30371, -0.10547, -0.54297]])
        assert coder.spec.hookpoint == "layers.20@out"

    @pytest.mark.parametrize(
        ("repo", "hookpoint"),
        [
            ("models--google--gemma-scope-9b-it-res", "layers.7@out"),
            ("gemma-scope-2b-pt-mlp", "layers.7.post_feedforward_layernorm@out"),
            ("gemma-scope-2b-pt-att", "layers.7.self_attn.o_proj@in"),
            ("gemma-scope-2b-pt-transcoders", "layers.7.pre_feedforward_layernorm@in"),
            ("somewhere", None),
        ],
    )
    def test_sites(self, tmp_path, repo, hookpoint):
        spec = load_coder(gemma(tmp_path / repo / "layer_7" / "width_16k" / "average_l0_9")).spec
        assert spec.hookpoint == hookpoint and spec.is_transcoder == repo.endswith("transcoders")

    def test_transcoder_divides_by_the_root_mean_square(self, tmp_path):
        coder = load_coder(gemma(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_7" / "average_l0_9"))
        normed = X / (X.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        pre = normed @ W_ENC + B_ENC
        assert torch.allclose(coder.encode_dense(X), pre * (pre > THRESHOLD), atol=1e-6)
        assert coder.spec.reading["inputs"] == ["rms"]

    def test_lower_case_names_and_threshold_is_strict(self, tmp_path):
        pre = (X @ W_ENC + B_ENC)[0]
        lowered = {"W_enc": None, "W_dec": None, "w_enc": W_ENC.numpy(), "w_dec": W_DEC.numpy()}
        at = THRESHOLD.clone()
        at[1] = pre[1]
        coder = load_coder(gemma(tmp_path / "a", **lowered, threshold=at.numpy()))
        assert set(as_rows(coder.encode(X))[0]) == {4, 7}


def make(activation, width, d=6, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    spec = CoderSpec(format="test", source="made", digest="", width=width, d_in=d, d_out=d, activation=activation.name)
    tensors = {
        "encoder_LD": normal(width, d),
        "encoder_bias_L": normal(width),
        "decoder_LE": normal(width, d),
        "decoder_bias_E": normal(d),
    }
    return Coder(spec=spec, activation=activation, **tensors, **options), normal(37, d)


class TestEquations:
    @pytest.mark.parametrize("width", [1, 7, 33])
    @pytest.mark.parametrize("name", ["relu", "jumprelu", "topk", "signed", "groupmax"])
    def test_chunks_change_nothing(self, monkeypatch, name, width):
        activation = {
            "relu": Relu(),
            "jumprelu": JumpRelu(torch.linspace(-0.5, 1, width)),
            "topk": TopK(min(5, width)),
            "signed": TopK(min(5, width), signed=True),
            "groupmax": GroupMax(width if width < 33 else 3),
        }[name]
        coder, x = make(activation, width)
        whole = coder.encode_dense(x)
        monkeypatch.setattr("autointerp.coders.coder.PIECE_BYTES", 4 * 20)
        monkeypatch.setattr("autointerp.coders.coder.MAX_PIECE_BYTES", 0)
        monkeypatch.setattr("autointerp.coders.coder._LATENTS_PER_PIECE", 10)
        monkeypatch.setattr("autointerp.coders.coder.ACTS_PER_CHUNK", 1)
        pieces = list(coder.encode_chunks(x))
        assert len(pieces) > 1
        assert torch.allclose(coder.encode_dense(x), whole, atol=1e-6)
        assert coder.encode(x[:0]).values.numel() == 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_always_float32(self, dtype):
        coder, x = make(TopK(3), 20, subtract_decoder_bias=True)
        acts = coder.encode(x.to(dtype))
        assert acts.values.dtype == torch.float32
        assert torch.equal(coder.encode_dense(x.to(dtype)), coder.encode_dense(x.to(dtype).float()))
        assert coder.decode(acts, x.to(dtype)).dtype == torch.float32

    def test_fewer_than_k_where_fewer_are_positive(self):
        coder, x = make(TopK(20), 20)
        acts = coder.encode(x)
        assert (acts.values > 0).all() and len(acts) == int((coder.encode_dense(x) > 0).sum()) < x.shape[0] * 20

    def test_decode_is_the_matrix_product(self):
        coder, x = make(Relu(), 20)
        assert torch.allclose(
            coder.decode(coder.encode(x), x), coder.encode_dense(x) @ coder.decoder_rows() + coder.decoder_bias_E, atol=1e-5
        )

    def test_a_wrong_width_is_refused(self):
        coder, x = make(Relu(), 20)
        with pytest.raises(InputError, match="width 6 and was given"):
            coder.encode(x[:, :5])

    def test_describe_is_json(self):
        coder, _ = make(Relu(), 20)
        assert json.loads(json.dumps(coder.describe()))["width"] == 20


class TestDamage:
    def test_transposed(self, tmp_path):
        tensors = {"encoder.weight": W_ENC.clone(), "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
        with pytest.raises(StoreError, match=r"encoder.weight has shape \(4, 8\); expected \(8, 4\); it is transposed"):
            load_coder(sparsify(tmp_path, tensors))
        with pytest.raises(StoreError, match="W_enc has shape"):
            load_coder(gemma(tmp_path / "g", W_enc=W_ENC.T.numpy()))

    def test_truncated(self, tmp_path):
        path = sparsify(tmp_path / "layers.5") / "sae.safetensors"
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(StoreError, match="cannot be read as safetensors"):
            load_coder(tmp_path / "layers.5")
        path = gemma(tmp_path / "g") / "params.npz"
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(StoreError, match="cannot be read as plain numpy arrays"):
            load_coder(tmp_path / "g")

    def test_missing_tensor_and_file(self, tmp_path):
        tensors = {"encoder.weight": W_ENC.T.contiguous(), "encoder.bias": B_ENC, "W_dec": W_DEC}
        with pytest.raises(StoreError, match="lacks the tensor 'b_dec'; it holds W_dec, encoder"):
            load_coder(sparsify(tmp_path / "a", tensors))
        with pytest.raises(StoreError, match="lacks the tensor 'threshold'"):
            load_coder(gemma(tmp_path / "g", threshold=None))
        with pytest.raises(StoreError, match="lacks b_enc or b_dec"):
            load_coder(gemma(tmp_path / "h", b_enc=None))

    def test_wrong_type_and_values(self, tmp_path):
        with pytest.raises(StoreError, match=r"W_enc has type .*int32; expected a floating type"):
            load_coder(gemma(tmp_path / "g", W_enc=W_ENC.numpy().astype(np.int32)))
        with pytest.raises(StoreError, match="not finite"):
            load_coder(gemma(tmp_path / "h", b_enc=np.full(F, np.nan, np.float32)))

    def test_pickles_are_refused(self, tmp_path):
        with pytest.raises(StoreError, match="pickled objects"):
            load_coder(gemma(tmp_path / "g", threshold=np.array([{}] * F, dtype=object)))

    @pytest.mark.parametrize(
        ("config", "sentence"),
        [
            ({"k": 0}, "lacks 'k'"),
            ({"d_in": "4"}, "d_in = '4'; expected a whole number"),
            ({"k": 9}, "k = 9 is larger"),
            ({"activation": "relu"}, "activation = 'relu' is not one"),
            ({"activation": "groupmax"}, "divisible by k; found 8 and k = 3"),
            ({"num_latents": 16}, r"expected \(16, 4\)"),
        ],
    )
    def test_configurations(self, tmp_path, config, sentence):
        with pytest.raises(StoreError, match=sentence):
            load_coder(sparsify(tmp_path, **config))

    def test_configuration_that_is_no_json(self, tmp_path):
        (sparsify(tmp_path) / "cfg.json").write_text("{")
        with pytest.raises(StoreError, match="not valid JSON"):
            load_coder(tmp_path)
        (tmp_path / "cfg.json").write_text("[]")
        with pytest.raises(StoreError, match="holds list; expected a table"):
            load_coder(tmp_path)


class TestFinding:
    def test_the_one_coder_below_a_folder(self, tmp_path):
        sparsify(tmp_path / "layers.5")
        assert load_coder(tmp_path).spec.hookpoint == "layers.5@out"
        assert load_coder(tmp_path, hookpoint="model.layers.5@out").spec.hookpoint == "layers.5@out"

    def test_variants_are_named_after_the_folder_above(self, tmp_path):
        assert load_coder(sparsify(tmp_path / "layers.5" / "seed3")).spec.hookpoint == "layers.5@out"

    def test_several_need_a_hookpoint(self, tmp_path):
        sparsify(tmp_path / "layers.5")
        sparsify(tmp_path / "layers.6")
        gemma(tmp_path / "layer_3" / "average_l0_2")
        assert list(coder_paths(tmp_path)) == ["layer_3/average_l0_2", "layers.5", "layers.6"]
        with pytest.raises(InputError, match=r"holds 3 coders \(layer_3/average_l0_2, layers.5, layers.6\)"):
            load_coder(tmp_path)
        assert load_coder(tmp_path, hookpoint="layers.6").spec.hookpoint == "layers.6@out"
        with pytest.raises(InputError, match=r"did you mean 'layers.\d'"):
            load_coder(tmp_path, hookpoint="layers.7")

    def test_an_unknown_format_says_what_was_found_and_what_is_known(self, tmp_path):
        (tmp_path / "coder.bin").write_bytes(b"")
        with pytest.raises(InputError, match=r"found coder.bin; the formats are sparsify, gemma_scope, "):
            load_coder(tmp_path)
        assert {"sparsify", "gemma_scope", "saelens", "dictionary_learning"} <= set(FORMATS)

    def test_no_such_source(self, tmp_path):
        with pytest.raises(InputError, match="no such folder, and not a hub id"):
            load_coder(tmp_path / "nowhere")
        with pytest.raises(InputError, match=r"nobody/nothing: no such folder here, and the hub did not give it"):
            load_coder("nobody/nothing:layers.5")
        with pytest.raises(InputError, match="is a file"):
            load_coder(sparsify(tmp_path) / "cfg.json")

    def test_a_hub_repository_in_the_local_cache(self, tmp_path, monkeypatch):
        commit = "0123456789abcdef0123456789abcdef01234567"
        repo = tmp_path / "models--owner--saes"
        sparsify(repo / "snapshots" / commit / "layers.5")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        coder = load_coder("owner/saes:layers.5")
        assert (coder.spec.source, coder.spec.revision, coder.spec.hookpoint) == ("owner/saes:layers.5", commit, "layers.5@out")

    def test_a_function_of_the_users(self, tmp_path, monkeypatch):
        (tmp_path / "my_coders.py").write_text(
            f"from autointerp import load_coder\ndef one(): return load_coder({str(tmp_path)!r})\nnone = int\n"
        )
        sparsify(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        assert load_coder("my_coders:one").spec.width == F
        with pytest.raises(InputError, match="returned int"):
            load_coder("my_coders:none")
        with pytest.raises(InputError, match="cannot be imported"):
            load_coder("my_coders:two")

    def test_the_digest_is_of_the_weights_alone(self, tmp_path):
        a, b = load_coder(sparsify(tmp_path / "a")), load_coder(sparsify(tmp_path / "b", k=4))
        assert a.spec.digest == b.spec.digest and a.spec.reading != b.spec.reading
        other = {"encoder.weight": W_ENC.T.contiguous(), "encoder.bias": B_ENC + 1, "W_dec": W_DEC, "b_dec": B_DEC}
        assert load_coder(sparsify(tmp_path / "c", other)).spec.digest != a.spec.digest
