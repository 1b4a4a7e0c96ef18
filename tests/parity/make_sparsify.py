"""Cases of sparsify: SAEs and transcoders with both activations, and its fork clt-training after the fork's equations."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from golden import draw_inputs, folder_argument, save_case, seed_of
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

OUT = folder_argument()
D, WIDTH, K = 10, 40, 8


def drawn(shape: Any, name: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed_of(name)))


def make(name: str, **settings: Any) -> SparseCoder:
    """Return a coder whose every tensor is random and of the size that trained ones have."""
    coder = SparseCoder(D, SparseCoderConfig(k=K, **({"num_latents": WIDTH} | settings)))
    for key, tensor in coder.state_dict().items():
        tensor.copy_(drawn(tensor.shape, name + key) * (0.3 if tensor.ndim == 1 else D**-0.5))
    return coder


def case(
    architecture: str, variant: str, coder: SparseCoder, *, folder: str = "layers.5", without: tuple[str, ...] = ()
) -> None:
    name = name_of(architecture, variant)
    x = torch.from_numpy(draw_inputs(name, D))

    def write(root: Path) -> str:
        coder.save_to_disk(root / folder)
        path = root / folder / "cfg.json"
        config = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
        path.write_text(json.dumps(config))
        return folder

    with TemporaryDirectory() as scratch:
        write(Path(scratch))
        loaded = SparseCoder.load_from_disk(Path(scratch) / folder)
    with torch.no_grad():
        top_acts, top_indices, _ = loaded.encode(x)
        out = loaded.decode(top_acts, top_indices)
        out = out if loaded.W_skip is None else out + x @ loaded.W_skip.mT
        # With multi_topk the forward pass reports 4 k latents, which are there for its loss.
        assert coder.cfg.multi_topk or torch.allclose(loaded(x).sae_out, out, atol=1e-5)
    acts = torch.zeros(len(x), loaded.num_latents).scatter(1, top_indices, top_acts)
    module, reads_input = folder.partition("/")[0], coder.cfg.transcode or coder.cfg.skip_connection
    save_case(
        OUT,
        name,
        write,
        x=x.numpy(),
        acts=acts.numpy(),
        out=out.numpy(),
        format="sparsify",
        publisher="eai-sparsify",
        version=version("eai-sparsify"),
        architecture=architecture,
        variant=variant,
        saved_by="SparseCoder.save_to_disk" + (f", then {' and '.join(without)} removed from cfg.json" if without else ""),
        computed_by="SparseCoder.load_from_disk, encode and decode, + x @ W_skip.T as in forward",
        hookpoint=f"{module}@{'in' if reads_input else 'out'}",
        target=f"{module}@out" if reads_input else None,
        is_transcoder=reads_input,
    )


def name_of(architecture: str, variant: str) -> str:
    return "-".join(["sparsify", *f"{architecture} {variant}".replace(",", "").split()])


def one(architecture: str, variant: str, *, folder: str = "layers.5", without: tuple[str, ...] = (), **settings: Any) -> None:
    case(architecture, variant, make(name_of(architecture, variant), **settings), folder=folder, without=without)


one("topk", "")
one("topk", "multi_topk, expansion_factor, seed", folder="layers.5/seed1", num_latents=0, expansion_factor=4, multi_topk=True)
one("topk", "transcoder", folder="layers.5.mlp", transcode=True)
one("topk", "skip transcoder", folder="layers.5.mlp", transcode=True, skip_connection=True)
one("topk", "skip transcoder of before transcode", folder="h.5.mlp", skip_connection=True, without=("transcode",))
one("groupmax", "", activation="groupmax")
one("groupmax", "skip transcoder", folder="layers.5.mlp", activation="groupmax", transcode=True, skip_connection=True)


# The fork is on no package index: its equations in plain loops. Once run beside the repository's own code at this commit (with a plain
# sum in place of its Triton decoder): the same active latents, and outputs equal to 3e-6.
FORK = "cf9821f2b11faa36b821c0659a27d4542078dca6"


def fork(variant: str, *, edit: Callable[[dict[str, Tensor], str], None], folder: str = "h.7.mlp", **settings: Any) -> None:
    architecture = "topk (clt-training)"
    name = name_of("topk clt-training", variant)
    given = {"transcode": True, "normalize_io": False, "post_encoder_scale": False, "n_targets": 0, "coalesce_topk": "none"}
    config = {"d_in": D, "num_latents": WIDTH, "k": K, "activation": "topk", "skip_connection": True} | given | settings
    shapes = {"encoder.weight": (WIDTH, D), "encoder.bias": (WIDTH,), "W_dec": (WIDTH, D), "b_dec": (D,), "W_skip": (D, D)}
    shapes |= {"post_enc": (WIDTH,)}
    tensors = {key: drawn(shape, name + key) * (0.3 if len(shape) == 1 else D**-0.5) for key, shape in shapes.items()}
    edit(tensors, name)

    def write(root: Path) -> str:
        (root / folder).mkdir(parents=True)
        save_file(tensors, root / folder / "sae.safetensors")
        (root / folder / "cfg.json").write_text(json.dumps(config))
        return folder

    with TemporaryDirectory() as scratch:
        write(Path(scratch))
        held = load_file(Path(scratch) / folder / "sae.safetensors")
    x = torch.from_numpy(draw_inputs(name, D))
    pick = lambda one, many: held[one] if one in held else held[f"{many}.0"]  # noqa: E731
    root = D**0.5
    scaled = x * (root / held["in_norm"]) if config["normalize_io"] else x
    centred = scaled if config["transcode"] else scaled - pick("b_dec", "b_decs")
    acts, out = torch.zeros(len(x), WIDTH), torch.zeros(len(x), D)
    for row in range(len(x)):
        pre = (held["encoder.weight"] @ centred[row] + held["encoder.bias"]).relu()
        for latent in pre.topk(K).indices.tolist():
            acts[row, latent] = pre[latent]
            if pre[latent] > 0:
                value = pre[latent] + pick("post_enc", "post_encs")[latent]
                value = value * pick("post_enc_scale", "post_enc_scales")[latent] if config["post_encoder_scale"] else value
                out[row] += value * pick("W_dec", "W_decs")[latent]
        out[row] += pick("b_dec", "b_decs") + pick("W_skip", "W_skips") @ scaled[row]
        out[row] *= held["out_norm"] / root if config["normalize_io"] else 1
    save_case(
        OUT,
        name,
        write,
        x=x.numpy(),
        acts=acts.numpy(),
        out=out.numpy(),
        format="sparsify",
        publisher="EleutherAI/clt-training",
        version=FORK[:10],
        architecture=architecture,
        variant=variant,
        saved_by="by hand: the repository is on no package index",
        computed_by="the repository's equations written out, one latent at a time",
        hookpoint=f"{folder}@in",
        target=f"{folder}@out",
        is_transcoder=True,
    )


def with_norms(tensors: dict[str, Tensor], name: str) -> None:
    tensors |= {"in_norm": torch.tensor([7.5]), "out_norm": torch.tensor([4.25])}


def with_targets(tensors: dict[str, Tensor], name: str) -> None:
    tensors["post_enc_scale"] = 1 + 0.3 * drawn((WIDTH,), name + "scale")
    for key, many in {
        "W_dec": "W_decs", "b_dec": "b_decs", "W_skip": "W_skips", "post_enc": "post_encs", "post_enc_scale": "post_enc_scales",
    }.items():  # fmt: skip
        tensor = tensors.pop(key)
        for target in range(3):
            tensors[f"{many}.{target}"] = tensor if target == 0 else drawn(tensor.shape, f"{name}{many}{target}")


fork("post_enc", edit=lambda tensors, name: None)
fork("normalize_io", edit=with_norms, normalize_io=True)
fork("normalize_io, b_dec subtracted", edit=with_norms, normalize_io=True, transcode=False)
fork("three targets", edit=with_targets, n_targets=3, post_encoder_scale=True)
