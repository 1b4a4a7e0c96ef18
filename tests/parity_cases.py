"""The parity cases in tests/data/parity: what a publisher's package makes of a small coder, and how far ours is from it.

tests/parity/README.md says what is in them. ``AUTOINTERP_PARITY`` names another folder with cases, such as one just made afresh.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import torch
from safetensors.torch import load_file
from torch import Tensor

from autointerp.coders.activations import MatchingPursuit
from autointerp.coders.coder import Coder
from autointerp.coders.inputs import UnitNorm
from autointerp.coders.load import load_coder

FOLDER = Path(os.environ.get("AUTOINTERP_PARITY", Path(__file__).parent / "data" / "parity"))
TOLERANCE = 1e-5
"""Of the largest value of the same token."""
TIE = 1e-6
"""Two activations of a token that are this close, likewise, may change places at the edge of the k largest."""


@dataclass(frozen=True)
class Case:
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "manifest.json").read_text())

    @cached_property
    def golden(self) -> dict[str, Tensor]:
        return load_file(self.folder / "golden.safetensors")

    @property
    def num_tokens(self) -> int:
        return len(self.golden["x"])

    @property
    def l0(self) -> float:
        return len(self.golden["rows"]) / self.num_tokens

    def load(self) -> Coder:
        options = urlencode(self.manifest["options"])
        return load_coder(f"{self.folder / self.manifest['path']}{'?' if options else ''}{options}")


@dataclass
class Result:
    """How far a coder is from its publisher's: errors relative to the largest value of the same token."""

    wrong: list[str] = field(default_factory=list)
    num_ties: int = 0
    acts_error: float = 0.0
    out_error: float = 0.0


def cases() -> list[Case]:
    return [Case(path.parent) for path in sorted(FOLDER.glob("*/manifest.json"))]


def compare(coder: Coder, case: Case) -> Result:
    """Return the result for a coder; `wrong` says in words what differs, nothing where all is equal."""
    golden, result = case.golden, Result()
    for name in ("hookpoint", "target", "is_transcoder"):
        if getattr(coder.spec, name) != case.manifest[name]:
            result.wrong.append(f"{name} is {getattr(coder.spec, name)}, published as {case.manifest[name]}")
    shape = (case.num_tokens, coder.spec.width)
    theirs = torch.zeros(shape)
    theirs[golden["rows"].long(), golden["latents"].long()] = golden["values"]
    acts = coder.encode(golden["x"])
    ours = torch.zeros(shape)
    ours[acts.rows, acts.latents] = acts.values
    largest = theirs.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    differing = (ours != 0) != (theirs != 0)
    for row in differing.any(dim=1).nonzero()[:, 0].tolist():
        mine, other = (dense[row][differing[row] & (dense[row] != 0)].sort().values for dense in (ours, theirs))
        if len(mine) == len(other) and bool(((mine - other).abs() <= TIE * largest[row]).all()):
            result.num_ties += len(mine)
            ours[row][differing[row]] = theirs[row][differing[row]]
        else:
            result.wrong.append(f"token {row} has {len(mine)} active latents that it should not have, and lacks {len(other)}")
    result.acts_error = float(((ours - theirs).abs() / largest).max())
    out = coder.decode(acts, golden["x"])
    result.out_error = float(((out - golden["out"]).abs() / golden["out"].abs().amax(dim=1, keepdim=True)).max())
    # Written so that NaN is wrong.
    if not result.acts_error <= TOLERANCE:
        result.wrong.append(f"activations differ by {result.acts_error:.1e}")
    if not result.out_error <= TOLERANCE:
        result.wrong.append(f"reconstructions differ by {result.out_error:.1e}")
    return result


def is_equal(coder: Coder, case: Case) -> bool:
    """Return whether the coder gives what was published; one that cannot even be run does not."""
    try:
        return not compare(coder, case).wrong
    except RuntimeError:
        return False


def mutations(coder: Coder) -> dict[str, Coder]:
    """Return the coder as one wrong decision each in reading it would have it."""
    spec = coder.spec
    mutated = {"decoder transposed": replace(coder, decoder_LE=_other_order(coder.decoder_LE))}
    if not isinstance(coder.activation, MatchingPursuit):
        mutated["encoder transposed"] = replace(coder, encoder_LD=_other_order(coder.encoder_LD))
    if coder.skip_ED is not None:
        mutated["skip transposed"] = replace(coder, skip_ED=_other_order(coder.skip_ED))
        mutated["skip dropped"] = replace(coder, skip_ED=None)
    if bool(coder.decoder_bias_E.any()):
        mutated["bias"] = replace(coder, subtract_decoder_bias=not coder.subtract_decoder_bias)
    for index, rule in enumerate(coder.inputs):
        mutated[f"{rule.name} dropped"] = replace(coder, inputs=coder.inputs[:index] + coder.inputs[index + 1 :])
    if not coder.inputs:
        mutated["unit_norm added"] = replace(coder, inputs=(UnitNorm(),))
    mutated["kind"] = replace(coder, spec=replace(spec, is_transcoder=not spec.is_transcoder))
    for name in ("hookpoint", "target"):
        for one, other in (("@in", "@out"), ("@out", "@in"), (".input", ".output"), (".output", ".input")):
            hook = getattr(spec, name)
            if hook is not None and hook.endswith(one):
                moved = replace(spec, **{name: hook.removesuffix(one) + other})
                mutated[f"side of the {name}"] = replace(coder, spec=moved)
    return mutated


def _other_order(matrix: Tensor) -> Tensor:
    """Return the matrix that the same numbers in memory are when rows are taken for columns."""
    return matrix.T.contiguous().view(matrix.shape)
