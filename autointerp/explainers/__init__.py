"""Explainers: each writes explanations of one latent from its explain pool."""

from __future__ import annotations

REGISTRY: dict[str, str] = {
    "activations_logits": "autointerp.explainers.activations_logits:ActivationsLogits",
    "best_of": "autointerp.explainers.best_of:BestOf",
    "contrastive": "autointerp.explainers.contrastive:Contrastive",
    "default": "autointerp.explainers.default:Default",
    "lexical": "autointerp.explainers.lexical:Lexical",
    "lookup": "autointerp.explainers.lookup:Lookup",
    "refine": "autointerp.explainers.refine:Refine",
    "single_token": "autointerp.explainers.single_token:SingleToken",
}
"""Name -> ``module:Class``; a class has a ``Config``, a ``name``, ``needs`` and ``identity()``, and an `argument` where
``name:NUMBER`` sets an option."""
