r"""Windows as text for a prompt: highlighted, plain, or as integers; corpus text can fake and break nothing (invariant 8).

What is changed in corpus text, always by one visible rule:

- delimiters and other markers of a prompt get a space after their first character (``<<`` becomes ``< <``), and so do strings
  that chat tokenizers parse (``<|user|>``, ``</s>``, ``[INST]``) and the special tokens of the subject;
- line breaks and tabs become ``\n``, ``\r`` and ``\t`` in two characters, so that a window is one line and cannot begin
  another item of a list;
- other control characters become the pictures of Unicode block 2400 (escape, NUL) or U+FFFD (C1, lone surrogates, characters
  that reverse the direction of writing).

Integers 0 to 10 and the highlight threshold follow methods of arXiv 2410.13928 as delphi has them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from autointerp.protocols import Vocabulary

LEFT, RIGHT = "<<", ">>"

_LINES = {ord("\r"): "\\r", 0x85: "\n", 0x2028: "\n", 0x2029: "\n"}
_ONE_LINE = {**dict.fromkeys((ord("\n"), *_LINES), "\\n"), ord("\r"): "\\r", ord("\t"): "\\t"}
_CONTROLS: dict[int, str] = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\r\t"}
_CONTROLS |= {0x7F: chr(0x2421)}
_HIDDEN = [
    *range(0x80, 0x85),
    *range(0x86, 0xA0),
    *range(0xD800, 0xE000),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    0xFEFF,
]
_CONTROLS |= {code: chr(0xFFFD) for code in _HIDDEN}

_NAMES = (
    r"s|bos|eos|pad|unk|mask|cls|sep|eod|eot|eom|user|system|assistant|tool|think|thinking|tool_call|tool_response|tools|"
    r"(?:start|end)_of_(?:turn|image)|start_of_role|end_of_role|end_of_text|image|image_soft_token|"
    r"(?:unused|extra_id_|reserved_|special_)\w*"
)
_CHAT_TOKEN = re.compile(
    rf"<(?=[|\uff5c])|<(?=</?SYS>>)|[|\uff5c](?=>)|<(?=/?(?:{_NAMES})>)|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|IMG|"
    r"CLS|SEP|PAD|UNK|MASK|THINK)\])",
    re.IGNORECASE,
)


def neutralise(text: str, *, markers: Sequence[str] = (LEFT, RIGHT), one_line: bool = True) -> str:
    """Return corpus or model text that can stand inside a prompt or on a terminal.

    `markers` are the strings that mean something in that prompt. With `one_line` False line breaks and tabs stay as they are.
    """
    text = text.translate(_CONTROLS)
    text = text.translate(_ONE_LINE if one_line else _LINES)
    text = _CHAT_TOKEN.sub(r"\g<0> ", text)
    for marker in markers:
        first, rest = re.escape(marker[0]), re.escape(marker[1:])
        text = re.sub(f"{first}(?={rest})", lambda found: found[0] + " ", text) if rest else text.replace(marker, " ")
    return text


def plain(vocabulary: Vocabulary, tokens: np.ndarray, *, markers: Sequence[str] = (LEFT, RIGHT), one_line: bool = True) -> str:
    """Return the neutralised text of one window (`tokens` without padding)."""
    return neutralise("".join(_pieces(vocabulary, tokens)), markers=markers, one_line=one_line)


def highlight(
    vocabulary: Vocabulary,
    tokens: np.ndarray,
    mask: np.ndarray,
    *,
    left: str = LEFT,
    right: str = RIGHT,
    markers: Sequence[str] = (),
    one_line: bool = True,
) -> str:
    """Return the text of one window with every maximal run of masked tokens between `left` and `right`.

    A character split over tokens stays whole: a run that holds part of it holds all of it. `left` and `right` occur in the
    result only where a run begins or ends; where the text beside one would make it ambiguous there is a space between.
    """
    pieces = _pieces(vocabulary, tokens)
    marked = whole_characters(pieces, np.asarray(mask, bool))
    runs: list[tuple[bool, str]] = []
    for piece, is_marked in zip(pieces, marked, strict=True):
        if runs and runs[-1][0] == is_marked:
            runs[-1] = (is_marked, runs[-1][1] + piece)
        else:
            runs.append((bool(is_marked), piece))
    forbidden = (left, right, *markers)
    clean = [(is_marked, neutralise(run, markers=forbidden, one_line=one_line)) for is_marked, run in runs if run]
    text = "".join(f"{left}{run}{right}" if is_marked else run for is_marked, run in clean)
    if not _is_ambiguous(text, sum(is_marked for is_marked, _ in clean), left=left, right=right, markers=markers):
        return text
    return " ".join(f"{left} {run} {right}" if is_marked else run for is_marked, run in clean)


def whole_characters(pieces: Sequence[str], mask: np.ndarray) -> np.ndarray:
    """Return the bool mask grown so that no character is cut: a marked token without text of its own marks the next one too.

    `pieces` as of :meth:`Vocabulary.pieces`: a split character belongs to its last token. At the end of a window, where that
    token is missing, nothing grows.
    """
    grown = mask.copy()
    for i in range(len(pieces) - 1):
        if grown[i] and not pieces[i]:
            grown[i + 1] = True
    # The other way round: the earlier parts of a marked character, which are empty, lie in the same run.
    for i in range(len(pieces) - 1, 0, -1):
        if grown[i] and not pieces[i - 1]:
            grown[i - 1] = True
    return grown


def integers(activations: np.ndarray, maximum: float) -> np.ndarray:
    """Return ``clip(ceil(10 |a| / maximum), 0, 10)`` as int64, same shape; an active token is never 0. All 0 if maximum is."""
    if maximum <= 0:
        return np.zeros(np.shape(activations), np.int64)
    return np.asarray(np.clip(np.ceil(10 * np.abs(activations) / maximum), 0, 10), np.int64)


def above(activations: np.ndarray, lengths: np.ndarray, *, ratio: float = 0.3) -> np.ndarray:
    """Return bool [E, W]: tokens with |activation| above `ratio` of their window's largest, and always the (first) largest.

    Nothing is marked in a silent window nor beyond a window's length.
    """
    size = np.where(np.arange(activations.shape[1]) < np.asarray(lengths)[:, None], np.abs(activations), 0)
    largest = size.max(axis=1, initial=0)
    mask = size > ratio * largest[:, None]
    rows = np.flatnonzero(largest > 0)
    if len(rows):
        mask[rows, size[rows].argmax(axis=1)] = True
    return np.asarray(mask)


def _pieces(vocabulary: Vocabulary, tokens: np.ndarray) -> list[str]:
    special = vocabulary.is_special(tokens)
    pieces = vocabulary.pieces(tokens)
    return [f"{p[0]} {p[1:]}" if is_special and len(p) > 1 else p for p, is_special in zip(pieces, special, strict=True)]


def _count(text: str, delimiter: str) -> int:
    """Return how often a delimiter occurs, overlaps included."""
    return len(re.findall(f"(?={re.escape(delimiter)})", text))


def _is_ambiguous(text: str, num_runs: int, *, left: str, right: str, markers: Sequence[str]) -> bool:
    """Return whether delimiters and the text beside them make up something else: ``<`` + ``<<``, or ``<s>`` in ``<<s>>``."""
    expected = 2 * num_runs if left == right else num_runs
    if _count(text, left) != expected or _count(text, right) != expected:
        return True
    if any(marker in text for marker in markers if marker not in (left, right)):
        return True
    return len(_CHAT_TOKEN.findall(text)) > num_runs * len(_CHAT_TOKEN.findall(f"{left} {right}"))
