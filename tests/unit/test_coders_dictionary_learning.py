"""dictionary_learning: golden rows by hand, how the class is found, thresholds, backups and hookpoints."""

import json

import pytest
import torch

from autointerp.coders.load import load_coder
from autointerp.errors import InputError, StoreError
from tests.coder_fixtures import B_DEC, B_ENC, JUMP, SUB, THRESHOLD, W_DEC, W_ENC, D, F, X, check

LINEAR = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T}
PLAIN = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
K = {"k": torch.tensor(3, dtype=torch.int32), "threshold": torch.tensor(0.5)}
SUB_ROWS = [SUB, {0: 0.75, 1: 0.78516, 2: 0.53906, 3: 0.76172, 4: 0.79688, 5: 0.55078, 6: 0.77344, 7: 0.80859}]
SUB_OUT = [[-2.25195, 0.13086, 2.01367, -0.60059], [-0.62598, 0.59961, 0.54590, -0.44336]]


def save(folder, tensors, config=None, **trainer):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "ae.pt")
    if trainer or config:
        (folder / "config.json").write_text(json.dumps({"trainer": trainer} | (config or {})))
    return folder


class TestGolden:
    def test_auto_encoder(self, tmp_path):
        folder = save(tmp_path / "a", LINEAR | {"bias": B_DEC}, dict_class="AutoEncoder")
        check(load_coder(f"{folder}?renormalise=no"), SUB_ROWS, SUB_OUT)

    def test_auto_encoder_brought_to_unit_norm_as_the_library_does(self, tmp_path):
        folder = save(tmp_path / "a", LINEAR | {"bias": B_DEC}, dict_class="AutoEncoder")
        coder, plain = load_coder(folder), load_coder(f"{folder}?renormalise=no")
        assert torch.allclose(coder.decoder_rows().norm(dim=1), torch.ones(F))
        assert torch.allclose(coder.encode_dense(X), plain.encode_dense(X) * W_DEC.norm(dim=1))
        assert torch.allclose(coder.decode(coder.encode(X), X), torch.tensor(SUB_OUT), atol=1e-5)
        assert coder.spec.reading["renormalised"] is True and "renormalised" not in plain.spec.reading

    def test_jump_relu(self, tmp_path):
        coder = load_coder(save(tmp_path / "a", PLAIN | {"threshold": THRESHOLD}, dict_class="JumpReluAutoEncoder"))
        check(coder, JUMP, [[-2.01758, 0.13086, 1.77930, -0.52246], [-0.91113, 1.30371, -0.10547, -0.54297]])

    def test_auto_encoder_new_subtracts_nothing(self, tmp_path):
        coder = load_coder(save(tmp_path / "a", LINEAR | {"decoder.bias": B_DEC}, dict_class="AutoEncoderNew"))
        outputs = [[-2.01172, 0.15430, 1.75879, -0.52539], [-0.58691, 0.98242, 0.28809, -0.57617]]
        assert torch.allclose(coder.decode(coder.encode(X), X), torch.tensor(outputs), atol=1e-5)

    @pytest.mark.parametrize("name", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
    def test_scalar_threshold(self, tmp_path, name):
        tensors = (PLAIN | {"group_sizes": torch.tensor([3, 5])} if "Matryoshka" in name else LINEAR | {"b_dec": B_DEC}) | K
        coder = load_coder(save(tmp_path / "a", tensors, dict_class=name, k=3))
        check(coder, SUB_ROWS, SUB_OUT)
        assert coder.spec.reading["threshold"] == 0.5 and coder.spec.reading["threshold_from"] == "file"

    def test_topk(self, tmp_path):
        folder = save(tmp_path / "a", LINEAR | {"b_dec": B_DEC} | K, dict_class="AutoEncoderTopK", k=3)
        outputs = [SUB_OUT[0], [-1.31445, 0.13086, 1.07617, -0.28809]]
        check(load_coder(folder), [SUB, {1: 0.78516, 4: 0.79688, 7: 0.80859}], outputs)
        check(load_coder(f"{folder}?threshold=0.5"), SUB_ROWS, SUB_OUT)


class TestThresholds:
    def test_one_that_was_never_fitted_is_refused(self, tmp_path):
        folder = save(
            tmp_path / "a", LINEAR | {"b_dec": B_DEC} | K | {"threshold": torch.tensor(-1.0)}, dict_class="BatchTopKSAE"
        )
        with pytest.raises(InputError, match=r"was never fitted \(it is -1\), .* add \?threshold=NUMBER"):
            load_coder(folder)
        coder = load_coder(f"{folder}?threshold=0.5")
        check(coder, SUB_ROWS, SUB_OUT)
        assert coder.spec.reading["threshold"] == 0.5 and coder.spec.reading["threshold_from"] == "option"
        with pytest.raises(InputError, match="threshold=-2 is not possible; expected a number of at least 0"):
            load_coder(f"{folder}?threshold=-2")


class TestClasses:
    def test_by_the_trainer_where_the_class_is_not_named(self, tmp_path):
        spec = load_coder(save(tmp_path / "a", LINEAR | {"bias": B_DEC}, trainer_class="PAnnealTrainer")).spec
        assert spec.reading["class"] == "AutoEncoder" and spec.inferred["class"] == "trainer_class"

    def test_by_the_tensors_where_nothing_is_said(self, tmp_path):
        spec = load_coder(save(tmp_path / "a", LINEAR | {"decoder.bias": B_DEC})).spec
        assert spec.reading["class"] == "AutoEncoderNew" and spec.inferred["class"] == "the names of the tensors"

    def test_top_k_and_batch_top_k_have_the_same_tensors(self, tmp_path):
        folder = save(tmp_path / "a", LINEAR | {"b_dec": B_DEC} | K)
        with pytest.raises(InputError, match=r"fit AutoEncoderTopK and BatchTopKSAE, .* add \?class=AutoEncoderTopK"):
            load_coder(folder)
        assert load_coder(f"{folder}?class=AutoEncoderTopK").spec.k == 3
        assert load_coder(f"{folder}?class=BatchTopKSAE").spec.k is None

    def test_unknown_ones(self, tmp_path):
        with pytest.raises(StoreError, match="class 'CrossCoder' cannot be read"):
            load_coder(save(tmp_path / "a", LINEAR, dict_class="CrossCoder"))
        with pytest.raises(StoreError, match="which is none of AutoEncoder"):
            load_coder(save(tmp_path / "b", LINEAR))
        with pytest.raises(InputError, match="class=AutoEncoderTop is not known; did you mean 'AutoEncoderTopK'"):
            load_coder(f"{tmp_path / 'b'}?class=AutoEncoderTop")

    def test_two_ks(self, tmp_path):
        with pytest.raises(StoreError, match=r"config\.json says k = 4 and ae\.pt 3"):
            load_coder(save(tmp_path / "a", LINEAR | {"b_dec": B_DEC} | K, dict_class="AutoEncoderTopK", k=4))


class TestBackups:
    def test_biases_are_brought_to_the_scale_of_the_inputs(self, tmp_path):
        whole = PLAIN | {"threshold": THRESHOLD}
        divided = {name: value if name in ("W_enc", "W_dec") else value / 2 for name, value in whole.items()}
        held = {
            "step": 900,
            "ae": divided,
            "optimizer": {},
            "config": {"dict_class": "JumpReluAutoEncoder"},
            "norm_factor": 2.0,
        }
        coder = load_coder(save(tmp_path / "a", held))
        check(coder, JUMP, [[-2.01758, 0.13086, 1.77930, -0.52246], [-0.91113, 1.30371, -0.10547, -0.54297]])
        assert coder.spec.notes == ("A backup from the middle of training (step 900).",)
        assert coder.spec.reading["norm_factor"] == 2.0

    def test_one_that_does_not_say_its_scale(self, tmp_path):
        coder = load_coder(
            save(tmp_path / "a", {"step": 900, "ae": LINEAR | {"decoder.bias": B_DEC}, "optimizer": {}, "config": {}})
        )
        assert "biases are still of normalised ones" in coder.spec.notes[0]


class TestHookpoints:
    @pytest.mark.parametrize(
        ("folder", "trainer", "buffer", "wanted"),
        [
            ("a", {"submodule_name": "resid_post_layer_8"}, {"io": "out"}, ("layers.8@out", None)),
            ("a", {"submodule_name": "resid_post_layer_8", "lm_name": "openai-community/gpt2"}, {}, ("h.8@out", None)),
            ("a", {"submodule_name": "model.layers.8.mlp"}, {"io": "in"}, ("model.layers.8.mlp@in", None)),
            ("a", {"submodule_name": "layers.8.mlp"}, {"io": "in_and_out"}, ("layers.8.mlp@in", "layers.8.mlp@out")),
            ("run/resid_post_layer_12/trainer_3", {}, {}, ("layers.12@out", None)),
            ("dictionaries/pythia-70m-deduped/attn_out_layer3/10_32768", {}, {}, ("layers.3.attention@out", None)),
            ("dictionaries/pythia-70m-deduped/embed/10_32768", {}, {}, ("embed_in@out", None)),
            ("somewhere", {}, {}, (None, None)),
        ],
    )
    def test_from_the_configuration_or_the_folders(self, tmp_path, folder, trainer, buffer, wanted):
        path = save(tmp_path / folder, LINEAR | {"bias": B_DEC}, {"buffer": buffer}, dict_class="AutoEncoder", **trainer)
        spec = load_coder(path).spec
        assert (spec.hookpoint, spec.target) == wanted and spec.is_transcoder is (wanted[1] is not None)
        assert (spec.d_in, spec.width) == (D, F)
