"""As much text as a benchmark wants: the standard library's source, then the same source with other identifiers."""

from __future__ import annotations

import builtins
import json
import keyword
import random
import re
from collections.abc import Iterator
from pathlib import Path

from autointerp.subject.stdlib import stdlib_files, stdlib_root

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FIXED = frozenset(keyword.kwlist) | frozenset(keyword.softkwlist) | frozenset(dir(builtins))


def texts() -> Iterator[tuple[str, str]]:
    """Yield (name, text) without end: each file of the library as it is; then, pass by pass, with its identifiers permuted.

    In pass n the names in a file, keywords and builtins apart, are permuted among themselves by (n, file), so that every
    pass has other sequences of tokens and about the same frequencies.
    """
    root, number = stdlib_root(), 0
    while True:
        for path in stdlib_files():
            name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8", errors="replace")
            yield (name, text) if number == 0 else (f"{name}#{number}", _permuted(text, f"{number}:{name}"))
        number += 1


def _permuted(text: str, seed: str) -> str:
    names = sorted(set(_NAME.findall(text)) - _FIXED)
    others = names.copy()
    random.Random(seed).shuffle(others)
    renamed = dict(zip(names, others, strict=True))
    return _NAME.sub(lambda match: renamed.get(match[0], match[0]), text)


def write_corpus(path: Path, *, num_chars: int) -> int:
    """Stream texts of at least `num_chars` characters to a JSON lines file; return how many documents they are."""
    documents = written = 0
    with path.open("w", encoding="utf-8") as file:
        for name, text in texts():
            file.write(json.dumps({"text": text, "path": name}) + "\n")
            documents, written = documents + 1, written + len(text)
            if written >= num_chars:
                return documents
    raise AssertionError("texts have no end")
