"""Explainers: each writes explanations of one latent from its explain pool."""

from __future__ import annotations

REGISTRY: dict[str, str] = {
    "contrastive": "autointerp.explainers.contrastive:Contrastive",
    "default": "autointerp.explainers.default:Default",
    "lexical": "autointerp.explainers.lexical:Lexical",
    "lookup": "autointerp.explainers.lookup:Lookup",
    "single_token": "autointerp.explainers.single_token:SingleToken",
}
"""Name -> ``module:Class``; a class has a ``Config``, a ``name``, ``needs`` and ``identity()``."""
