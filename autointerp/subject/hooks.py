"""Reading a model at hookpoints: one forward pass for all of them, stopped right after the deepest one fired.

Owns the hooks and nothing else; which hookpoints exist and what their names mean is `subject.model`'s.
"""

# Shapes: B contexts, T tokens, D width.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from autointerp.errors import InputError


class _Stop(BaseException):
    """Leaves the forward pass once everything wanted was seen; no model's own `except Exception` may catch it."""


def split(hookpoint: str) -> tuple[str, str]:
    """Return (module path, ``in`` or ``out``) of a full hookpoint name."""
    module, _, side = hookpoint.rpartition("@")
    return module, side


@torch.inference_mode()
def read_hookpoints(
    model: nn.Module, tokens_BT: Tensor, hookpoints: Sequence[str], *, whole: bool = False
) -> dict[str, Tensor]:
    """Return float [B, T, D] for each hookpoint, in the model's own type and on the device it was computed on.

    The forward pass ends after the last wanted hookpoint; `whole` runs it to the end and leaves out what did not fire or is no
    such tensor.

    Raises: InputError when a hookpoint does not fire, or does not carry one vector per token.
    """
    seen: dict[str, Tensor] = {}
    wanted = set(hookpoints)

    def keep(hookpoint: str, value: Any) -> None:
        if hookpoint not in seen:
            tensor = _per_token(value, tokens_BT.shape)
            if tensor is not None:
                seen[hookpoint] = tensor
            elif not whole:
                raise InputError(
                    f"hookpoint {hookpoint} carries {_describe(value)}; expected one vector of floats for each of the "
                    f"{tuple(tokens_BT.shape)} tokens"
                )
        if not whole and wanted <= seen.keys():
            raise _Stop

    handles = [_register(model, hookpoint, keep) for hookpoint in hookpoints]
    try:
        model(input_ids=tokens_BT, use_cache=False, **_without_mask(model, tokens_BT))
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    missing = sorted(wanted - seen.keys())
    if missing and not whole:
        raise InputError(
            f"hookpoint {missing[0]} did not fire in a forward pass; this model does not run that module for plain text"
        )
    return seen


def _without_mask(model: nn.Module, tokens_BT: Tensor) -> dict[str, Tensor]:
    """Return what makes attention plainly causal.

    transformers 4 takes tokens that come without a mask for sequences packed into one, and gives attention a mask of (B, T, T)
    to keep them apart, which rules out the fast kernels; unless it is told that nothing is padding.
    """
    if int(transformers.__version__.partition(".")[0]) > 4 or "attention_mask" not in signature(model.forward).parameters:
        return {}
    return {"attention_mask": torch.ones_like(tokens_BT)}


def _register(model: nn.Module, hookpoint: str, keep: Callable[[str, Any], None]) -> Any:
    path, side = split(hookpoint)
    module = model.get_submodule(path)
    if side == "in":

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            keep(hookpoint, _first_input(args, kwargs))

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        keep(hookpoint, output)

    return module.register_forward_hook(after)


def _first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if args:
        return args[0]
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"]
    return next((value for value in kwargs.values() if isinstance(value, Tensor) and value.is_floating_point()), None)


def _per_token(value: Any, shape: Sequence[int]) -> Tensor | None:
    while isinstance(value, tuple | list) and value:
        value = value[0]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    num_seqs, num_tokens = shape
    if value.ndim == 3 and tuple(value.shape[:2]) == (num_seqs, num_tokens):
        return value
    if value.ndim == 2 and value.shape[0] == num_seqs * num_tokens:  # mixtures of experts flatten the batch
        return value.view(num_seqs, num_tokens, -1)
    return None


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"
    return f"a {type(value).__name__}"
