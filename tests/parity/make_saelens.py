"""Cases of SAELens: every architecture with every normalisation, old configurations, folding and training checkpoints."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sae_lens
import torch
from golden import draw_inputs, folder_argument, save_case, seed_of
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEMetadata
from safetensors.torch import load_file, save_file

warnings.filterwarnings("ignore")
OUT = folder_argument()
D_IN, D_OUT, WIDTH, K, SCALE = 10, 7, 34, 6, 1.7
AUTOENCODERS = ("standard", "jumprelu", "topk", "abstopk", "gated", "matching_pursuit")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in")
HOOK = "blocks.3.hook_resid_post"
IN, TARGET = "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"


def randomised(coder: SAE[Any], name: str) -> SAE[Any]:
    """Give every tensor of the coder random values of the size that trained ones have."""
    generator = torch.Generator().manual_seed(seed_of(name))
    normal = lambda tensor: torch.randn(tensor.shape, generator=generator)  # noqa: E731
    uniform = lambda tensor: torch.rand(tensor.shape, generator=generator)  # noqa: E731
    for key, tensor in coder.state_dict().items():
        if key == "W_dec":
            # Pursuit needs rows near unit norm to end.
            low, high = (0.9, 1.1) if coder.cfg.architecture() == "matching_pursuit" else (0.4, 1.8)
            rows = normal(tensor)
            tensor.copy_(rows / rows.norm(dim=1, keepdim=True) * (low + (high - low) * uniform(tensor[:, :1])))
        elif key in ("W_enc", "W_skip"):
            tensor.copy_(normal(tensor) / tensor.shape[-2] ** 0.5)
        elif key == "threshold":
            tensor.copy_(0.1 + 0.3 * uniform(tensor))
        elif key == "topk_threshold":
            tensor.fill_(0.4)
        else:
            # Fewer latents are active where what lets them be is below zero on average.
            tensor.copy_(0.3 * normal(tensor) - (0.5 if key in ("b_enc", "b_gate") else 0))
    return coder


def make(architecture: str, name: str, registry: Any = SAE_CLASS_REGISTRY, **settings: Any) -> SAE[Any]:
    coder_class, config_class = registry[architecture]
    if "transcoder" in architecture:
        settings |= {"d_out": D_OUT, "apply_b_dec_to_input": False}
        where = {"hook_name": IN, "hook_name_out": TARGET}
    else:
        where = {"hook_name": HOOK}
    if "topk" in architecture:
        settings.setdefault("k", K)
    metadata = SAEMetadata(**({"model_name": "gpt2-small", "prepend_bos": True, "context_size": 128} | where))
    for key, value in settings.pop("metadata", {}).items():
        setattr(metadata, key, value)
    return randomised(coder_class(config_class(d_in=D_IN, d_sae=WIDTH, metadata=metadata, **settings)), name)


def case(
    architecture: str,
    variant: str,
    coder: SAE[Any],
    *,
    save: Callable[[Path], Any] | None = None,
    saved_by: str | None = None,
    load: Callable[[Path], SAE[Any]] | None = None,
    prepare: Callable[[SAE[Any]], Any] = lambda coder: None,
    computed_by: str = "SAE.load_from_disk, encode and decode",
    options: dict[str, str] | None = None,
    hook: str | None = None,
    heads: int | None = None,
    centred: bool = False,
) -> None:
    """Save the coder, load it as the library does, and record what the library then computes."""
    name = name_of(architecture, variant)
    is_transcoder = "transcoder" in architecture
    folder = hook or (IN if is_transcoder else HOOK)
    x = torch.from_numpy(draw_inputs(name, D_IN))

    def write(root: Path) -> str:
        (save or coder.save_model)(root / folder)
        return folder

    with TemporaryDirectory() as scratch:
        write(Path(scratch))
        loaded = (load or SAE.load_from_disk)(Path(scratch) / folder)
    prepare(loaded)
    with torch.no_grad():
        given = x - x.mean(dim=1, keepdim=True) if centred else x
        given = given if heads is None else given.view(len(x), heads, -1)
        acts = loaded.encode(given)
        out = loaded(given) if is_transcoder else loaded.decode(acts)
    save_case(
        OUT,
        name,
        write,
        x=x.numpy(),
        acts=acts.numpy(),
        out=out.reshape(len(x), -1).numpy(),
        format="saelens",
        publisher="sae-lens",
        version=sae_lens.__version__,
        architecture=architecture,
        variant=variant,
        saved_by=saved_by or f"{type(coder).__name__}.save_model",
        computed_by=computed_by if not is_transcoder else computed_by.replace("encode and decode", "encode and forward"),
        hookpoint=folder,
        target=TARGET if is_transcoder else None,
        is_transcoder=is_transcoder,
        options=options,
    )


def name_of(architecture: str, variant: str) -> str:
    return "-".join(["saelens", architecture, *variant.replace(",", "").split()])


def old(coder: SAE[Any], config: dict[str, Any], extra: dict[str, torch.Tensor] | None = None) -> Callable[[Path], None]:
    """Return what saves a coder as versions before 6 did, which no version of today writes."""

    def save(path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        save_file(coder.state_dict() | (extra or {}), path / "sae_weights.safetensors")
        common = {"d_in": D_IN, "d_sae": WIDTH, "dtype": "torch.float32", "device": "cpu", "model_name": "pythia-70m"}
        (path / "cfg.json").write_text(json.dumps(common | {"sae_lens_training_version": None} | config))

    return save


BY_HAND = "by hand: versions before 6 wrote flat configurations, which today's still reads"

for architecture in (*AUTOENCODERS, *TRANSCODERS):
    for normalisation in NORMALISATIONS:
        variant = "" if normalisation == "none" else normalisation
        settings: dict[str, Any] = {"normalize_activations": normalisation}
        if normalisation != "expected_average_only_in":
            case(architecture, variant, make(architecture, name_of(architecture, variant), **settings))
        elif architecture != "matching_pursuit":
            case(
                architecture,
                variant,
                make(architecture, name_of(architecture, variant), **settings),
                prepare=lambda coder: coder.fold_activation_norm_scaling_factor(SCALE),
                computed_by="SAE.load_from_disk, fold_activation_norm_scaling_factor, encode and decode",
                options={"scale": str(SCALE)},
            )

for architecture in AUTOENCODERS:
    variant = "b_dec not subtracted"
    case(architecture, variant, make(architecture, name_of(architecture, variant), apply_b_dec_to_input=False))
for architecture in ("topk", "abstopk"):
    for normalisation in ("none", "layer_norm"):
        variant = "rescaled by decoder norm" + ("" if normalisation == "none" else f", {normalisation}")
        settings = {"rescale_acts_by_decoder_norm": True, "normalize_activations": normalisation}
        case(architecture, variant, make(architecture, name_of(architecture, variant), **settings))
for architecture in ("standard", "jumprelu", "gated", "topk", "jumprelu_skip_transcoder"):
    variant = "decoder norm folded"
    settings = {"rescale_acts_by_decoder_norm": True} if architecture == "topk" else {}
    case(
        architecture,
        variant,
        make(architecture, name_of(architecture, variant), **settings),
        load=lambda path: SAE.load_from_disk(path, fold_W_dec_norm=True),
        computed_by="SAE.load_from_disk with fold_W_dec_norm, encode and decode",
        options={} if architecture == "topk" else {"fold_decoder_norm": "yes"},
    )
variant = "expected_average_only_in, decoder norm folded"


def fold_both(coder: SAE[Any]) -> None:
    coder.fold_activation_norm_scaling_factor(SCALE)
    coder.fold_W_dec_norm()


case(
    "jumprelu",
    variant,
    make("jumprelu", name_of("jumprelu", variant), normalize_activations="expected_average_only_in"),
    prepare=fold_both,
    computed_by="SAE.load_from_disk, fold_activation_norm_scaling_factor, fold_W_dec_norm, encode and decode",
    options={"scale": str(SCALE), "fold_decoder_norm": "yes"},
)
variant = "seven steps, none skipped"
settings = {"max_iterations": 7, "residual_threshold": 0.0, "stop_on_duplicate_support": False}
case("matching_pursuit", variant, make("matching_pursuit", name_of("matching_pursuit", variant), **settings))

# All heads of an attention layer; the module of Hugging Face that gives them out gives them flat.
variant, hook = "hook_z", "blocks.3.attn.hook_z"
settings = {"reshape_activations": "hook_z", "metadata": {"hook_name": hook}}
case("standard", variant, make("standard", name_of("standard", variant), **settings), hook=hook, heads=2)
# A residual stream that TransformerLens has centred.
variant = "centred"
settings = {"metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": True}}}
case(
    "standard",
    variant,
    make("standard", name_of("standard", variant), **settings),
    computed_by="SAE.load_from_disk, encode and decode, given the inputs without their mean as TransformerLens's centring makes them",
    centred=True,
)

# Saved by the training classes.
for architecture in ("topk", "batchtopk", "matryoshka_batchtopk"):
    variant = "saved by training"
    settings = {"matryoshka_widths": [12, WIDTH]} if "matryoshka" in architecture else {}
    coder = make(architecture, name_of(architecture, variant), SAE_TRAINING_CLASS_REGISTRY, **settings)
    case(architecture, variant, coder, save=coder.save_inference_model, saved_by=f"{type(coder).__name__}.save_inference_model")
variant = "log_threshold"
coder = make("jumprelu", name_of("jumprelu", variant), SAE_TRAINING_CLASS_REGISTRY)


def save_log_threshold(path: Path) -> None:
    coder.save_model(path)
    tensors = load_file(path / "sae_weights.safetensors")
    tensors["log_threshold"] = tensors.pop("threshold").log()
    save_file(tensors, path / "sae_weights.safetensors")


case(
    "jumprelu",
    variant,
    coder,
    save=save_log_threshold,
    saved_by="by hand: older training checkpoints hold the logarithm, which today's still reads",
    load=SAE_TRAINING_CLASS_REGISTRY["jumprelu"][0].load_from_disk,
    computed_by="JumpReLUTrainingSAE.load_from_disk, encode and decode",
)

# Configurations of before version 6.
coder = make("standard", name_of("standard", "flat"))
config = {"hook_point": HOOK, "activation_fn_str": "relu", "normalize_activations": False, "prepend_bos": True}
config |= {"finetuning_scaling_factor": False, "model_from_pretrained_kwargs": {}}
ones = {"scaling_factor": torch.ones(WIDTH)}
case("standard", "flat", coder, save=old(coder, config, ones), saved_by=BY_HAND)
coder = make("topk", name_of("topk", "flat, layer_norm"))
config = {"architecture": "standard", "hook_name": HOOK, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
config |= {"normalize_activations": "layer_norm", "model_from_pretrained_kwargs": {}}
case("topk", "flat, layer_norm", coder, save=old(coder, config), saved_by=BY_HAND)
coder = make("gated", name_of("gated", "flat"), apply_b_dec_to_input=False)
config = {"architecture": "gated", "hook_name": HOOK, "activation_fn_str": "relu", "apply_b_dec_to_input": False}
config |= {"normalize_activations": "none", "model_from_pretrained_kwargs": {}}
case("gated", "flat", coder, save=old(coder, config), saved_by=BY_HAND)
coder = make("standard", name_of("standard", "flat, hook_z"))
config = {"hook_point": hook, "activation_fn_str": "relu"}
case("standard", "flat, hook_z", coder, save=old(coder, config), saved_by=BY_HAND, hook=hook, heads=2)
