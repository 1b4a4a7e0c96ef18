"""Published formats: golden values of their own packages, one format for each folder, settings, refusals and safe loading."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autointerp.coders.activations import JumpRelu, Relu, ScaledTopK, TopK
from autointerp.coders.calibrate import calibrate_threshold
from autointerp.coders.inputs import Standardise
from autointerp.coders.load import FORMATS, _around, _formats, _patterns, coder_paths, format_of, load_coder
from autointerp.coders.refused import REFUSED
from autointerp.errors import InputError, StoreError
from tests.coder_fixtures import B_DEC, B_ENC, THRESHOLD, W_DEC, W_ENC, W_SKIP, D, F, X, as_rows
from tests.coder_releases import (
    NORM,
    RELEASES,
    attn_saes,
    batch_topk,
    circuit_tracer,
    circuit_tracer_clt,
    deepseek_r1,
    dunefsky,
    e2e_sae,
    gemma_scope,
    gemma_scope_2,
    gemma_scope_2_clt,
    goodfire,
    llama_scope,
    llama_scope_r1,
    llamascopium,
    openai_gpt2,
    qwen_scope,
)
from tests.parity_cases import cases

JUMP = [{1: 1.25391, 4: 1.26562, 7: 1.27734}, {0: 0.875, 1: 0.62891, 3: 0.88672, 4: 0.64062, 6: 0.89844}]
JUMP_OUT = [[-2.01758, 0.13086, 1.77930, -0.52246], [-0.91113, 1.30371, -0.10547, -0.54297]]
JUMP_SKIP_OUT = [[-1.14258, -0.11914, 1.15430, 0.35254], [-1.28613, 1.92871, -0.35547, -0.91797]]
RELU = [
    {1: 1.25391, 3: 0.01172, 4: 1.26562, 6: 0.02344, 7: 1.27734},
    {0: 0.875, 1: 0.62891, 2: 0.38281, 3: 0.88672, 4: 0.64062, 5: 0.39453, 6: 0.89844, 7: 0.65234},
]
RELU_OUT = [[-2.01172, 0.15430, 1.75879, -0.52539], [-0.58691, 0.98242, 0.28809, -0.57617]]
RELU_SUB = [
    {1: 1.41016, 4: 1.42188, 7: 1.43359},
    {0: 0.75, 1: 0.78516, 2: 0.53906, 3: 0.76172, 4: 0.79688, 5: 0.55078, 6: 0.77344, 7: 0.80859},
]
RELU_SUB_OUT = [[-2.25195, 0.13086, 2.01367, -0.60059], [-0.62598, 0.59961, 0.54590, -0.44336]]
TOPK = [JUMP[0], {0: 0.875, 3: 0.88672, 6: 0.89844}]
TOPK_OUT = [JUMP_OUT[0], [-0.11914, 1.46094, -0.58301, -0.53418]]
NORMED_TOPK = [{1: 1.54129, 4: 1.55301, 7: 1.56473}, {3: 0.72248, 5: 0.72111, 6: 0.73420}]
NORMED_TOPK_OUT = [[-3.08977, -0.22992, 2.07560, -1.11355], [0.87386, 0.95395, -0.82618, 0.56739]]
OFFICIAL = [
    {1: 1.40628, 4: 1.32068, 7: 1.26326},
    {0: 0.72618, 1: 0.70751, 3: 0.72348, 4: 0.67645, 5: 0.55565, 6: 0.74541, 7: 0.65810},
]
OFFICIAL_OUT = [[-2.16016, 0.26172, 1.68359, -0.41992], [-0.80664, 1.16406, 0.33008, -0.40625]]
SAELENS = [
    {1: 0.62891, 4: 0.64062, 7: 0.65234},
    {0: 0.375, 1: 0.31641, 2: 0.25781, 3: 0.38672, 4: 0.32812, 5: 0.26953, 6: 0.39844, 7: 0.33984},
]
SAELENS_OUT = [[-2.16016, 0.26172, 1.68359, -0.41992], [-0.54883, 0.77734, 0.20117, -0.27734]]


def check(coder, acts, outputs=None, x=X, abs=1e-5):
    found = coder.encode(x)
    for row, wanted in zip(as_rows(found), acts, strict=True):
        assert row == pytest.approx(wanted, abs=abs)
    if outputs is not None:
        assert coder.decode(found, x) == pytest.approx(torch.tensor(outputs).numpy(), abs=abs)


class TestGolden:
    """Golden rows of the published packages for the dyadic coder; the order of the arguments is what each format gets wrong."""

    def test_gemma_scope_2_with_affine(self, tmp_path):
        coder = load_coder(gemma_scope_2(tmp_path))
        check(coder, JUMP, JUMP_SKIP_OUT)
        assert coder.spec.hookpoint == "model.layers.3.pre_feedforward_layernorm.output" and coder.spec.is_transcoder
        assert coder.spec.target == "model.layers.3.post_feedforward_layernorm.output"
        assert coder.spec.model == "google/gemma-3-1b-pt" and coder.spec.inferred["hookpoint"] == "the path"

    def test_gemma_scope_2_residual(self, tmp_path):
        config = {
            "architecture": "jump_relu", "hf_hook_point_in": "model.layers.17.output", "hf_hook_point_out": "model.layers.17.output",
            "model_name": "gemma-v3-270m-pt", "type": "sae", "l0": 110, "affine_connection": False, "width": F,
        }  # fmt: skip
        coder = load_coder(gemma_scope_2(tmp_path, "resid_post/layer_17_width_16k_l0_big", affine=False, config=config))
        check(coder, JUMP, JUMP_OUT)
        assert (coder.spec.hookpoint, coder.spec.target, coder.spec.is_transcoder) == ("model.layers.17.output", None, False)
        assert (coder.spec.model, coder.spec.l0, coder.spec.inferred) == ("google/gemma-3-270m", 110, {})

    def test_gemma_scope_2_cross_layer(self, tmp_path):
        coder = load_coder(gemma_scope_2_clt(tmp_path, affine_skip_connection=W_SKIP.T))
        check(coder, JUMP)
        # Layer 1 of 3 writes to layers 1 and 2, whose decoders are 2 and 3 times W_DEC; the skip goes to its own layer alone.
        base = torch.tensor(JUMP_OUT) - B_DEC
        skip = torch.tensor(JUMP_SKIP_OUT) - torch.tensor(JUMP_OUT)
        assert coder.decode(coder.encode(X), X) == pytest.approx(
            torch.cat([2 * base + skip, 3 * base], dim=1).numpy(), abs=1e-4
        )
        assert coder.spec.d_out == 2 * D and coder.spec.reading["output_layers"] == [1, 2]

    def test_llama_scope_as_its_authors(self, tmp_path):
        coder = load_coder(llama_scope(tmp_path))
        check(coder, OFFICIAL, OFFICIAL_OUT, abs=1e-2)
        assert coder.spec.reading["rule"] == "official" and coder.spec.hookpoint == "blocks.15.hook_resid_post"

    def test_llama_scope_as_saelens(self, tmp_path):
        coder = load_coder(f"{llama_scope(tmp_path)}?reading=saelens")
        check(coder, SAELENS, SAELENS_OUT, abs=1e-2)
        assert coder.spec.reading["rule"] == "saelens"
        with pytest.raises(InputError, match="reading=sealens is not known; did you mean 'saelens'"):
            load_coder(f"{llama_scope(tmp_path / 'b')}?reading=sealens")

    def test_openai_normalises_where_it_is_topk_and_there_alone(self, tmp_path):
        coder = load_coder(openai_gpt2(tmp_path))
        check(coder, NORMED_TOPK, NORMED_TOPK_OUT)
        assert coder.spec.hookpoint == "blocks.8.hook_resid_post" and coder.spec.k == 3
        coder = load_coder(openai_gpt2(tmp_path, "resid_delta_mlp_v4", k=None))
        check(coder, RELU_SUB, RELU_SUB_OUT)
        assert coder.spec.hookpoint == "blocks.8.hook_mlp_out" and coder.spec.reading["inputs"] == []
        tied = load_coder(openai_gpt2(tmp_path, "mlp_post_act", k=None, tied=True))
        assert torch.equal(tied.decoder_LE, W_DEC) and tied.spec.hookpoint == "blocks.8.mlp.hook_post"

    def test_goodfire_and_deepseek_r1(self, tmp_path):
        coder = load_coder(goodfire(tmp_path))
        check(coder, RELU, RELU_OUT)
        assert (coder.spec.hookpoint, coder.spec.model) == ("layers.19@out", "meta-llama/Llama-3.1-8B-Instruct")
        coder = load_coder(deepseek_r1(tmp_path))
        check(coder, RELU, RELU_OUT)
        assert coder.spec.hookpoint == "layers.19@out"

    def test_qwen_scope_takes_k_from_the_repository(self, tmp_path):
        coder = load_coder(qwen_scope(tmp_path))
        check(coder, TOPK, TOPK_OUT)
        assert (coder.spec.hookpoint, coder.spec.model) == ("layers.5@out", "Qwen/Qwen3-1.7B-Base")
        assert coder.spec.inferred["k"] == "the repository's name"
        path = qwen_scope(tmp_path, "mine")
        with pytest.raises(InputError, match=r"does not say how many latents are active .*layer5\.sae\.pt\?k=NUMBER"):
            load_coder(path)
        check(load_coder(f"{path}?k=3"), TOPK, TOPK_OUT)
        with pytest.raises(StoreError, match="k = 9 does not fit 8 latents"):
            load_coder(f"{path}?k=9")
        for bad in ("0", "2.5", "x"):
            with pytest.raises(InputError, match=f"k={bad} is not possible"):
                load_coder(f"{path}?k={bad}")

    def test_circuit_tracer(self, tmp_path):
        coder = load_coder(circuit_tracer(tmp_path / "a", W_skip=None))
        check(coder, RELU, RELU_OUT)
        assert (coder.spec.hookpoint, coder.spec.target) == ("blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out")
        thresholds = {"activation_function.threshold": THRESHOLD}
        check(load_coder(circuit_tracer(tmp_path / "b", **thresholds)), JUMP, JUMP_SKIP_OUT)
        # A repository that stores both matrices the other way round, and the thresholds under their short name.
        turned = {"W_enc": W_ENC, "W_dec": W_DEC.T, "threshold": THRESHOLD}
        check(load_coder(circuit_tracer(tmp_path / "c", config=None, **turned)), JUMP, JUMP_SKIP_OUT)

    def test_circuit_tracer_topk_keeps_negative_values(self, tmp_path):
        path = circuit_tracer(tmp_path / "a", config="activation: topk\nk: 7\n")
        pre = X @ W_ENC + B_ENC
        wanted = [{i: pre[row, i].item() for i in pre[row].topk(7).indices.tolist() if pre[row, i] != 0} for row in range(2)]
        assert min(wanted[0].values()) < 0
        check(load_coder(path), wanted)
        path = circuit_tracer(tmp_path / "b", config="activation: topk\n")
        with pytest.raises(InputError, match="says topk and not how many"):
            load_coder(path)
        check(load_coder(f"{path}?k=7"), wanted)
        check(load_coder(circuit_tracer(tmp_path / "c", k=torch.tensor(7))), wanted)

    def test_circuit_tracer_keeps_what_is_above_a_negative_threshold(self, tmp_path):
        path = circuit_tracer(tmp_path, **{"activation_function.threshold": torch.full((F,), -1.985)})
        pre = X @ W_ENC + B_ENC
        wanted = [{i: value for i, value in enumerate(row) if value > -1.985 and value != 0} for row in pre.tolist()]
        assert min(wanted[0].values()) < -1.9
        check(load_coder(path), wanted)

    def test_circuit_tracer_cross_layer(self, tmp_path):
        coder = load_coder(circuit_tracer_clt(tmp_path))
        check(coder, RELU)
        base = torch.tensor(RELU_OUT) - B_DEC
        assert coder.decode(coder.encode(X), X) == pytest.approx(torch.cat([2 * base, 3 * base], dim=1).numpy(), abs=1e-4)
        assert coder.spec.reading["output_layers"] == [1, 2] and coder.spec.hookpoint == "blocks.1.hook_resid_mid"
        check(load_coder(circuit_tracer_clt(tmp_path / "b", threshold_1=THRESHOLD)), JUMP)

    def test_batch_topk_at_its_threshold(self, tmp_path):
        for kind in ("batchtopk", "global-matryoshka-topk"):
            # Its encoder's bias is stored and not used.
            coder = load_coder(batch_topk(tmp_path / kind, sae_type=kind))
            pre = (X - B_DEC) @ W_ENC
            check(coder, [{i: value for i, value in enumerate(row) if value > 0.5} for row in pre.tolist()])
            assert coder.spec.reading["threshold"] == 0.5 and coder.spec.hookpoint == "blocks.8.hook_resid_pre"

    def test_batch_topk_other_types(self, tmp_path):
        check(load_coder(batch_topk(tmp_path / "a", sae_type="vanilla")), RELU_SUB, RELU_SUB_OUT)
        jump = {"jumprelu.log_threshold": THRESHOLD.log()}
        check(load_coder(batch_topk(tmp_path / "b", jump, sae_type="jumprelu")), JUMP, JUMP_OUT)
        coder = load_coder(batch_topk(tmp_path / "c", sae_type="topk", input_unit_norm=True))
        ready = (X - X.mean(1, keepdim=True)) / (X.std(1, keepdim=True) + 1e-5)
        pre = ((ready - B_DEC) @ W_ENC).relu()
        wanted = [{i: pre[row, i].item() for i in pre[row].topk(3).indices.tolist()} for row in range(2)]
        check(coder, wanted)
        assert coder.inputs == (Standardise(eps=1e-5),)

    def test_e2e_sae_normalises_the_decoder_and_centres_the_input(self, tmp_path):
        coder = load_coder(e2e_sae(tmp_path))
        centred = X - X.mean(1, keepdim=True)
        pre = centred @ W_ENC + B_ENC
        check(coder, [{i: value for i, value in enumerate(row) if value > 0} for row in pre.tolist()])
        wanted = pre.relu() @ (W_DEC / W_DEC.norm(dim=1, keepdim=True)) + B_DEC
        assert torch.allclose(coder.decode(coder.encode(X), X), wanted, atol=1e-5)
        assert (coder.spec.hookpoint, coder.spec.model) == ("blocks.6.hook_resid_pre", "gpt2-small")

    def test_e2e_sae_of_several_positions(self, tmp_path):
        path = e2e_sae(tmp_path, ("blocks-6-hook_resid_pre", "blocks-10-hook_resid_pre"))
        with pytest.raises(InputError, match=r"holds 2 coders; choose one as .*\?position=blocks.10.hook_resid_pre"):
            load_coder(path)
        assert load_coder(f"{path}?position=blocks.10.hook_resid_pre").spec.hookpoint == "blocks.10.hook_resid_pre"
        with pytest.raises(InputError, match=r"no coder of position blocks\.7\.hook_resid_pre; did you mean"):
            load_coder(f"{path}?position=blocks.7.hook_resid_pre")

    def test_only_what_transformer_lens_centres_is_centred(self, tmp_path):
        coder = load_coder(e2e_sae(tmp_path, ("blocks-6-mlp-hook_post",)))
        check(coder, RELU)
        assert coder.inputs == () and coder.spec.hookpoint == "blocks.6.mlp.hook_post"

    def test_dunefsky(self, tmp_path):
        coder = load_coder(dunefsky(tmp_path / "a"))
        out = torch.tensor(RELU_SUB_OUT) + B_DEC  # b_dec_out is twice b_dec
        check(coder, RELU_SUB, out.tolist())
        assert (coder.spec.hookpoint, coder.spec.target) == ("blocks.8.ln2.hook_normalized", "blocks.8.hook_mlp_out")
        assert coder.spec.is_transcoder and coder.inputs == () and coder.spec.reading["subtract_b_dec"] is True
        coder = load_coder(dunefsky(tmp_path / "b", transcoder=False))
        assert coder.spec.reading["inputs"] == ["centre"] and coder.spec.hookpoint == "blocks.8.hook_resid_pre"
        check(replace(coder, inputs=()), RELU_SUB, RELU_SUB_OUT)

    def test_attention_coders(self, tmp_path):
        coder = load_coder(attn_saes(tmp_path))
        check(coder, RELU_SUB, RELU_SUB_OUT)
        assert coder.spec.hookpoint == "blocks.5.attn.hook_z"

    def test_llama_scope_r1_scales_by_the_norm(self, tmp_path):
        # s = sqrt(4) / 4 = 1/2: pre = x W / 2 + b, out = (f D + b_D) / (1/2)
        pre = X @ W_ENC / 2 + B_ENC
        wanted = torch.where(pre > THRESHOLD, pre, 0.0)
        coder = load_coder(llama_scope_r1(tmp_path))
        assert torch.allclose(coder.encode_dense(X), wanted)
        assert torch.allclose(coder.decode(coder.encode(X), X), 2 * (wanted @ W_DEC + B_DEC))
        path = llama_scope_r1(tmp_path / "b", norm=None)
        with pytest.raises(InputError, match=r"does not say the mean norm .*\?norm_scaling_factor=NUMBER"):
            load_coder(path)
        coder = load_coder(f"{path}?norm_scaling_factor=0.5")
        assert torch.allclose(coder.encode_dense(X), wanted) and coder.spec.inferred["scale"] == "norm_scaling_factor, as given"
        folded = load_coder(llama_scope_r1(tmp_path / "c", norm=None, norm_activation="inference"))
        assert torch.allclose(folded.encode_dense(X), torch.where(X @ W_ENC + B_ENC > THRESHOLD, X @ W_ENC + B_ENC, 0.0))

    @pytest.mark.parametrize("include", [False, True])
    @pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
    def test_llamascopium(self, tmp_path, act_fn, include):
        log_threshold = {"activation_function.log_jumprelu_threshold": THRESHOLD.log()} if act_fn == "jumprelu" else {}
        coder = load_coder(
            llamascopium(tmp_path, log_threshold, norms=(4.0, 8.0), act_fn=act_fn, sparsity_include_decoder_norm=include,
                         hook_point_in="blocks.3.hook_resid_mid", hook_point_out="blocks.3.hook_mlp_out")
        )  # fmt: skip
        norm = W_DEC.norm(dim=1) if include else torch.ones(F)
        pre = (X / 2 @ W_ENC + B_ENC) * norm
        gate = {"relu": pre > 0, "jumprelu": pre > THRESHOLD, "topk": pre >= pre.relu().topk(3, dim=1).values[:, -1:]}[act_fn]
        wanted = torch.where(gate & (pre > 0), pre, 0.0) / norm
        assert torch.allclose(coder.encode_dense(X), wanted)
        assert torch.allclose(coder.decode(coder.encode(X), X), (wanted @ W_DEC + B_DEC) * 4)
        assert coder.spec.target == "blocks.3.hook_mlp_out" and coder.spec.is_transcoder

    def test_llamascopium_by_token(self, tmp_path):
        coder = load_coder(llamascopium(tmp_path, norm_activation="token-wise"))
        norm = X.norm(dim=1, keepdim=True)
        wanted = (X * 2 / norm @ W_ENC + B_ENC).relu()
        assert torch.allclose(coder.encode_dense(X), wanted)
        assert torch.allclose(coder.decode(coder.encode(X), X), (wanted @ W_DEC + B_DEC) * norm / 2)


class TestOneFormatEach:
    @pytest.mark.parametrize("name", RELEASES)
    def test_exactly_one_format_fits(self, tmp_path, name):
        path = RELEASES[name](tmp_path)
        fitting = [key for key, module in _formats().items() if path.is_file() == module.IS_FILE and module.matches(path)]
        assert fitting == [name]
        assert list(coder_paths(tmp_path).values()) == [path]
        coder = load_coder(path)
        assert coder.spec.format == name and coder.spec.width == F and coder.spec.d_in == D
        assert load_coder(tmp_path).spec.digest == coder.spec.digest
        module = format_of(path)
        assert module.published_name(path) and module.OPTIONS.keys() >= set()
        assert load_coder(tmp_path, hookpoint=module.published_name(path)).spec.source == str(path)
        assert coder.spec.hookpoint is not None and coder.encode(X).values.numel() > 0

    @pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
    def test_exactly_one_format_fits_what_publishers_write(self, case):
        path = case.folder / case.manifest["path"]
        fitting = [key for key, module in _formats().items() if path.is_file() == module.IS_FILE and module.matches(path)]
        assert fitting == [case.manifest["format"]]
        assert list(coder_paths(case.folder / "coder").values()) == [path]

    def test_every_format_that_is_read_has_its_numbers_from_elsewhere(self):
        assert {case.manifest["format"] for case in cases()} == FORMATS.keys()

    def test_all_in_one_folder(self, tmp_path):
        paths = {name: write(tmp_path) for name, write in RELEASES.items()}
        assert coder_paths(tmp_path).keys() == {path.relative_to(tmp_path).as_posix() for path in paths.values()}

    def test_a_file_of_a_repository_in_the_local_cache(self, tmp_path, monkeypatch):
        """What only the repository's name tells is found there."""
        commit = "0123456789abcdef0123456789abcdef01234567"
        repo = tmp_path / "models--Qwen--SAE-Res-Qwen3-8B-Base-W64K-L0_3"
        qwen_scope(repo / "snapshots", commit)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        spec = load_coder("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_3:layer5.sae.pt").spec
        assert (spec.k, spec.model, spec.revision) == (3, "Qwen/Qwen3-8B-Base", commit)

    def test_names_of_a_repository_on_the_hub(self):
        files = ["README.md", "run/trainer_0/ae.pt", "run/trainer_0/sae.pt", "run/trainer_0/config.json"]
        assert "run/trainer_0/*" in _patterns(files, None, "o/r")
        with pytest.raises(InputError, match="holds 2 coders"):
            _patterns(["layer_0.safetensors", "layer_1.safetensors"], None, "o/r")
        assert {"W_enc_3.safetensors", "W_dec_3.safetensors", "*.yaml"} <= set(_around("W_enc_3.safetensors"))


def small_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file() and item.suffix != ".json"]


PICKLED = ("openai_gpt2", "goodfire", "deepseek_r1", "qwen_scope", "batch_topk", "e2e_sae", "dunefsky", "attn_saes")


class Planted:
    """Unpickled freely, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "ran")


class TestSafety:
    @pytest.mark.parametrize("name", PICKLED)
    def test_pickles_load_with_weights_only(self, tmp_path, monkeypatch, name):
        path, asked, load = RELEASES[name](tmp_path), [], torch.load
        monkeypatch.setattr(
            "torch.load", lambda *args, **options: asked.append(options["weights_only"]) or load(*args, **options)
        )
        load_coder(path)
        assert asked and all(asked)

    @pytest.mark.parametrize("name", PICKLED)
    def test_no_code_of_a_file_runs(self, tmp_path, name):
        path = RELEASES[name](tmp_path)
        trap = tmp_path / "trap"
        for file in small_files(path):
            if file.suffix in (".pt", ".pth"):
                file.write_bytes(pickle.dumps({"W_enc": Planted(trap), "state_dict": {"W_enc": Planted(trap)}}, protocol=2))
        with pytest.raises((InputError, StoreError)):
            load_coder(path)
        assert not trap.exists()

    def test_only_the_known_object_has_a_stand_in(self, tmp_path):
        load_coder(dunefsky(tmp_path / "a"))
        path = dunefsky(tmp_path / "b", name="sae_training.config.SomethingElse")
        with pytest.raises(StoreError, match="holds more than tensors and plain values"):
            load_coder(path)

    @pytest.mark.parametrize("name", RELEASES)
    def test_a_truncated_file_is_one_sentence(self, tmp_path, name):
        path = RELEASES[name](tmp_path)
        for file in small_files(path):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises((InputError, StoreError)) as caught:
            load_coder(path)
        assert "\n" not in str(caught.value)


class TestRefused:
    def test_batch_topk_without_a_threshold(self, tmp_path):
        path = batch_topk(tmp_path, {"threshold": None})
        with pytest.raises(InputError, match=r"stores no threshold, so that what is active depends on .*\?threshold=NUMBER"):
            load_coder(path)
        coder = load_coder(f"{path}?threshold=0.5")
        assert coder.spec.reading["threshold"] == 0.5 and coder.spec.inferred == {
            "threshold": "the reading threshold, as given"
        }
        with pytest.raises(InputError, match="threshold=-1 is not possible; expected a number of at least 0"):
            load_coder(f"{path}?threshold=-1")
        with pytest.raises(InputError, match="stores no threshold"):
            load_coder(llamascopium(tmp_path / "b", act_fn="batchtopk"))
        coder = load_coder(f"{llamascopium(tmp_path / 'c', act_fn='batchtopk')}?threshold=0.75")
        assert torch.equal(coder.encode_dense(X) > 0, X / 2 @ W_ENC + B_ENC > 0.75)

    @pytest.mark.parametrize("kind", ["clt", "crosscoder", "lorsa", "molt", "other"])
    def test_other_types_of_llamascopium(self, tmp_path, kind):
        with pytest.raises(InputError, match=f"of type '{kind}', which is not read: "):
            load_coder(llamascopium(tmp_path, sae_type=kind))

    def test_crosscoder_of_gemma_scope_2(self, tmp_path):
        for folder in ("crosscoder/layer_7_13_17_22_width_262k_l0_medium", "mine/layer_7_13_17_22_width_262k_l0_medium"):
            with pytest.raises(InputError, match="crosscoder, whose latents read several layers at once"):
                load_coder(gemma_scope_2_clt(tmp_path / folder[:2], folder))
        with pytest.raises(InputError, match="crosscoder"):
            load_coder(gemma_scope_2_clt(tmp_path / "c", w_dec=W_DEC))

    def test_every_refused_release_says_why(self, tmp_path):
        def write(folder, files):
            for name, content in files.items():
                path = tmp_path / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, str):
                    path.write_text(content)
                else:
                    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
            return tmp_path / folder

        folders = {
            "crosscoder of two models (ckkissane)": write("a", {
                "blocks.14.hook_resid_pre/cc_weights.pt": {"W_enc": torch.ones(2, D, F)},
                "blocks.14.hook_resid_pre/cfg.json": "{}",
            }),
            "crosscoder (science-of-finetuning)": write("b", {"model.safetensors": {"encoder.weight": torch.ones(2, D, F)}}),
            "temporal coder (temporalSAEs)": write("c", {"conf.yaml": "", "latest_ckpt.safetensors": {"D": torch.ones(F, D)}}),
            "joint top-k cross-layer transcoder (ByteDance Cross-Layer-TopK-CLT)": write("f", {
                "config.json": '{"d_feature": 8, "k": 10}', "W_enc_0.safetensors": {"W_enc_0": torch.ones(F, D)},
                "W_dec_0.safetensors": {"W_dec_0": torch.ones(F, 3, D), "W_dec_norm_0": torch.ones(F)},
            }),
            "cross-layer transcoder of crosslayer-coding": write("d", {
                "cfg.json": "{}", "model.safetensors": {"decoders.0->1.weight": torch.ones(D, F)}
            }),
            "list of other repositories' files (circuit-tracer config.yaml)": write("e", {
                "config.yaml": "transcoders:\n- hf://google/gemma-scope-2b-pt-transcoders/layer_0/params.npz\n"
            }),
        }  # fmt: skip
        assert folders.keys() == REFUSED.keys()
        for name, folder in folders.items():
            with pytest.raises(InputError, match="which is not read: ") as caught:
                load_coder(folder)
            assert name in str(caught.value) and REFUSED[name][1] in str(caught.value)
        with pytest.raises(InputError, match="largest activations are chosen over all layers at once"):
            load_coder(tmp_path / "f" / "W_enc_0.safetensors")


class TestSettings:
    @pytest.mark.parametrize(
        ("write", "sentence"),
        [
            (lambda p: llama_scope(p, use_glu_encoder=True), "use_glu_encoder is true"),
            (lambda p: llama_scope(p, act_fn="gelu"), "act_fn = 'gelu' is not one"),
            (lambda p: llama_scope(p, d_model=None), "d_model = None; expected a whole number above 0"),
            (lambda p: llama_scope(p, norm_activation="token-wise"), "norm_activation = 'token-wise' with"),
            (
                lambda p: llama_scope(p, dataset_average_activation_norm={"in": 0, "out": 1}),
                "in = 0; expected a number above 0",
            ),
            (
                lambda p: llama_scope_r1(p, hook_point_out="blocks.15.hook_mlp_out"),
                "is a transcoder or has a gated linear encoder",
            ),
            (lambda p: llamascopium(p, norms=()), f"lacks {NORM}blocks.3.hook_resid_post"),
            (lambda p: llamascopium(p, norm_activation="batch-wise"), "'batch-wise' depends on the batch"),
            (lambda p: llamascopium(p, use_glu_encoder=True), "gated linear encoder"),
            (lambda p: openai_gpt2(p, activation="GELU"), "activation = 'GELU'"),
            (lambda p: openai_gpt2(p, activation_state_dict={}), "k = None; expected a whole number"),
            (lambda p: batch_topk(p, sae_type="gated"), "sae_type = 'gated' is not read"),
            (lambda p: circuit_tracer(p, config="activation: gelu\n"), "activation = 'gelu'"),
            (lambda p: circuit_tracer(p, config="activation: relu\n", threshold=THRESHOLD), "belong to different coders"),
            (lambda p: circuit_tracer(p, config="activation: [\n"), "not valid YAML"),
            (lambda p: circuit_tracer(p, W_enc=torch.ones(F, F)), r"W_enc has shape \(8, 8\), and b_enc says 8 latents"),
            (lambda p: gemma_scope_2(p, config={"architecture": "topk"}), "architecture = 'topk'"),
            (lambda p: gemma_scope_2(p, affine=False, config={"affine_connection": True}), "lacks the tensor 'affine_skip"),
            (lambda p: gemma_scope_2_clt(p, layer=3), "writes to 3 layers, and the file's name says layer 3"),
        ],
    )
    def test_what_no_release_says_is_refused(self, tmp_path, write, sentence):
        with pytest.raises((StoreError, InputError), match=sentence):
            load_coder(write(tmp_path))

    def test_an_option_of_another_kind_of_coder(self, tmp_path):
        with pytest.raises(InputError, match="threshold is for BatchTopK coders"):
            load_coder(f"{batch_topk(tmp_path, sae_type='topk')}?threshold=1")
        with pytest.raises(InputError, match="threshold is for BatchTopK coders"):
            load_coder(f"{llamascopium(tmp_path)}?threshold=1")
        with pytest.raises(InputError, match="k is for TopK transcoders"):
            load_coder(f"{circuit_tracer(tmp_path, threshold=THRESHOLD)}?k=1")

    def test_gemma_scope_by_its_path(self, tmp_path):
        spec = load_coder(gemma_scope(tmp_path)).spec
        assert (spec.hookpoint, spec.model, spec.l0) == ("layers.20@out", "google/gemma-2-2b", 71)
        spec = load_coder(gemma_scope(tmp_path, "transcoders", "layer_5/width_16k/average_l0_6")).spec
        assert (spec.hookpoint, spec.target) == (
            "layers.5.pre_feedforward_layernorm@in",
            "layers.5.post_feedforward_layernorm@out",
        )
        assert spec.reading["inputs"] == ["rms"] and spec.is_transcoder
        spec = load_coder(gemma_scope(tmp_path, "att", "layer_5/width_65k/average_l0_6")).spec
        assert spec.hookpoint == "layers.5.self_attn.o_proj@in"
        spec = load_coder(gemma_scope(tmp_path / "b", "res", "embedding/width_4k/average_l0_6")).spec
        assert spec.hookpoint == "layers.0@in" and spec.reading["embedding_scaled"] is True

    def test_a_circuit_tracer_file_without_settings_has_no_hookpoint(self, tmp_path):
        spec = load_coder(circuit_tracer(tmp_path, config=None)).spec
        assert (spec.hookpoint, spec.target, spec.model) == (None, None, None)

    def test_a_missing_decoder_file(self, tmp_path):
        path = circuit_tracer_clt(tmp_path)
        decoder = path.with_name("W_dec_1.safetensors")
        save_file({"W_dec_1": load_file(decoder)["W_dec_1"][:, 0].contiguous()}, decoder)
        with pytest.raises(StoreError, match="lacks W_dec_1 with three dimensions"):
            load_coder(path)
        decoder.unlink()
        with pytest.raises(StoreError, match=r"W_dec_1\.safetensors does not exist"):
            load_coder(path)


class TestCalibration:
    def test_k_latents_a_row_are_active_in_the_mean(self, tmp_path):
        x, encoder = torch.randn(200 + F, D, generator=torch.Generator().manual_seed(0)).split([200, F])
        path = batch_topk(tmp_path, {"threshold": None, "W_enc": encoder.T.contiguous()})
        threshold = calibrate_threshold(load_coder(f"{path}?threshold=0"), x, k=2)
        coder = load_coder(f"{path}?threshold={threshold}")
        # The slow oracle: the 400 largest of all positive pre-activations.
        pre = ((x - B_DEC) @ encoder.T).relu().flatten()
        assert set(coder.encode_dense(x).flatten().nonzero()[:, 0].tolist()) == set(pre.topk(400).indices.tolist())

    def test_more_than_there_are(self, tmp_path):
        with pytest.raises(InputError, match="means 16 activations, and"):
            calibrate_threshold(load_coder(batch_topk(tmp_path)), X, k=F)


class TestRules:
    def test_scaled_top_k_chooses_by_the_product_and_keeps_the_value(self):
        pre = torch.tensor([[3.0, 2.0, 1.0, -1.0]])
        acts = ScaledTopK(TopK(2), torch.tensor([0.1, 1.0, 4.0, 9.0])).apply(pre.clone(), 0)
        assert dict(zip(acts.latents.tolist(), acts.values.tolist(), strict=True)) == {1: 2.0, 2: 1.0}

    def test_unrectified_rules_keep_negative_values(self):
        pre = torch.tensor([[-1.0, -3.0, 0.0, 2.0]])
        acts = TopK(3, is_rectified=False).apply(pre.clone(), 0)
        assert dict(zip(acts.latents.tolist(), acts.values.tolist(), strict=True)) == {0: -1.0, 3: 2.0}
        acts = JumpRelu(torch.full((4,), -2.0), is_rectified=False).to(torch.device("cpu")).apply(pre.clone(), 0)
        assert acts.latents.tolist() == [0, 3]
        assert JumpRelu(torch.full((4,), -2.0)).apply(pre.clone(), 0).latents.tolist() == [3]
        assert Relu().apply(pre.clone(), 0).latents.tolist() == [3]
