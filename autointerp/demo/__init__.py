"""The bundled demo: a small language model and three sparse coders trained on Python's standard library.

``autointerp demo`` runs the whole pipeline on them, without a network, a GPU or an LLM. `train.py` made the weights; NOTICE
says on what.
"""

from __future__ import annotations

from pathlib import Path

from autointerp.errors import InputError, nearest

ASSETS = Path(__file__).parent / "assets"
NAMES = ("model", "sae", "sae-seed2", "skip-transcoder")


def bundled(name: str) -> Path:
    """Return the folder of a bundled part: ``model``, ``sae``, ``sae-seed2`` or ``skip-transcoder``.

    Raises: InputError when there is no such part.
    """
    if name not in NAMES:
        raise InputError(f"nothing bundled is called {name!r}; {nearest(name, NAMES)}")
    return ASSETS / name
