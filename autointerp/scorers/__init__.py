"""Scorers: each grades an explanation of one latent, and returns verdicts and scores."""

from __future__ import annotations

REGISTRY: dict[str, str] = {
    "detection": "autointerp.scorers.detection:Detection",
    "fuzzing": "autointerp.scorers.fuzzing:Fuzzing",
}
"""Name -> ``module:Class``; a class has a ``Config``, a ``name``, ``needs``, ``headline`` and ``identity()``."""
