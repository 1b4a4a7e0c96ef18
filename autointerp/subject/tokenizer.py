"""A subject's tokenizer alone, for work that needs the tokens of a corpus and no forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from autointerp.errors import InputError


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None) -> Any:
    """Return the tokenizer in a folder or on the hub.

    Raises: InputError when there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(str(name_or_path), revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer can be read from {name_or_path}: {error}") from error
