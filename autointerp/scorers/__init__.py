"""Scorers: each grades an explanation of one latent, and returns verdicts and scores."""

from __future__ import annotations

REGISTRY: dict[str, str] = {
    "detection": "autointerp.scorers.detection:Detection",
    "fuzzing": "autointerp.scorers.fuzzing:Fuzzing",
    "simulation": "autointerp.scorers.simulation:Simulation",
    "surprisal": "autointerp.scorers.surprisal:Surprisal",
    "embedding": "autointerp.scorers.embedding:Embedding",
    "intruder": "autointerp.scorers.intruder:Intruder",
    "example_embedding": "autointerp.scorers.example_embedding:ExampleEmbedding",
    "saebench": "autointerp.scorers.saebench:SAEBench",
    "delphi_detection": "autointerp.scorers.delphi:DelphiDetection",
    "delphi_fuzzing": "autointerp.scorers.delphi:DelphiFuzzing",
}
"""Name -> ``module:Class``; a class has a ``Config``, a ``name``, ``needs``, ``headline`` and ``identity()``."""
