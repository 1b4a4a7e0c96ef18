"""Cases of dictionary_learning: its seven classes, with and without a configuration, backups, and the layout of the first release."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from golden import draw_inputs, folder_argument, save_case, seed_of

# Imported by the package's first line and not used by what is used here; it needs a language model's whole surroundings.
sys.modules["nnsight"] = ModuleType("nnsight")
sys.modules["nnsight"].LanguageModel = object  # type: ignore[attr-defined]
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402

OUT = folder_argument()
D, WIDTH, K, THRESHOLD, NORM_FACTOR = 10, 34, 6, 0.5, 1.4
RUN = "run/resid_post_layer_3/trainer_0"
SAVED_BY = "torch.save of state_dict(), as trainSAE does"
TRAINERS = {
    AutoEncoder: "StandardTrainer",
    AutoEncoderNew: "StandardTrainerAprilUpdate",
    GatedAutoEncoder: "GatedSAETrainer",
    AutoEncoderTopK: "TopKTrainer",
    BatchTopKSAE: "BatchTopKTrainer",
    MatryoshkaBatchTopKSAE: "MatryoshkaBatchTopKTrainer",
    JumpReluAutoEncoder: "JumpReluTrainer",
}


def make(kind: Any, name: str, threshold: float = THRESHOLD) -> Any:
    """Return a dictionary whose every tensor is random and of the size that trained ones have."""
    if kind is MatryoshkaBatchTopKSAE:
        dictionary = kind(D, WIDTH, K, group_sizes=[12, WIDTH - 12])
    elif kind in (AutoEncoderTopK, BatchTopKSAE):
        dictionary = kind(D, WIDTH, K)
    else:
        dictionary = kind(D, WIDTH)
    generator = torch.Generator().manual_seed(seed_of(name))
    for key, tensor in dictionary.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator)
        if key == "threshold":
            tensor.copy_(torch.full_like(tensor, threshold) if tensor.ndim == 0 else 0.1 + 0.1 * drawn.abs())
        elif key in ("encoder.weight", "decoder.weight", "W_enc", "W_dec"):
            tensor.copy_(drawn / D**0.5)
        elif tensor.is_floating_point():
            tensor.copy_(0.3 * drawn - (0.5 if key in ("encoder.bias", "b_enc", "gate_bias") else 0))
    return dictionary


def save(folder: Path, held: Any, config: Any) -> None:
    folder.mkdir(parents=True)
    torch.save(held, folder / "ae.pt")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=4))


def config_of(kind: Any, **changes: Any) -> dict[str, Any]:
    trainer = {
        "trainer_class": TRAINERS[kind],
        "dict_class": kind.__name__,
        "activation_dim": D,
        "dict_size": WIDTH,
        "layer": 3,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "submodule_name": "resid_post_layer_3",
    }
    trainer |= {"k": K} if "TopK" in kind.__name__ else {}
    trainer = {name: value for name, value in (trainer | changes).items() if value is not None}
    return {"trainer": trainer, "buffer": {"d_submodule": D, "io": "out", "ctx_len": 128}}


def case(
    kind: Any,
    variant: str,
    *,
    threshold: float = THRESHOLD,
    config: Any = "whole",
    folder: str = RUN,
    held: Callable[[Any], Any] = lambda dictionary: dictionary.state_dict(),
    saved_by: str = SAVED_BY,
    load: Callable[[Path], Any] | None = None,
    encode: Callable[[Any, Any], Any] = lambda dictionary, x: dictionary.encode(x),
    computed_by: str = "from_pretrained, encode and decode",
    options: dict[str, str] | None = None,
    hookpoint: str | None = "layers.3@out",
    target: str | None = None,
) -> None:
    name = "-".join(["dictionary_learning", kind.__name__, *variant.replace(",", "").split()])
    dictionary = make(kind, name, threshold)
    settings = config_of(kind) if config == "whole" else config
    x = torch.from_numpy(draw_inputs(name, D))

    def write(root: Path) -> str:
        save(root / folder, held(dictionary), settings)
        return folder

    with TemporaryDirectory() as scratch:
        write(Path(scratch))
        loaded = (load or kind.from_pretrained)(Path(scratch) / folder / "ae.pt")
    with torch.no_grad():
        acts = encode(loaded, x)
        out = loaded.decode(acts)
    save_case(
        OUT,
        name,
        write,
        x=x.numpy(),
        acts=acts.numpy(),
        out=out.numpy(),
        format="dictionary_learning",
        publisher="dictionary-learning",
        version=version("dictionary-learning"),
        architecture=kind.__name__,
        variant=variant,
        saved_by=saved_by,
        computed_by=computed_by,
        hookpoint=hookpoint,
        target=target,
        options=options,
    )


for kind in TRAINERS:
    case(kind, "")
case(
    AutoEncoder,
    "not renormalised",
    load=lambda path: AutoEncoder.from_pretrained(path, normalize_decoder=False),
    computed_by="from_pretrained with normalize_decoder=False, encode and decode",
    options={"renormalise": "no"},
)
case(
    AutoEncoderTopK,
    "by threshold",
    encode=lambda dictionary, x: dictionary.encode(x, use_threshold=True),
    computed_by="from_pretrained, encode with use_threshold and decode",
    options={"threshold": str(THRESHOLD)},
)


def fitted(kind: Any) -> Callable[[Path], Any]:
    def load(path: Path) -> Any:
        dictionary = kind.from_pretrained(path)
        dictionary.threshold.fill_(THRESHOLD)
        return dictionary

    return load


for kind in (BatchTopKSAE, MatryoshkaBatchTopKSAE):
    case(
        kind,
        "threshold given",
        threshold=-1.0,
        load=fitted(kind),
        computed_by="from_pretrained, the threshold set, encode and decode",
        options={"threshold": str(THRESHOLD)},
    )

# Fallbacks where the class is not named.
case(GatedAutoEncoder, "without dict_class", config=config_of(GatedAutoEncoder, dict_class=None))
case(BatchTopKSAE, "without dict_class", config=config_of(BatchTopKSAE, dict_class=None))
for kind in (AutoEncoderNew, GatedAutoEncoder, MatryoshkaBatchTopKSAE, JumpReluAutoEncoder):
    case(kind, "without config", config=None)
case(AutoEncoderTopK, "without config, class given", config=None, options={"class": "AutoEncoderTopK"})
case(
    AutoEncoder,
    "first release",
    config=None,
    folder="dictionaries/pythia-70m-deduped/mlp_out_layer4/10_32768",
    hookpoint="layers.4.mlp@out",
)

# A backup holds more than the tensors, and its biases are of inputs that are still divided.
BY_HAND = "by hand: the release on PyPI writes no backups, later ones do"


def unpacked(path: Path, kind: Any, factor: float | None) -> Any:
    dictionary = make(kind, "overwritten")
    dictionary.load_state_dict(torch.load(path)["ae"])
    if factor is not None:
        dictionary.scale_biases(factor)
    return dictionary


def backup(factor: float | None) -> Callable[[Any], Any]:
    more = {} if factor is None else {"norm_factor": factor}
    return lambda dictionary: {"step": 700, "ae": dictionary.state_dict(), "optimizer": {}, "config": {}} | more


case(
    AutoEncoderTopK,
    "backup",
    held=backup(None),
    saved_by=BY_HAND,
    load=lambda path: unpacked(path, AutoEncoderTopK, None),
    computed_by="load_state_dict, encode and decode",
)
for kind in (BatchTopKSAE, GatedAutoEncoder, JumpReluAutoEncoder):
    case(
        kind,
        "backup, norm_factor",
        threshold=0.1,
        held=backup(NORM_FACTOR),
        saved_by=BY_HAND,
        load=lambda path, kind=kind: unpacked(path, kind, NORM_FACTOR),
        computed_by="load_state_dict, scale_biases, encode and decode",
    )
