"""Cases of publishers whose code is in no package index, made by that code in clones.

``AUTOINTERP_CLONES`` names a folder with a clone of each repository in CLONES under the name given there, at the commit given
there. Without it nothing is made. Besides the clones' own code this needs torch, transformer-lens and what they import.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from golden import draw_inputs, folder_argument, save_case, seed_of
from safetensors.torch import save_file
from torch import Tensor, nn

OUT = folder_argument()
D, D_OUT, WIDTH, LAYERS, K = 10, 7, 34, 3, 7
CLONES = {
    "openai/sparse_autoencoder": "4965b94",
    "decoderesearch/circuit-tracer": "4bb8c0e",
    "OpenMOSS/Language-Model-SAEs": "95281ac",
    "OpenMOSS/Language-Model-SAEs of November 2024": "7bfb3f1",
    "OpenMOSS/Language-Model-SAEs of March 2025": "44c9ddd",
    "bartbussmann/matryoshka_sae": "c7c5787",
    "bartbussmann/BatchTopK": "b9aab1c",
    "ApolloResearch/e2e_sae": "83b4add",
    "jacobdunefsky/transcoder_circuits": "8721ff0",
}
"""Repository -> commit; the clone's folder is the commit."""


def clone(publisher: str, inside: str = "") -> Path:
    """Return the folder of a clone, with it on the path for imports."""
    folder = Path(os.environ["AUTOINTERP_CLONES"]) / CLONES[publisher] / inside
    assert folder.is_dir(), f"expected a clone of {publisher} at {folder}"
    sys.path.insert(0, str(folder))
    return folder


def fill(module: nn.Module, name: str) -> None:
    """Draw every parameter: matrices for outputs of the size of the input, biases that make most latents inactive."""
    generator = torch.Generator().manual_seed(seed_of(name))
    for key, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        drawn = torch.randn(tensor.shape, generator=generator)
        is_threshold = "threshold" in key
        if is_threshold and "log" not in key:
            drawn = 0.1 + 0.2 * drawn.abs()
        elif is_threshold:
            drawn = (0.1 + 0.2 * drawn.abs()).log()
        elif tensor.ndim > 1:
            drawn = drawn / D**0.5
        else:
            drawn = 0.3 * drawn - (0.2 if "enc" in key or "b_E" in key or "latent" in key else 0)
        with torch.no_grad():
            tensor.copy_(drawn)


def save(name: str, write: Callable[[Path], str], x: Tensor, acts: Tensor, out: Tensor, publisher: str, **more: Any) -> None:
    arrays = {key: value.detach().float().numpy() for key, value in (("x", x), ("acts", acts), ("out", out))}
    publisher_name = publisher.partition(" of ")[0]
    save_case(OUT, name, write, **arrays, publisher=publisher_name, version=CLONES[publisher], **more)


def inputs(name: str) -> Tensor:
    return torch.from_numpy(draw_inputs(name, D))


def openai() -> None:
    publisher = "openai/sparse_autoencoder"
    clone(publisher)
    model = importlib.import_module("sparse_autoencoder.model")
    for name, activation, tied, place, hook in (
        ("openai_gpt2-topk", model.TopK(K), False, "resid_post_mlp_v5_32k", "blocks.8.hook_resid_post"),
        ("openai_gpt2-relu", nn.ReLU(), False, "mlp_post_act", "blocks.8.mlp.hook_post"),
        ("openai_gpt2-topk-tied", model.TopK(K), True, "resid_post_attn_v5_32k", "blocks.8.hook_resid_mid"),
    ):
        is_topk = isinstance(activation, model.TopK)
        coder = model.Autoencoder(WIDTH, D, activation=activation, tied=tied, normalize=is_topk)
        fill(coder, name)
        x = inputs(name)

        def write(root: Path, coder: Any = coder, place: str = place) -> str:
            path = root / place / "autoencoders" / "8.pt"
            path.parent.mkdir(parents=True)
            torch.save(coder.state_dict(), path)
            return path.relative_to(root).as_posix()

        _, acts, out = coder(x)
        save(name, write, x, acts, out, publisher, format="openai_gpt2", architecture="topk" if is_topk else "relu",
             variant="tied" if tied else "", saved_by="torch.save of Autoencoder.state_dict", computed_by="Autoencoder.forward",
             hookpoint=hook)  # fmt: skip


def circuit_tracer() -> None:
    publisher = "decoderesearch/circuit-tracer"
    clone(publisher)
    single = importlib.import_module("circuit_tracer.transcoder.single_layer_transcoder")
    cross = importlib.import_module("circuit_tracer.transcoder.cross_layer_transcoder")
    functions = importlib.import_module("circuit_tracer.transcoder.activation_functions")
    hooks = "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    kind = "model_kind: transcoder_set\nmodel_name: meta-llama/Llama-3.2-1B\nscan: mntss/transcoder-Llama-3.2-1B\n"
    options = {"device": torch.device("cpu"), "dtype": torch.float32}
    for name, activation, skip, config in (
        ("circuit_tracer-relu-skip", torch.nn.functional.relu, True, ""),
        ("circuit_tracer-jumprelu", functions.JumpReLU(torch.zeros(WIDTH)), False, ""),
        ("circuit_tracer-topk", functions.TopK(28), False, "activation: topk\n" + hooks + "k: 28\n"),
    ):
        coder = single.SingleLayerTranscoder(D, WIDTH, activation, 2, skip_connection=skip, **options)
        fill(coder, name)
        if isinstance(activation, functions.JumpReLU):
            # Some thresholds below zero: this publisher keeps negative activations above them.
            activation.threshold -= 0.3
        x = inputs(name)

        def write(root: Path, coder: Any = coder, config: str = config) -> str:
            coder.to_safetensors(str(root / "layer_2.safetensors"))
            (root / "config.yaml").write_text((config or hooks) + kind)
            return "layer_2.safetensors"

        acts, out = coder.encode(x), coder(x)
        save(name, write, x, acts, out, publisher, format="circuit_tracer", architecture=name.split("-")[1], variant="W_skip" * skip,
             saved_by="SingleLayerTranscoder.to_safetensors", computed_by="SingleLayerTranscoder.encode and forward",
             hookpoint="blocks.2.hook_resid_mid", target="blocks.2.hook_mlp_out", is_transcoder=True)  # fmt: skip

    for name, activation in (("circuit_tracer_clt-relu", "relu"), ("circuit_tracer_clt-jumprelu", "jump_relu")):
        clt = cross.CrossLayerTranscoder(LAYERS, WIDTH, D, activation_function=activation, lazy_decoder=False, **options)
        fill(clt, name)
        x = inputs(name)

        def write_clt(root: Path, clt: Any = clt) -> str:
            # Only the layer of the case; the publisher writes all of them.
            with TemporaryDirectory() as scratch:
                clt.to_safetensors(scratch)
                for part in ("W_enc_1.safetensors", "W_dec_1.safetensors"):
                    (root / part).write_bytes((Path(scratch) / part).read_bytes())
            (root / "config.yaml").write_text(hooks + kind.replace("transcoder_set", "cross_layer_transcoder"))
            return "W_enc_1.safetensors"

        acts, out = _one_layer(clt, x, 1)
        save(name, write_clt, x, acts, out, publisher, format="circuit_tracer_clt", architecture=activation.replace("_", ""),
             saved_by="CrossLayerTranscoder.to_safetensors",
             computed_by="CrossLayerTranscoder.encode and decode with the latents of one layer alone, minus b_dec",
             hookpoint="blocks.1.hook_resid_mid", is_transcoder=True)  # fmt: skip
    _gemma_scope_2_clt(publisher, cross, options)


def _one_layer(clt: Any, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Return the latents of one layer and what they alone add to its own and all later outputs, side by side."""
    stacked = torch.zeros(LAYERS, *x.shape)
    stacked[layer] = x
    features = clt.encode(stacked)
    alone = torch.zeros_like(features)
    alone[layer] = features[layer]
    added = clt.decode(alone, stacked) - clt.b_dec[:, None]
    return features[layer], torch.cat(list(added[layer:]), dim=1)


def _gemma_scope_2_clt(publisher: str, cross: Any, options: dict[str, Any]) -> None:
    name = "gemma_scope_2_clt-jumprelu-affine"
    generator = torch.Generator().manual_seed(seed_of(name))
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    layers = [
        {
            "w_enc": normal(D, WIDTH) / D**0.5, "w_dec": normal(WIDTH, LAYERS, D) / D**0.5, "b_enc": 0.3 * normal(WIDTH) - 0.2,
            "b_dec": 0.4 * normal(D), "threshold": 0.1 + 0.2 * normal(WIDTH).abs(), "affine_skip_connection": normal(D, D) / D**0.5,
        }
        for _ in range(LAYERS)
    ]  # fmt: skip
    x = inputs(name)
    with TemporaryDirectory() as scratch:
        for index, tensors in enumerate(layers):
            save_file(tensors, f"{scratch}/{index}.safetensors")
        # The loader leaves out the last path that it is given.
        paths = {index: f"{scratch}/{min(index, LAYERS - 1)}.safetensors" for index in range(LAYERS + 1)}
        clt = cross.load_gemma_scope_2_clt(paths, **options)
    acts, out = _one_layer(clt, x, 1)

    def write(root: Path) -> str:
        folder = "gemma-scope-2-1b-pt/clt/width_262k_l0_medium_affine"
        (root / folder).mkdir(parents=True)
        save_file(layers[1], root / folder / "params_layer_1.safetensors")
        (root / folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", "affine_connection": True}))
        return f"{folder}/params_layer_1.safetensors"

    save(name, write, x, acts, out, publisher, format="gemma_scope_2_clt", architecture="jumprelu", variant="affine",
         saved_by="by hand: Google's writer is not public",
         computed_by="load_gemma_scope_2_clt, then CrossLayerTranscoder.encode and decode with the latents of one layer alone, minus b_dec",
         hookpoint="model.layers.1.pre_feedforward_layernorm.output", is_transcoder=True)  # fmt: skip


def llamascopium() -> None:
    publisher = "OpenMOSS/Language-Model-SAEs"
    clone(publisher, "src")
    models = importlib.import_module("llamascopium.models.sae")
    # What is written names the package's version, which a clone has none of.
    importlib.import_module("llamascopium.models.sparse_dictionary").version = lambda package: "of a clone"
    read = "blocks.3.hook_resid_post"
    for act_fn, norm, include, written in (
        ("relu", "dataset-wise", False, read),
        ("jumprelu", "dataset-wise", True, "blocks.3.hook_mlp_out"),
        ("topk", "dataset-wise", True, read),
        ("topk", "token-wise", False, read),
        ("relu", "inference", True, read),
    ):
        name = f"llamascopium-{act_fn}-{norm}{'-decoder-norm' * include}{'-transcoder' * (written != read)}"
        config = models.SAEConfig(
            hook_point_in=read, hook_point_out=written, d_model=D, expansion_factor=WIDTH / D, act_fn=act_fn, norm_activation=norm,
            sparsity_include_decoder_norm=include, top_k=K, dtype=torch.float32,
        )  # fmt: skip
        coder = models.SparseAutoEncoder(config)
        fill(coder, name)
        if norm == "dataset-wise":
            coder.set_dataset_average_activation_norm({read: 2.0, written: 2.0 if written == read else 5.0})
        else:
            coder.set_dataset_average_activation_norm({read: 1.0})
        x = inputs(name)
        with torch.no_grad():
            ready, scale = coder.normalize_activations({read: x, written: x}, return_scale_factor=True)
            acts = coder.encode(ready[read])
            out = coder.denormalize_activations({written: coder.decode(acts)}, {written: scale[written]})[written]

        def write(root: Path, coder: Any = coder, config: Any = config) -> str:
            coder.save_pretrained(root)
            config.save_hyperparameters(root)
            return "."

        save(name, write, x, acts, out, publisher, format="llamascopium", architecture=act_fn,
             variant=", ".join([norm, *["decoder norm"] * include, *["transcoder"] * (written != read)]),
             saved_by="SparseAutoEncoder.save_pretrained and SAEConfig.save_hyperparameters",
             computed_by="normalize_activations, encode, decode and denormalize_activations", hookpoint=read,
             target=written if written != read else None, is_transcoder=written != read)  # fmt: skip


def lm_saes(publisher: str) -> tuple[Any, Any]:
    """Return the modules of coders and of settings of an old version."""
    source = clone(publisher, "src")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_saes"]:
        del sys.modules[name]
    # The packages' first lines import a whole training pipeline; what is used here is in submodules.
    for package in ("lm_saes", "lm_saes.activation", "lm_saes.kernels"):
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(source / package.replace(".", "/"))]
    sys.modules["lm_saes.kernels"].decode_with_triton_spmm_kernel = None  # type: ignore[attr-defined]
    coders = importlib.import_module("lm_saes.sae")
    coders.version = lambda package: "of a clone"
    return coders, importlib.import_module("lm_saes.config")


def llama_scope_r1() -> None:
    publisher = "OpenMOSS/Language-Model-SAEs of March 2025"
    coders, configs = lm_saes(publisher)
    hook = "blocks.15.hook_resid_post"
    for name, include in (("llama_scope_r1-jumprelu-norm", False), ("llama_scope_r1-jumprelu-decoder-norm", True)):
        config = configs.SAEConfig(hook_point_in=hook, d_model=D, expansion_factor=3, act_fn="jumprelu",
                                   sparsity_include_decoder_norm=include, dtype=torch.float32, device="cpu")  # fmt: skip
        coder = coders.SparseAutoEncoder(config)
        fill(coder, name)
        coder.set_dataset_average_activation_norm({hook: 2.0})
        x = inputs(name)
        acts = coder.encode(x)
        out = coder.decode(acts) / coder.compute_norm_factor(x, hook_point=hook)

        def write(root: Path, coder: Any = coder, config: Any = config) -> str:
            folder = root / "800M-Slimpajama-0-OpenR1-Math-220k" / "L15R"
            folder.mkdir(parents=True)
            coder.save_checkpoint(folder / "sae_weights.safetensors")
            config.save_hyperparameters(folder)
            return folder.relative_to(root).as_posix()

        save(name, write, x, acts, out, publisher, format="llama_scope_r1", architecture="jumprelu",
             variant="norm in the file" + ", decoder norm" * include,
             saved_by="SparseAutoEncoder.save_checkpoint and SAEConfig.save_hyperparameters",
             computed_by="SparseAutoEncoder.encode and decode, over compute_norm_factor", hookpoint=hook)  # fmt: skip


def llama_scope() -> None:
    publisher = "OpenMOSS/Language-Model-SAEs of November 2024"
    coders, configs = lm_saes(publisher)
    residual, normalized, mlp = "blocks.15.hook_resid_post", "blocks.15.ln2.hook_normalized", "blocks.15.hook_mlp_out"
    for name, letter, read, written, norms in (
        ("llama_scope-jumprelu", "R", residual, residual, {"in": 3.0, "out": 3.0}),
        ("llama_scope-jumprelu-transcoder", "TC", normalized, mlp, {"in": D**0.5, "out": 0.8}),
    ):
        config = configs.SAEConfig(
            hook_point_in=read, hook_point_out=written, d_model=D, d_sae=WIDTH, act_fn="jumprelu", jump_relu_threshold=0.3,
            norm_activation="dataset-wise", dataset_average_activation_norm=norms, sparsity_include_decoder_norm=True,
            apply_decoder_bias_to_pre_encoder=False, use_decoder_bias=True, top_k=50, dtype=torch.float32, device="cpu",
        )  # fmt: skip
        coder = coders.SparseAutoEncoder(config)
        fill(coder, name)
        x, folder = inputs(name), f"Llama3_1-8B-Base-L15{letter}-8x"

        def write(root: Path, coder: Any = coder, config: Any = config, folder: str = folder) -> str:
            (root / folder / "checkpoints").mkdir(parents=True)
            coder.save_pretrained(str(root / folder / "checkpoints" / "final.safetensors"))
            config.save_hyperparameters(str(root / folder))
            return folder

        with TemporaryDirectory() as scratch, redirect_stdout(StringIO()):
            path = Path(scratch) / write(Path(scratch))
            loaded = coders.SparseAutoEncoder.from_pretrained(str(path))
        acts = loaded.encode(x)
        save(name, write, x, acts, loaded.decode(acts), publisher, format="llama_scope", architecture="jumprelu",
             variant="transcoder" if letter == "TC" else "", saved_by="SparseAutoEncoder.save_pretrained and SAEConfig.save_hyperparameters",
             computed_by="SparseAutoEncoder.from_pretrained, encode and decode", hookpoint=read,
             target=written if written != read else None, is_transcoder=written != read)  # fmt: skip


def bartbussmann() -> None:
    publisher = "bartbussmann/matryoshka_sae"
    newer = _module(clone(publisher) / "sae.py", "matryoshka_sae")
    older = _module(clone("bartbussmann/BatchTopK") / "sae.py", "batchtopk_sae")
    for name, kind, unit, make in (
        ("batch_topk-vanilla", "vanilla", False, newer.VanillaSAE),
        ("batch_topk-topk-input_unit_norm", "topk", True, newer.TopKSAE),
        ("batch_topk-batchtopk", "batchtopk", True, newer.BatchTopKSAE),
        ("batch_topk-matryoshka", "global-matryoshka-topk", True, newer.GlobalBatchTopKMatryoshkaSAE),
        ("batch_topk-jumprelu", "jumprelu", True, newer.JumpReLUSAE),
        ("batch_topk-batchtopk-no-threshold", "batchtopk", True, older.BatchTopKSAE),
    ):
        config = {
            "seed": 49, "act_size": D, "dict_size": WIDTH, "top_k": K, "top_k_aux": 4, "aux_penalty": 1 / 32, "n_batches_to_dead": 5,
            "l1_coeff": 0, "input_unit_norm": unit, "sae_type": kind, "device": "cpu", "dtype": torch.float32, "bandwidth": 0.001,
            "hook_point": "blocks.8.hook_resid_pre", "model_name": "gpt2-small", "group_sizes": [10, WIDTH - 10],
        }  # fmt: skip
        coder = make(config).eval()
        fill(coder, name)
        x, options, is_old = inputs(name), {}, make is older.BatchTopKSAE
        # Before the call: some coders move their threshold while they run.
        state = {key: tensor.clone() for key, tensor in coder.state_dict().items()}
        with torch.no_grad():
            if hasattr(coder, "encode") and kind not in ("vanilla", "jumprelu") and not is_old:
                acts = coder.encode(x)
                out = coder.decode(acts)
            else:
                result = coder(x)
                acts, out = result["feature_acts"], result["sae_out"]
        if is_old:
            ready = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
            values = ((ready - coder.b_dec) @ coder.W_enc).relu().flatten().sort(descending=True).values
            options = {"threshold": str(float(values[K * len(x) - 1 : K * len(x) + 1].mean()))}

        def write(root: Path, state: Any = state, config: Any = config) -> str:
            torch.save(state, root / "sae.pt")
            plain = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in config.items()}
            (root / "config.json").write_text(json.dumps(plain, indent=4))
            return "."

        save(name, write, x, acts, out, "bartbussmann/BatchTopK" if is_old else publisher, format="batch_topk", architecture=kind,
             variant="no threshold: the batch's, given" if is_old else "input_unit_norm" * unit, options=options,
             saved_by="by hand, as save_checkpoint does, which needs an account",
             computed_by="encode and decode" if kind in ("topk", "batchtopk", "global-matryoshka-topk") and not is_old else "forward",
             hookpoint="blocks.8.hook_resid_pre")  # fmt: skip


def _module(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def e2e_sae() -> None:
    publisher = "ApolloResearch/e2e_sae"
    clone(publisher)
    sparsifiers = importlib.import_module("e2e_sae.models.sparsifiers")
    name = "e2e_sae-relu"
    saes = nn.ModuleDict({f"blocks-{layer}-hook_resid_pre": sparsifiers.SAE(D, WIDTH) for layer in (6, 10)})
    fill(saes, name)
    x = inputs(name)

    def write(root: Path) -> str:
        torch.save(saes.state_dict(), root / "run_samples_400000.pt")
        (root / "final_config.yaml").write_text("tlens_model_name: gpt2-small\n")
        return "run_samples_400000.pt"

    # TransformerLens gives this publisher the residual stream without its mean.
    out, acts = saes["blocks-6-hook_resid_pre"](x - x.mean(1, keepdim=True))
    save(name, write, x, acts, out, publisher, format="e2e_sae", architecture="relu", variant="one of two positions",
         saved_by="torch.save of the state dict of SAETransformer.saes", computed_by="SAE.forward of the centred vectors",
         hookpoint="blocks.6.hook_resid_pre", options={"position": "blocks.6.hook_resid_pre"})  # fmt: skip


def dunefsky() -> None:
    publisher = "jacobdunefsky/transcoder_circuits"
    clone(publisher)
    configs = importlib.import_module("sae_training.config")
    coders = importlib.import_module("sae_training.sparse_autoencoder")
    # The configuration asks for a function that newer versions of wandb do not have.
    configs.wandb.util.generate_id = lambda: "run"
    residual, normalized, mlp = "blocks.8.hook_resid_pre", "blocks.8.ln2.hook_normalized", "blocks.8.hook_mlp_out"
    for name, is_transcoder, read in (("dunefsky-relu-transcoder", True, normalized), ("dunefsky-relu-sae", False, residual)):
        with redirect_stdout(StringIO()):
            config = configs.LanguageModelSAERunnerConfig(
                model_name="gpt2-small", hook_point=read, d_in=D, expansion_factor=3, is_transcoder=is_transcoder,
                d_out=D_OUT if is_transcoder else None, out_hook_point=mlp if is_transcoder else None, b_dec_init_method="mean",
                feature_sampling_method=None, device="cpu", use_ghost_grads=False,
            )  # fmt: skip
        coder = coders.SparseAutoencoder(config).eval()
        fill(coder, name)
        x = inputs(name)
        ready = x if is_transcoder else x - x.mean(1, keepdim=True)
        out, acts, *_ = coder(ready, mse_target=torch.ones(len(x), D_OUT) if is_transcoder else None)

        def write(root: Path, coder: Any = coder, read: str = read) -> str:
            path = root / f"final_sparse_autoencoder_gpt2-small_{read}_24576.pt"
            with redirect_stdout(StringIO()):
                coder.save_model(str(path))
            return path.name

        save(name, write, x, acts, out, publisher, format="dunefsky", architecture="relu",
             variant="transcoder" if is_transcoder else "sae: the centred residual stream",
             saved_by="SparseAutoencoder.save_model", computed_by="SparseAutoencoder.forward", hookpoint=read,
             target=mlp if is_transcoder else None, is_transcoder=is_transcoder)  # fmt: skip


if "AUTOINTERP_CLONES" not in os.environ:
    sys.exit(print("AUTOINTERP_CLONES is not set: no cases made from clones"))
torch.set_grad_enabled(False)
for make in (openai, circuit_tracer, llamascopium, llama_scope, llama_scope_r1, bartbussmann, e2e_sae, dunefsky):
    make()
