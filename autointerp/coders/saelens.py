"""SAELens coders: ``cfg.json`` and ``sae_weights.safetensors`` in a folder, of any version.

Encode: the normalisation that ``normalize_activations`` names, minus b_dec where ``apply_b_dec_to_input`` (transcoders: never),
linear, the activation of ``architecture``. Decode: + b_dec, the normalisation undone (transcoders: not), + x @ W_skip.T with x
as it came in. Settings of before version 6 lie flat and under older names. Read as the library itself does (6.54), except that
what it only warns about, and would silently get wrong, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autointerp.coders.activations import Activation, Gated, JumpRelu, MatchingPursuit, Relu, TopK
from autointerp.coders.assemble import assemble, chosen_number, length, number, peek_config, read_config
from autointerp.coders.coder import Coder
from autointerp.coders.inputs import CENTRED_HOOK, Centre, InputRule, Standardise, UnitNorm
from autointerp.coders.tensors import read_safetensors, take
from autointerp.errors import InputError, StoreError, nearest

DESCRIPTION = "SAELens: cfg.json and sae_weights.safetensors"
MARKER = "cfg.json"
IS_FILE = False
OPTIONS: Mapping[str, str] = {
    "scale": "the factor that inputs were multiplied by in training, where normalize_activations is expected_average_only_in",
    "fold_decoder_norm": "yes: activations times the norm of what their latent writes, as on Neuronpedia",
    "centre": "yes or no: whether the mean of each vector is taken out first, as in a model that TransformerLens has centred",
    "normalize": "the normalisation of inputs, in place of what cfg.json says",
}
WEIGHTS = "sae_weights.safetensors"

_ARCHITECTURES = {
    "standard", "jumprelu", "topk", "abstopk", "gated", "matching_pursuit",
    "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder",
}  # fmt: skip
_CHECKPOINT = "it is a training checkpoint whose activations depend on the batch; save it with save_inference_model"
_REFUSED = {
    "temporal": "its codes depend on the whole sequence through attention",
    "batchtopk": _CHECKPOINT,
    "matryoshka_batchtopk": _CHECKPOINT,
}
_NORMALISATIONS: dict[str, tuple[InputRule, ...]] = {
    "none": (),
    "constant_norm_rescale": (UnitNorm(),),
    "layer_norm": (Standardise(),),
    "expected_average_only_in": (),
}
_UNREADABLE_NORMALISATIONS = {
    "covariance_whitening": "the whitening is folded in at the end of training, and these weights are of before",
    "constant_scalar_rescale": "it belongs to temporal coders",
}
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_LAYER_NORM_MODEL = re.compile(r"gpt-?2|gpt-?neo|gpt-?j|pythia|opt-|bloom|tiny-?stories|gelu|solu", re.IGNORECASE)
# Releases whose files do not say so, after SAELens's own list of releases.
_CENTRED_RELEASE = re.compile(
    r"GPT2-Small-SAEs-Reformatted|GPT2-Small-Feature-Splitting-Experiment|gpt2-small-mlp-out-saes|gpt2-small__res_\w+-ajt"
)
_UNIT_NORM_RELEASE = re.compile(r"Mistral-7B-Residual-Stream-SAEs")


def matches(folder: Path) -> bool:
    """Return whether `folder` holds a coder of this format."""
    return (folder / MARKER).is_file() and (folder / WEIGHTS).is_file()


def published_name(folder: Path) -> str:
    """Return the hook's name as the configuration gives it, else the folder's name."""
    return str(_settings(peek_config(folder / MARKER)).get("hook_name") or folder.name)


def load(folder: Path, options: Mapping[str, str]) -> Coder:
    """Return the coder in `folder`.

    Raises: StoreError when a file is missing, damaged or does not fit the configuration; InputError when the coder cannot be
    read for one token at a time, or not without a constant that its files lack.
    """
    config_path, weights_path = folder / MARKER, folder / WEIGHTS
    settings = _settings(read_config(config_path))
    architecture = _architecture(settings, config_path)
    is_transcoder, has_skip = architecture.endswith("transcoder"), "skip" in architecture
    d_in, width = number(settings, "d_in", config_path), number(settings, "d_sae", config_path)
    d_out = number(settings, "d_out", config_path) if is_transcoder else d_in
    subtract = bool(settings.get("apply_b_dec_to_input", not is_transcoder))
    if is_transcoder and subtract:
        raise StoreError(f"{config_path}: apply_b_dec_to_input is true for a transcoder, whose b_dec is of the output's width")

    stored = read_safetensors(weights_path)
    tensors = _take(stored, architecture, d_in, width, d_out, weights_path)
    inferred: dict[str, str] = {}
    inputs, normalisation = _inputs(folder, settings, options, inferred)
    scale = _scale(folder, normalisation, architecture, options)
    encoder, decoder, decoder_bias = tensors["W_enc"], tensors["W_dec"], tensors["b_dec"]
    if scale != 1:
        encoder, decoder, decoder_bias = encoder * scale, decoder / scale, decoder_bias / scale
    fold, norms = _folding(folder, settings, architecture, options), torch.ones(width)
    if fold:
        norms = decoder.norm(dim=1).clamp(min=1e-8)
        encoder, decoder = encoder * norms, decoder / norms[:, None]
    if "scaling_factor" in stored:
        decoder = decoder * _fine_tuned(settings, stored["scaling_factor"], width, weights_path)[:, None]
    activation, k = _activation(settings, architecture, tensors, norms, config_path)
    if isinstance(activation, MatchingPursuit) and not subtract:
        decoder_bias = torch.zeros_like(decoder_bias)
    reading: dict[str, Any] = {"architecture": architecture, "fold_decoder_norm": fold}
    reading |= {"scale": scale} if scale != 1 else {}
    if isinstance(activation, MatchingPursuit):
        reading |= {name: getattr(activation, name) for name in ("residual_threshold", "max_iterations", "stop_on_repeat")}
    encoder_bias = tensors.get("b_enc")
    return assemble(
        format="saelens",
        path=folder,
        stored=stored,
        encoder_LD=encoder.T,
        encoder_bias_L=torch.zeros(width) if encoder_bias is None else encoder_bias * norms,
        decoder_LE=decoder,
        decoder_bias_E=decoder_bias,
        activation=activation,
        hookpoint=_hook(settings, ("hf_hook_name", "hf_hook_point_in", "hook_name")),
        target=_hook(settings, ("hf_hook_name_out", "hf_hook_point_out", "hook_name_out")) if is_transcoder else None,
        is_transcoder=is_transcoder,
        subtract=subtract,
        inputs=inputs,
        skip_ED=tensors["W_skip"] if has_skip else None,
        k=k,
        reading=reading,
        model=settings.get("model_name"),
        l0=_published_l0(folder, width, inferred),
        inferred=inferred,
        notes=_notes(settings),
    )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings under their names of today, the metadata among them."""
    metadata = config.get("metadata")
    merged = {**(metadata if isinstance(metadata, dict) else {}), **config}
    settings = {_OLD_NAMES.get(name, name): value for name, value in merged.items()}
    # Before version 6 top-k was an activation function of the standard architecture.
    if settings.get("activation_fn") == "topk" and isinstance(settings.get("activation_fn_kwargs"), dict):
        settings |= {"architecture": "topk", "k": settings["activation_fn_kwargs"].get("k", settings.get("k"))}
    if isinstance(settings.get("normalize_activations"), bool):
        settings["normalize_activations"] = "expected_average_only_in" if settings["normalize_activations"] else "none"
    return settings


def _architecture(settings: Mapping[str, Any], path: Path) -> str:
    architecture = settings.get("architecture") or "standard"
    if architecture in _REFUSED:
        raise InputError(f"{path}: a coder of the architecture {architecture!r} cannot be read: {_REFUSED[architecture]}")
    if architecture not in _ARCHITECTURES:
        raise StoreError(f"{path}: architecture = {architecture!r} is not known; {nearest(str(architecture), _ARCHITECTURES)}")
    function = settings.get("activation_fn") or "relu"
    if function not in ("relu", "topk"):
        raise StoreError(f"{path}: activation_fn = {function!r} is not one that can be read; expected 'relu' or 'topk'")
    if settings.get("hook_head_index") is not None:
        raise InputError(
            f"{path}: the coder reads head {settings['hook_head_index']} of {settings.get('hook_name')} alone, which no module "
            "gives out by itself; only coders on all heads at once can be read"
        )
    return str(architecture)


def _take(stored: Mapping[str, Tensor], architecture: str, d_in: int, width: int, d_out: int, path: Path) -> dict[str, Tensor]:
    """Return the tensors of an architecture as float32; the threshold itself where the file has its logarithm."""
    shapes: dict[str, tuple[int, ...]] = {"W_dec": (width, d_out), "b_dec": (d_out,)}
    if architecture != "matching_pursuit":
        shapes["W_enc"] = (d_in, width)
    if architecture == "gated":
        shapes |= {"b_gate": (width,), "b_mag": (width,), "r_mag": (width,)}
    elif architecture != "matching_pursuit":
        shapes["b_enc"] = (width,)
    if architecture.startswith("jumprelu"):
        shapes["log_threshold" if "log_threshold" in stored else "threshold"] = (width,)
    if "skip" in architecture:
        shapes["W_skip"] = (d_out, d_in)
    length(stored, "b_dec", path)
    unknown = sorted(set(stored) - set(shapes) - {"scaling_factor"})
    if unknown:
        raise StoreError(
            f"{path} holds {', '.join(unknown)}, which the architecture {architecture!r} does not have; "
            "the file is of another format or version"
        )
    tensors = take(stored, shapes, path)
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors["log_threshold"].exp()
    if architecture == "matching_pursuit":
        tensors["W_enc"] = tensors["W_dec"].T
    return tensors


def _inputs(
    folder: Path, settings: Mapping[str, Any], options: Mapping[str, str], inferred: dict[str, str]
) -> tuple[tuple[InputRule, ...], str]:
    """Return the input rules and the name of the normalisation."""
    name = settings.get("normalize_activations") or "none"
    if _UNIT_NORM_RELEASE.search(folder.as_posix()):
        name, inferred["inputs"] = "constant_norm_rescale", "SAELens's list of releases"
    name = options.get("normalize", name)
    if name not in _NORMALISATIONS:
        reason = _UNREADABLE_NORMALISATIONS.get(str(name)) or nearest(str(name), _NORMALISATIONS)
        raise InputError(f"{folder}: normalize_activations = {name!r} cannot be read; {reason}")
    rules = _NORMALISATIONS[name]
    # Standardising takes the mean out as well.
    if name != "layer_norm" and _is_centred(folder, settings, options, inferred):
        rules = (Centre(), *rules)
    return rules, name


def _is_centred(folder: Path, settings: Mapping[str, Any], options: Mapping[str, str], inferred: dict[str, str]) -> bool:
    """Return whether the coder was trained on vectors without their mean, which only LayerNorm models can do without."""
    if "centre" in options:
        return _yes(options, "centre", folder)
    can_be = CENTRED_HOOK.fullmatch(str(settings.get("hook_name"))) and _LAYER_NORM_MODEL.search(
        str(settings.get("model_name"))
    )
    if not can_be:
        return False
    arguments = settings.get("model_from_pretrained_kwargs")
    if isinstance(arguments, dict) and "center_writing_weights" in arguments:
        return bool(arguments["center_writing_weights"])
    if _CENTRED_RELEASE.search(folder.as_posix()):
        inferred["centre"] = "SAELens's list of releases"
        return True
    # Versions that do not record their own number let TransformerLens centre; conversions from elsewhere have the key, empty.
    is_old = arguments is None and "sae_lens_training_version" not in settings and "sae_lens_version" not in settings
    inferred["centre"] = "cfg.json is of before SAELens could leave centring out" if is_old else "cfg.json does not ask for it"
    return is_old


def _scale(folder: Path, normalisation: str, architecture: str, options: Mapping[str, str]) -> float:
    """Return the factor on inputs that is folded into the weights, as SAELens does."""
    factor = chosen_number(options, "scale", folder)
    if normalisation != "expected_average_only_in":
        if factor is not None:
            raise InputError(
                f"{folder}: scale={options['scale']} is for coders normalised by expected_average_only_in, not {normalisation}"
            )
        return 1.0
    if architecture == "matching_pursuit":
        raise InputError(
            f"{folder}: matching pursuit with expected_average_only_in cannot be read: its dictionary is also its encoder, "
            "into which no factor can be folded; save it with normalize_activations 'none'"
        )
    if factor is None:
        raise InputError(
            f"{folder}: the coder reads inputs times a constant that its files do not hold (expected_average_only_in); give it "
            "as ?scale=NUMBER after the source (sqrt(d_in) over the mean norm of the inputs; 1 where it is folded in already)"
        )
    if factor <= 0:
        raise InputError(f"{folder}: scale={options['scale']} is not possible; expected a number above 0")
    return factor


def _fine_tuned(settings: Mapping[str, Any], factor: Tensor, width: int, path: Path) -> Tensor:
    """Return the factor by which old versions multiplied each activation when they decoded it, never what they encoded."""
    factor = take({"scaling_factor": factor}, {"scaling_factor": (width,)}, path)["scaling_factor"]
    is_used = not torch.allclose(factor, torch.ones_like(factor))
    if is_used and not settings.get("finetuning_scaling_factor"):
        raise StoreError(f"{path} holds a scaling_factor that is not 1, and cfg.json does not say finetuning_scaling_factor")
    return factor if is_used else torch.ones_like(factor)


def _folding(folder: Path, settings: Mapping[str, Any], architecture: str, options: Mapping[str, str]) -> bool:
    """Return whether the norm of what each latent writes goes into its activation."""
    is_topk = architecture in ("topk", "abstopk")
    if is_topk and settings.get("rescale_acts_by_decoder_norm"):
        return True
    fold = _yes(options, "fold_decoder_norm", folder)
    if fold and (is_topk or architecture == "matching_pursuit"):
        raise InputError(
            f"{folder}: fold_decoder_norm=yes would change which latents of a {architecture} coder are active; leave it out"
        )
    return fold


def _activation(
    settings: Mapping[str, Any], architecture: str, tensors: Mapping[str, Tensor], norms: Tensor, path: Path
) -> tuple[Activation | MatchingPursuit, int | None]:
    """Return the activation and its k; `norms` are those folded in."""
    if architecture in ("topk", "abstopk"):
        k = number(settings, "k", path)
        return TopK(k, signed=architecture == "abstopk"), k
    if architecture == "gated":
        return Gated(tensors["b_gate"] * norms, tensors["r_mag"].exp(), tensors["b_mag"] * norms), None
    if architecture == "matching_pursuit":
        most = settings.get("max_iterations")
        return MatchingPursuit(
            residual_threshold=float(settings.get("residual_threshold", 1e-2)),
            max_iterations=tensors["b_dec"].numel() if most is None else number(settings, "max_iterations", path),
            stop_on_repeat=bool(settings.get("stop_on_duplicate_support", True)),
        ), None
    if "threshold" in tensors:
        return JumpRelu(tensors["threshold"] * norms), None
    return Relu(), None


def _hook(settings: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((str(settings[name]) for name in names if settings.get(name)), None)


def _published_l0(folder: Path, width: int, inferred: dict[str, str]) -> float | None:
    """Return the mean number of active latents that the publisher's firing frequencies add up to."""
    path = folder / "sparsity.safetensors"
    if not path.is_file():
        return None
    log10 = take(read_safetensors(path), {"sparsity": (width,)}, path)["sparsity"]
    inferred["l0"] = "the firing frequencies in sparsity.safetensors"
    return float((10**log10).sum())


def _notes(settings: Mapping[str, Any]) -> tuple[str, ...]:
    bos, length = settings.get("prepend_bos"), settings.get("context_size")
    notes = [] if bos is None else [f"Trained on contexts {'that begin with' if bos else 'without'} BOS."]
    notes += [f"Trained on contexts of {length} tokens."] if isinstance(length, int) else []
    return tuple(notes)


def _yes(options: Mapping[str, str], name: str, folder: Path) -> bool:
    value = options.get(name, "no")
    if value not in ("yes", "no"):
        raise InputError(f"{folder}: {name}={value} is not possible; expected yes or no")
    return value == "yes"
