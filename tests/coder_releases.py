"""One small coder of each published format, written as its publisher writes it, from the recipe of tests/coder_fixtures.py."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tests.coder_fixtures import B_DEC, B_ENC, THRESHOLD, W_DEC, W_ENC, W_SKIP, D, F

NORM = "dataset_average_activation_norm."


def _tensors(path: Path, tensors) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, path)
    return path


def _pickle(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def _json(path: Path, config) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))


def gemma_scope(root, site="res", folder="layer_20/width_16k/average_l0_71"):
    path = root / f"gemma-scope-2b-pt-{site}" / folder
    path.mkdir(parents=True)
    tensors = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD}
    np.savez(path / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    return path


def gemma_scope_2(root, folder="transcoder_all/layer_3_width_16k_l0_big_affine", affine=True, config=None):
    path = root / "gemma-scope-2-1b-pt" / folder
    tensors = {"w_enc": W_ENC, "w_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD}
    _tensors(path / "params.safetensors", tensors | ({"affine_skip_connection": W_SKIP.T} if affine else {}))
    if config is not None:
        _json(path / "config.json", config)
    return path


def gemma_scope_2_clt(root, folder="clt/width_262k_l0_big", layer=1, layers=3, **changes):
    path = root / "gemma-scope-2-1b-pt" / folder / f"params_layer_{layer}.safetensors"
    decoder = torch.stack([W_DEC * (target + 1) for target in range(layers)], dim=1)
    tensors = {"w_enc": W_ENC, "w_dec": decoder, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD} | changes
    return _tensors(path, tensors)


def llama_scope(root, **config):
    path = root / "Llama3_1-8B-Base-L15R-8x"
    _tensors(path / "checkpoints" / "final.safetensors", {
        "encoder.weight": W_ENC.T.bfloat16(), "encoder.bias": B_ENC.bfloat16(),
        "decoder.weight": W_DEC.T.bfloat16(), "decoder.bias": B_DEC.bfloat16(),
    })  # fmt: skip
    _json(path / "hyperparams.json", {
        "hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post", "act_fn": "jumprelu",
        "jump_relu_threshold": 0.5, "norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": 4.0, "out": 4.0},
        "sparsity_include_decoder_norm": True, "apply_decoder_bias_to_pre_encoder": False, "use_decoder_bias": True,
        "use_glu_encoder": False, "top_k": 50, "d_model": D, "d_sae": F,
    } | config)  # fmt: skip
    return path


def llama_scope_r1(root, norm=4.0, **config):
    path = root / "800M-Slimpajama-0-OpenR1-Math-220k" / "L15R"
    hook = "blocks.15.hook_resid_post"
    _tensors(path / "sae_weights.safetensors", {
        "encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T, "decoder.bias": B_DEC,
        "log_jumprelu_threshold": THRESHOLD.log(), NORM + hook: None if norm is None else torch.tensor(norm),
    })  # fmt: skip
    _json(path / "config.json", {
        "sae_type": "sae", "hook_point_in": hook, "hook_point_out": hook, "d_model": D, "expansion_factor": 2, "act_fn": "jumprelu",
        "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": False, "use_decoder_bias": True, "use_glu_encoder": False,
        "apply_decoder_bias_to_pre_encoder": False, "force_unit_decoder_norm": False, "top_k": 50,
    } | config)  # fmt: skip
    return path


def llamascopium(root, tensors=None, norms=(4.0, 4.0), **config):
    path = root / "resid-post-l3"
    read = config.get("hook_point_in", "blocks.3.hook_resid_post")
    written = config.get("hook_point_out", "blocks.3.hook_resid_post")
    stored = {"W_E": W_ENC, "b_E": B_ENC, "W_D": W_DEC, "b_D": B_DEC}
    stored |= {NORM + hook: torch.tensor(norm) for hook, norm in zip((read, written), norms, strict=False)}
    _tensors(path / "sae_weights.safetensors", stored | (tensors or {}))
    _json(path / "config.json", {
        "sae_type": "sae", "hook_point_in": read, "hook_point_out": written, "d_model": D, "expansion_factor": 2,
        "act_fn": "relu", "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": False, "top_k": 3,
        "use_decoder_bias": True, "use_glu_encoder": False,
    } | config)  # fmt: skip
    return path


def openai_gpt2(root, location="resid_post_mlp_v5_32k", k=3, tied=False, **changes):
    content = {
        "pre_bias": B_DEC, "latent_bias": B_ENC, "encoder.weight": W_ENC.T.contiguous(), "decoder.weight": W_DEC.T.contiguous(),
        "stats_last_nonzero": torch.zeros(F, dtype=torch.long), "activation": "ReLU" if k is None else "TopK",
        "activation_state_dict": {} if k is None else {"k": k, "postact_fn": "ReLU"},
    } | changes  # fmt: skip
    if tied:
        content["decoder.linear.weight"] = content.pop("decoder.weight").T.contiguous()
    return _pickle(root / location / "autoencoders" / "8.pt", content)


def goodfire(root):
    return _pickle(root / "Llama-3.1-8B-Instruct-SAE-l19.pth", {
        "encoder_linear.weight": W_ENC.T.contiguous(), "encoder_linear.bias": B_ENC,
        "decoder_linear.weight": W_DEC.T.contiguous(), "decoder_linear.bias": B_DEC,
    })  # fmt: skip


def deepseek_r1(root):
    return _pickle(root / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", {
        "encoder.weight": W_ENC.T.contiguous(), "encoder.bias": B_ENC,
        "decoder.weight": W_DEC.T.contiguous(), "decoder.bias": B_DEC,
    })  # fmt: skip


def qwen_scope(root, repo="SAE-Res-Qwen3-1.7B-Base-W32K-L0_3"):
    tensors = {"W_enc": W_ENC.T.contiguous(), "W_dec": W_DEC.T.contiguous(), "b_enc": B_ENC, "b_dec": B_DEC}
    return _pickle(root / repo / "layer5.sae.pt", tensors)


def circuit_tracer(root, config="feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n", **changes):
    path = root / "transcoder-set" / "layer_2.safetensors"
    tensors = {"W_enc": W_ENC.T, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "W_skip": W_SKIP}
    _tensors(path, tensors | changes)
    if config is not None:
        (path.parent / "config.yaml").write_text("model_name: meta-llama/Llama-3.2-1B\nmodel_kind: transcoder_set\n" + config)
    return path


def circuit_tracer_clt(root, layer=1, layers=3, **changes):
    folder = root / "clt"
    decoder = torch.stack([W_DEC * (target + 1) for target in range(layer, layers)], dim=1)
    encoder = {f"W_enc_{layer}": W_ENC.T, f"b_enc_{layer}": B_ENC, f"b_dec_{layer}": B_DEC} | changes
    _tensors(folder / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": decoder})
    (folder / "config.yaml").write_text(
        "model_name: google/gemma-2-2b\nmodel_kind: cross_layer_transcoder\nfeature_input_hook: hook_resid_mid\n"
    )
    return _tensors(folder / f"W_enc_{layer}.safetensors", encoder)


def batch_topk(root, tensors=None, **config):
    path = root / "gpt2-small_blocks.8.hook_resid_pre_12288_batchtopk_32_0.0003"
    stored = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": torch.tensor(0.5)} | (tensors or {})
    _pickle(path / "sae.pt", {name: tensor for name, tensor in stored.items() if tensor is not None})
    _json(path / "config.json", {
        "act_size": D, "dict_size": F, "top_k": 3, "input_unit_norm": False, "sae_type": "batchtopk", "dtype": "torch.float32",
        "hook_point": "blocks.8.hook_resid_pre", "model_name": "gpt2-small", "group_sizes": "[2, 6]",
    } | config)  # fmt: skip
    return path


def e2e_sae(root, positions=("blocks-6-hook_resid_pre",)):
    content = {}
    for position in positions:
        content |= {
            f"{position}.encoder.0.weight": W_ENC.T.contiguous(), f"{position}.encoder.0.bias": B_ENC,
            f"{position}.decoder.weight": 3 * W_DEC.T.contiguous(), f"{position}.decoder.bias": B_DEC,
        }  # fmt: skip
    path = _pickle(root / "wandb-run" / "2024-05-01_12-00-00_400000.pt", content)
    (path.parent / "final_config.yaml").write_text("tlens_model_name: gpt2-small\n")
    return path


def dunefsky(root, name="sae_training.config.LanguageModelSAERunnerConfig", transcoder=True):
    """The class of the object in the file exists only while it is written, as it does not where the file is read."""
    module_name, _, class_name = name.rpartition(".")
    made = {part: types.ModuleType(part) for part in ("sae_training", module_name)}
    config_class = type(class_name, (), {"__module__": module_name, "__qualname__": class_name})
    setattr(made[module_name], class_name, config_class)
    config = config_class()
    hook = "blocks.8.ln2.hook_normalized" if transcoder else "blocks.8.hook_resid_pre"
    vars(config).update(hook_point=hook, out_hook_point="blocks.8.hook_mlp_out", model_name="gpt2-small", dtype=torch.float32,
                        device=torch.device("cpu"), is_transcoder=transcoder, layers=[8], seed=None)  # fmt: skip
    state = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    sys.modules.update(made)
    try:
        return _pickle(
            root / f"final_sparse_autoencoder_gpt2-small_{hook}_24576.pt",
            {"cfg": config, "state_dict": state | ({"b_dec_out": 2 * B_DEC} if transcoder else {})},
        )
    finally:
        for part in made:
            del sys.modules[part]


def attn_saes(root):
    path = root / "gpt2-small_L5_Hcat_z_lr1.20e-03_l11.00e+00_ds49152.pt"
    _json(path.with_name(path.stem + "_cfg.json"), {"act_size": D, "dict_size": F, "act_name": "blocks.5.attn.hook_z"})
    return _pickle(path, {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC})


RELEASES = {
    function.__name__: function
    for function in (
        gemma_scope, gemma_scope_2, gemma_scope_2_clt, llama_scope, llama_scope_r1, llamascopium, openai_gpt2, goodfire, deepseek_r1,
        qwen_scope, circuit_tracer, circuit_tracer_clt, batch_topk, e2e_sae, dunefsky, attn_saes,
    )
}  # fmt: skip
"""Name in FORMATS -> what writes one below a folder and returns what to load."""
