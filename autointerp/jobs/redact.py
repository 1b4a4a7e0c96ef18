"""Keeps API keys out of rows, records of runs and messages."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

_SECRET = re.compile(r"(?<![A-Za-z0-9])(sk-|hf_|Bearer\s+|api[_-]?key[\"']?\s*[=:]\s*[\"']?)[A-Za-z0-9_\-.]{6,}", re.IGNORECASE)
_USERINFO = re.compile(r"(https?://)[^/\s@]+@")
_SECRET_NAME = re.compile(r"key|token|secret|password", re.IGNORECASE)
_MIN_SECRET = 8


def redact(text: str) -> str:
    """Return `text` with whatever is or looks like a key replaced."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _MIN_SECRET and value in text:
            text = text.replace(value, "[redacted]")
    return _USERINFO.sub(r"\1[redacted]@", _SECRET.sub(r"\1[redacted]", text))


def redacted(value: Any) -> Any:
    """Return JSON values with keys replaced in every text."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [redacted(item) for item in value]
    return value
