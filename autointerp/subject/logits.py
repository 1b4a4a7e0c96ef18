"""Which tokens a direction promotes: VocabProj, the final norm applied to a decoder row and then the unembedding.

Method of arXiv 2501.08319 (section 3): ``logits = W_U . LN_f(W_dec[j])``. What a coder writes into a place that the model
normalises before it adds it to the residual stream (the output of an MLP or attention of Gemma 2 and 3, of an MLP of OLMo 2)
goes through that norm first.
"""

# Shapes: L latents, B latents of a block, D width of the residual stream, V vocabulary, K tokens kept.

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autointerp.errors import InputError
from autointerp.store.logits import NUM_TOKENS, TokenLogits
from autointerp.subject.hooks import split
from autointerp.subject.model import Subject

_BLOCK_BYTES = 64 << 20
_VOCABULARY_ROWS = 1 << 14
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")
_MLP_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")
_ATTENTION_NORM = "post_attention_layernorm"


@torch.no_grad()
def token_logits(
    subject: Subject, rows_LD: Tensor, *, written_to: str, is_token: np.ndarray, num_tokens: int = NUM_TOKENS
) -> Iterator[TokenLogits]:
    """Yield the tokens that each row promotes and suppresses, in blocks of latents.

    `written_to` is the hookpoint the rows are written to; `is_token` bool [V'] says which ids mean something (a model may have
    more rows of unembedding than its tokenizer has tokens).

    Raises: InputError when the rows do not fit the residual stream, or the model has no unembedding or no final norm we know.
    """
    unembedding, norms = _unembedding(subject), [*_norm_after(subject.model, written_to), _final_norm(subject)]
    if rows_LD.shape[1] != unembedding.weight.shape[1]:
        raise InputError(
            f"the decoder writes vectors of width {rows_LD.shape[1]} to {written_to} and the residual stream of {subject.name} "
            f"has width {unembedding.weight.shape[1]}; only what is written there has logits"
        )
    norms = [copy.deepcopy(norm).float() for norm in norms]
    weight_VD, device = unembedding.weight, unembedding.weight.device
    usable = torch.zeros(len(weight_VD), dtype=torch.bool)
    known = torch.from_numpy(np.ascontiguousarray(is_token[: len(weight_VD)]))
    usable[: len(known)] = known
    unusable = (~usable).to(device)
    kept = min(num_tokens, int(usable.sum()))
    step = max(1, _BLOCK_BYTES // (4 * len(weight_VD)))
    for first in range(0, len(rows_LD), step):
        direction_BD = rows_LD[first : first + step].to(device, torch.float32)
        for norm in norms:
            direction_BD = norm(direction_BD)
        logits_BV = torch.empty(len(direction_BD), len(weight_VD), device=device)
        for low in range(0, len(weight_VD), _VOCABULARY_ROWS):
            part = slice(low, low + _VOCABULARY_ROWS)
            logits_BV[:, part] = direction_BD @ weight_VD[part].float().T
        logits_BV -= logits_BV[:, ~unusable].mean(dim=1, keepdim=True)
        promoted = logits_BV.masked_fill(unusable, -torch.inf).topk(kept)
        suppressed = logits_BV.masked_fill(unusable, torch.inf).topk(kept, largest=False)
        yield TokenLogits(
            promoted=promoted.indices.cpu().numpy().astype(np.uint32),
            promoted_logits=promoted.values.cpu().numpy(),
            suppressed=suppressed.indices.cpu().numpy().astype(np.uint32),
            suppressed_logits=suppressed.values.cpu().numpy(),
        )


def _unembedding(subject: Subject) -> Any:
    model: Any = subject.model
    unembedding = model.get_output_embeddings()
    if unembedding is None:
        raise InputError(f"subject {subject.name} has no unembedding; logits need a causal language model")
    return unembedding


def _final_norm(subject: Subject) -> nn.Module:
    """Return the norm before the unembedding: a child of the module that holds the blocks."""
    model: Any = subject.model
    blocks = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len, default=None)
    for name, module in model.named_modules():
        if module is blocks:
            parent = model.get_submodule(name.rpartition(".")[0])
            for child in _FINAL_NORMS:
                norm = getattr(parent, child, None)
                if isinstance(norm, nn.Module):
                    return norm
    raise InputError(f"subject {subject.name} has no final norm under a name we know ({', '.join(_FINAL_NORMS)})")


def _norm_after(model: nn.Module, hookpoint: str) -> list[nn.Module]:
    """Return the norm that what is written to `hookpoint` goes through before it is added to the residual stream, if any."""
    path, side = split(hookpoint)
    parent, _, name = path.rpartition(".")
    if side != "out" or not parent:
        return []
    block = model.get_submodule(parent)
    if name == "mlp":
        return [norm for child in _MLP_NORMS if isinstance(norm := getattr(block, child, None), nn.Module)]
    # Most models call the norm before the MLP by this name; where the MLP has its own on both sides it is the attention's.
    is_after = name in ("self_attn", "attention") and any(hasattr(block, child) for child in _MLP_NORMS)
    return [block.get_submodule(_ATTENTION_NORM)] if is_after and hasattr(block, _ATTENTION_NORM) else []
