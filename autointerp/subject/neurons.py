"""``neurons:MODULE``: an MLP's neurons as latents, the k largest of each token (the baseline of arXiv 2410.13928).

What the MLP's down projection reads is taken as it is, coordinate by coordinate: the k largest signed values of a token that
are positive stay, the rest is zero. So negative activations are lost, as in the paper. The decoder rows are the columns of the
down projection. A random orthogonal rotation, where wanted, tells what the basis of the neurons itself contributes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autointerp.coders.activations import TopK
from autointerp.coders.coder import Coder, CoderSpec
from autointerp.coders.load import split_options
from autointerp.digest import digest, generator
from autointerp.errors import InputError, nearest
from autointerp.subject.model import Subject

KIND = "neurons"
DEFAULT_K = 32
_OPTIONS = ("k", "rotate")
_DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "wo", "w2")
"""What families call the down projection: Llama, Gemma and Qwen; GPT-2; NeoX, BLOOM and Falcon; OPT and Phi; GPT-J; others."""


def neurons(subject: Subject, source: str) -> Coder:
    """Return the neurons named by ``neurons:MODULE[?k=N][&rotate=SEED]``; MODULE is an MLP, its block or the projection itself.

    Raises: InputError when there is no such module or no down projection in it, or k is more than there are neurons.
    """
    place, options = split_options(source)
    for name in options:
        if name not in _OPTIONS:
            raise InputError(f"coder {source}: neurons have no option {name!r}; {nearest(name, _OPTIONS)}")
    k, seed = _number(options, "k", source, DEFAULT_K), _number(options, "rotate", source)
    path = _down_projection(subject, place.partition(":")[2], source)
    decoder, bias = _columns(subject.model.get_submodule(path), path)
    width, d_out = decoder.shape
    if k is None or not 1 <= k <= width:
        raise InputError(f"coder {source} keeps k = {k} neurons and {path} reads {width}; expected 1 to {width}")
    encoder = None
    if seed is not None:
        encoder = _rotation(width, seed)
        decoder = encoder @ decoder
    return Coder(
        spec=CoderSpec(
            format=KIND,
            source=source,
            digest=digest({"neurons": path, "subject": subject.weights_digest, "rotate": seed}),
            width=width,
            d_in=width,
            d_out=d_out,
            activation="topk",
            k=k,
            hookpoint=f"{path}@in",
            target=f"{path}@out",
            is_transcoder=True,
            reconstructs=False,
            reading={"activation": "topk", "k": k, "rotate": seed},
        ),
        encoder_LD=encoder,
        encoder_bias_L=torch.zeros(width),
        decoder_LE=decoder,
        decoder_bias_E=bias,
        activation=TopK(k),
    )


def _number(options: dict[str, str], name: str, source: str, default: int | None = None) -> int | None:
    text = options.get(name)
    if text is None:
        return default
    if not text.isdigit():
        raise InputError(f"coder {source}: {name} = {text!r}; expected a whole number")
    return int(text)


def _down_projection(subject: Subject, place: str, source: str) -> str:
    """Return the full path of the down projection at or below a module."""
    try:
        path = subject.resolve(place).rpartition("@")[0]
    except InputError as error:
        raise InputError(f"coder {source}: {error}") from None
    modules = dict(subject.model.named_modules())
    below = [f"{path}{middle}.{name}" for middle in ("", ".mlp") for name in _DOWN]
    for candidate in (path, *below):
        if isinstance(modules.get(candidate), nn.Linear | Conv1D):
            return candidate
    linear = [
        name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D) and name.startswith(f"{path}.")
    ]
    raise InputError(
        f"coder {source}: {path} has no down projection ({', '.join(_DOWN)}); "
        + (f"name one of its linear modules: {', '.join(linear[:6])}" if linear else "it has no linear module at all")
    )


def _columns(module: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """Return float32 [inputs, outputs], what each input writes, and the bias [outputs]."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point() or weight.device.type == "meta":
        raise InputError(
            f"the weights of {path} are quantised or not in memory, and neurons need its columns; cache them without "
            "--quantization and --device-map"
        )
    # Linear holds [outputs, inputs], GPT-2's Conv1D the transpose.
    rows = weight if isinstance(module, Conv1D) else weight.T
    decoder = rows.detach().to("cpu", torch.float32).contiguous()
    return decoder, torch.zeros(decoder.shape[1]) if not isinstance(bias, Tensor) else bias.detach().to("cpu", torch.float32)


def _rotation(width: int, seed: int) -> Tensor:
    """Return a random orthogonal matrix, uniform over rotations and reflections (QR with the signs of R's diagonal)."""
    normal = generator("rotation of neurons", seed, width).standard_normal((width, width), dtype=np.float32)
    q, r = torch.linalg.qr(torch.from_numpy(normal))
    rotation: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return rotation
