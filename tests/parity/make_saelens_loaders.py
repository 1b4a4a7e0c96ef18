"""Cases of other publishers' files, as SAELens's own loaders for them read and run them: files are written here, nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import sae_lens.loading.pretrained_sae_loaders as loaders
import torch
from golden import draw_inputs, folder_argument, save_case, seed_of
from huggingface_hub.errors import EntryNotFoundError
from sae_lens import SAE
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

OUT = folder_argument()
D, D_OUT, WIDTH = 10, 10, 34
RESID = "blocks.{}.hook_resid_post"
BY_HAND = "by hand: the publisher's files have no public writer"


def draw(name: str, d: int = D, width: int = WIDTH, d_out: int = D_OUT) -> dict[str, Tensor]:
    """Return the tensors of a coder, latents last in the encoder and first in the decoder."""
    generator = torch.Generator().manual_seed(seed_of(name))
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "W_enc": normal(d, width) / d**0.5,
        "b_enc": 0.3 * normal(width) - 0.2,
        "W_dec": normal(width, d_out) / d_out**0.5,
        "b_dec": 0.4 * normal(d_out),
        "threshold": 0.1 + 0.2 * normal(width).abs(),
        "affine": normal(d, d_out) / d**0.5,
    }


def torch_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: tensor.clone() for name, tensor in tensors.items()}, path)


def safetensors_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def load(loader: str, root: Path, repo: str, folder: str, factor: float | None = None, **overrides: Any) -> Any:
    """Return what SAELens makes of the files below `root`, with its lookups on the hub answered from there."""

    def local(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        path = root / (subfolder or "") / filename
        if not path.is_file():
            raise EntryNotFoundError(f"no {path}")
        return str(path)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        with safe_open(root / filename, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}

    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = local, shapes
    make = getattr(loaders, loader)
    config, state, _ = make(repo, folder, device="cpu", cfg_overrides={"dtype": "float32", **overrides})
    config = loaders.handle_config_defaulting(config)
    sae = SAE.from_dict(config)
    state = {name: tensor.float() for name, tensor in state.items()}
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    if factor is not None:
        sae.fold_activation_norm_scaling_factor(factor)
    return sae


def case(
    name: str,
    loader: str,
    write: Callable[[Path], None],
    *,
    format: str,
    repo: str,
    folder: str,
    path: str,
    architecture: str,
    hookpoint: str | None,
    d: int = D,
    factor: float | None = None,
    prepare: Callable[[Tensor], Tensor] = lambda x: x,
    overrides: Mapping[str, Any] | None = None,
    **more: Any,
) -> None:
    """Write a case: `write` puts the repository's files below a folder, `prepare` does what the published hook means."""
    x = draw_inputs(name, d)
    inside = repo.rpartition("/")[2]
    scratch = OUT / f"{name}.tmp"
    write(scratch)
    sae = load(loader, scratch, repo, folder, factor, **(overrides or {}))
    with torch.no_grad():
        ready = prepare(torch.from_numpy(x))
        acts, out = sae.encode(ready), sae(ready)

    def write_coder(root: Path) -> str:
        scratch.rename(root / inside)
        return f"{inside}/{path}".rstrip("/")

    save_case(
        OUT, name, write_coder, x=x, acts=acts.numpy(), out=out.reshape(len(x), -1).numpy(), format=format, publisher="sae-lens",
        version=version("sae-lens"), architecture=architecture, saved_by=more.pop("saved_by", BY_HAND), computed_by=f"{loader}, then SAE.encode and SAE.forward",
        hookpoint=hookpoint, **more,
    )  # fmt: skip


def gemma_scope(
    name: str, site: str, repo: str, hookpoint: str, loader: str, *, prepare: Any = lambda x: x, **more: Any
) -> None:
    drawn, folder = draw(name), "layer_5/width_16k/average_l0_12"

    def write(root: Path) -> None:
        (root / folder).mkdir(parents=True)
        np.savez(root / folder / "params.npz", **{key: value.numpy() for key, value in drawn.items() if key != "affine"})

    overrides = {"d_in": D, "d_sae": WIDTH} | ({"d_out": D} if more.get("is_transcoder") else {})
    case(name, loader, write, format="gemma_scope", repo=repo, folder=folder, path=folder, architecture="jumprelu",
         variant=site, hookpoint=hookpoint, prepare=prepare, overrides=overrides, **more)  # fmt: skip


def gemma_scope_2(name: str, folder: str, config: dict[str, Any] | None, *, d_out: int, affine: bool, **more: Any) -> None:
    drawn = draw(name, d_out=d_out)
    renamed = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
    renamed |= {"affine_skip_connection": "affine"} if affine else {}

    def write(root: Path) -> None:
        safetensors_file(root / folder / "params.safetensors", {key: drawn[value] for key, value in renamed.items()})
        if config is not None:
            (root / folder / "config.json").write_text(json.dumps(config))

    case(name, "gemma_3_sae_huggingface_loader", write, format="gemma_scope_2", repo="google/gemma-scope-2-1b-pt", folder=folder,
         path=folder, **more)  # fmt: skip


def linear(name: str, loader: str, file: str, repo: str, prefix: str, format: str, hookpoint: str, **overrides: Any) -> None:
    drawn = draw(name)
    tensors = {
        f"encoder{prefix}.weight": drawn["W_enc"].T, f"encoder{prefix}.bias": drawn["b_enc"],
        f"decoder{prefix}.weight": drawn["W_dec"].T, f"decoder{prefix}.bias": drawn["b_dec"],
    }  # fmt: skip
    case(name, loader, lambda root: torch_file(root / file, tensors), format=format, repo=repo, folder=file, path=file,
         architecture="standard", hookpoint=hookpoint, overrides={"d_in": D, "d_sae": WIDTH, **overrides})  # fmt: skip


def qwen_scope(name: str) -> None:
    drawn = draw(name)
    tensors = {"W_enc": drawn["W_enc"].T, "W_dec": drawn["W_dec"].T, "b_enc": drawn["b_enc"], "b_dec": drawn["b_dec"]}
    case(name, "qwen_scope_sae_huggingface_loader", lambda root: torch_file(root / "layer5.sae.pt", tensors), format="qwen_scope",
         repo="Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_7", folder="layer5.sae.pt", path="layer5.sae.pt", architecture="topk",
         hookpoint="layers.5@out", overrides={"d_in": D, "d_sae": WIDTH})  # fmt: skip


def llama_scope(name: str) -> None:
    drawn, folder, hook = draw(name), "Llama3_1-8B-Base-L15R-8x", RESID.format(15)
    norms = {"in": 3.0, "out": 3.0}
    config = {
        "hook_point_in": hook, "hook_point_out": hook, "act_fn": "jumprelu", "jump_relu_threshold": 0.2, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": norms, "sparsity_include_decoder_norm": True, "apply_decoder_bias_to_pre_encoder": False,
        "use_decoder_bias": True, "use_glu_encoder": False, "top_k": 50, "d_model": D, "d_sae": WIDTH,
    }  # fmt: skip
    tensors = {
        "encoder.weight": drawn["W_enc"].T, "encoder.bias": drawn["b_enc"],
        "decoder.weight": drawn["W_dec"].T, "decoder.bias": drawn["b_dec"],
    }  # fmt: skip

    def write(root: Path) -> None:
        safetensors_file(
            root / folder / "checkpoints" / "final.safetensors", {key: value.bfloat16() for key, value in tensors.items()}
        )
        (root / folder / "hyperparams.json").write_text(json.dumps(config))

    case(name, "llama_scope_sae_huggingface_loader", write, format="llama_scope", repo="fnlp/Llama3_1-8B-Base-LXR-8x", folder=folder,
         path=folder, architecture="jumprelu", variant="as SAELens reads it", hookpoint=hook, factor=D**0.5 / norms["in"],
         options={"reading": "saelens"})  # fmt: skip


def llama_scope_r1(name: str) -> None:
    width, folder, hook, factor = 3 * D, "800M-Slimpajama-0-OpenR1-Math-220k/L15R", RESID.format(15), 1.75
    drawn = draw(name, width=width)
    tensors = {
        "encoder.weight": drawn["W_enc"].T, "encoder.bias": drawn["b_enc"], "decoder.weight": drawn["W_dec"].T,
        "decoder.bias": drawn["b_dec"], "log_jumprelu_threshold": drawn["threshold"].log(),
    }  # fmt: skip
    config = {
        "sae_type": "sae", "hook_point_in": hook, "hook_point_out": hook, "d_model": D, "expansion_factor": 3, "act_fn": "jumprelu",
        "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": False,
    }  # fmt: skip

    def write(root: Path) -> None:
        safetensors_file(root / folder / "sae_weights.safetensors", tensors)
        (root / folder / "config.json").write_text(json.dumps(config))

    case(name, "llama_scope_r1_distill_sae_huggingface_loader", write, format="llama_scope_r1", repo="fnlp/Llama-Scope-R1-Distill",
         folder=folder, path=folder, architecture="jumprelu", hookpoint=hook, factor=factor,
         options={"norm_scaling_factor": str(factor)})  # fmt: skip


def qwen3_transcoder(name: str) -> None:
    drawn, file = draw(name), "layer_4.safetensors"
    tensors = {"W_enc": drawn["W_enc"].T, "W_dec": drawn["W_dec"], "b_enc": drawn["b_enc"], "b_dec": drawn["b_dec"]}

    def write(root: Path) -> None:
        safetensors_file(root / file, tensors)
        (root / "config.yaml").write_text(
            "feature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\nmodel_kind: transcoder_set\nmodel_name: Qwen/Qwen3-4B\n"
            "scan: mwhanna/qwen3-4b-transcoders\n"
        )
        values = {"d_model": D, "d_feature": WIDTH, "batch_size": 64}
        (root / "wandb-config.yaml").write_text("".join(f"{key}:\n  value: {value}\n" for key, value in values.items()))

    case(name, "mwhanna_transcoder_huggingface_loader", write, format="circuit_tracer", repo="mwhanna/qwen3-4b-transcoders", folder=file,
         path=file, architecture="relu", variant="as SAELens reads mwhanna's", hookpoint="blocks.4.mlp.hook_in",
         target="blocks.4.hook_mlp_out", is_transcoder=True)  # fmt: skip


def attention(name: str) -> None:
    drawn, stem = draw(name), "gpt2-small_L5_Hcat_z_lr1.20e-03_l11.00e+00_ds49152_bs4096_dc1.00e-07_rie50000_nr4_v9"
    config = {"act_size": D, "dict_size": WIDTH, "act_name": "blocks.5.attn.hook_z"}

    def write(root: Path) -> None:
        torch_file(root / f"{stem}.pt", {key: drawn[key] for key in ("W_enc", "b_enc", "W_dec", "b_dec")})
        (root / f"{stem}_cfg.json").write_text(json.dumps(config))

    case(name, "connor_rob_hook_z_huggingface_loader", write, format="attn_saes", repo="ckkissane/attn-saes-gpt2-small-all-layers",
         folder=f"{stem}.pt", path=f"{stem}.pt", architecture="standard", hookpoint="blocks.5.attn.hook_z",
         prepare=heads)  # fmt: skip


def heads(x: Tensor) -> Tensor:
    """Return the vectors as TransformerLens gives them at hook_z, [N, heads, d_head]: SAELens joins the heads itself."""
    return x.reshape(len(x), 2, D // 2)


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


POST = "layers.5.post_feedforward_layernorm@out"
LOADER = "gemma_2_sae_huggingface_loader"
gemma_scope("gemma_scope-jumprelu-res", "res", "google/gemma-scope-2b-pt-res", "layers.5@out", LOADER)
gemma_scope("gemma_scope-jumprelu-mlp", "mlp", "google/gemma-scope-9b-pt-mlp", POST, LOADER)
gemma_scope(
    "gemma_scope-jumprelu-att", "att", "google/gemma-scope-2b-pt-att", "layers.5.self_attn.o_proj@in", LOADER, prepare=heads
)
gemma_scope(
    "gemma_scope-jumprelu-transcoders", "transcoders: the norm before its gain", "google/gemma-scope-2b-pt-transcoders",
    "layers.5.pre_feedforward_layernorm@in", "gemma_2_transcoder_huggingface_loader", prepare=rms, target=POST, is_transcoder=True,
)  # fmt: skip
IN, TARGET = (f"model.layers.17.{name}_feedforward_layernorm.output" for name in ("pre", "post"))
gemma_scope_2(
    "gemma_scope_2-jumprelu-resid_post", "resid_post/layer_17_width_16k_l0_big",
    {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.17.output", "hf_hook_point_out": "model.layers.17.output",
     "model_name": "gemma-v3-1b-pt", "type": "sae", "affine_connection": False, "l0": 120, "width": WIDTH},
    d_out=D, affine=False, architecture="jumprelu", variant="resid_post", hookpoint="model.layers.17.output",
)  # fmt: skip
gemma_scope_2(
    "gemma_scope_2-jumprelu-transcoder-affine", "transcoder_all/layer_17_width_16k_l0_big_affine",
    {"architecture": "jump_relu", "hf_hook_point_in": IN, "hf_hook_point_out": TARGET, "model_name": "gemma-v3-1b-pt",
     "type": "transcoder", "affine_connection": True, "l0": 120, "width": WIDTH},
    d_out=7, affine=True, architecture="jumprelu", variant="transcoder, affine", hookpoint=IN, target=TARGET, is_transcoder=True,
)  # fmt: skip
gemma_scope_2(
    "gemma_scope_2-jumprelu-attn_out-no-config", "attn_out_all/layer_17_width_16k_l0_small", None, d_out=D, affine=False,
    architecture="jumprelu", variant="attn_out, without config.json", hookpoint="model.layers.17.self_attn.o_proj.input",
)  # fmt: skip
NAME = "Llama-3.1-8B-Instruct-SAE-l19"
linear(
    "goodfire-relu",
    "get_goodfire_huggingface_loader",
    f"{NAME}.pth",
    f"Goodfire/{NAME}",
    "_linear",
    "goodfire",
    "layers.19@out",
)
NAME = "DeepSeek-R1-Distill-Llama-8B-SAE-l19"
linear(
    "deepseek_r1-relu",
    "deepseek_r1_sae_huggingface_loader",
    f"{NAME}.pt",
    f"qresearch/{NAME}",
    "",
    "deepseek_r1",
    "layers.19@out",
)
qwen_scope("qwen_scope-topk")
llama_scope("llama_scope-jumprelu-as-saelens")
llama_scope_r1("llama_scope_r1-jumprelu")
qwen3_transcoder("circuit_tracer-relu-qwen3")
attention("attn_saes-relu")
