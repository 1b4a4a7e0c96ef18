"""Makes corpus and model text harmless and readable: in HTML, in JSON inside HTML, and on a terminal.

Everything a reader sees passes through :func:`visible`. Whoever puts the result into HTML still escapes it (jinja2 does, and
:func:`window_html` here).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import orjson
from markupsafe import Markup, escape

LEVELS = 10
"""Steps of the highlight colour."""

# Characters that are invisible or change how others are shown: controls (C0 but whitespace, C1), soft hyphen, bidirectional
# marks and overrides, zero-width characters but the joiners (scripts and emoji need those), fillers, line separators, tags.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)
_MARK = "[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]"
_MARKS = re.compile(f"({_MARK}{{4}}){_MARK}+")
_SPACES = re.compile(r"\n|\r|\t| {2,}")


_SIGNS = str.maketrans({"\n": "\u21b5", "\t": "\u2192", "\r": "\u2190"})


def _named(match: re.Match[str]) -> str:
    return f"\u27e8U+{ord(match.group()):04X}\u27e9"


def visible(text: str) -> str:
    """Return `text` with hidden and direction-changing characters named, and stacks of combining marks cut to four.

    Tab, newline, carriage return and joiners stay.
    """
    if text.isascii() and text.isprintable():  # nearly all text, and ten times faster than looking
        return text
    return _MARKS.sub(r"\1", _HIDDEN.sub(_named, text))


def one_line(text: str, limit: int | None = None) -> str:
    """Return harmless text on one line: newlines, tabs and carriage returns become signs; cut to `limit` characters."""
    if limit is not None and len(text) > limit:
        text = text[: limit - 3].rstrip() + "..."
    return visible(text).translate(_SIGNS)


def json_for_html(value: Any) -> Markup:
    """Return `value` as JSON that cannot end the script element it stands in, whatever text it holds."""
    text = orjson.dumps(value).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # every character that HTML gives a meaning is escaped above


def level_of(activation: float, scale: float) -> int:
    """Return the highlight step of an activation: 0 for silent, else 1..LEVELS in proportion to `scale`."""
    if not activation or not scale > 0:
        return 0
    return max(1, min(LEVELS, round(LEVELS * abs(activation) / scale)))


def window_html(pieces: Sequence[str], activations: Sequence[float], scale: float) -> Markup:
    """Return a window as HTML: active tokens marked by strength, whitespace in elements that the style sheet makes visible.

    An active token without text of its own (part of a character split over tokens) shows as a small ring.
    """
    out: list[str] = []
    silent: list[str] = []
    for piece, activation in zip(pieces, activations, strict=True):
        level = level_of(activation, scale)
        if not level:
            silent.append(piece)
            continue
        # Silent stretches are escaped whole: most of a window is silent, and ten thousand pages hold millions of tokens.
        out.append(_spaced("".join(silent)))
        silent.clear()
        ring = "" if piece else " e"
        out.append(f'<b class="a{level}{ring}" title="{activation:.3g}">{_spaced(piece)}</b>')
    out.append(_spaced("".join(silent)))
    return Markup("".join(out))  # _spaced escapes every piece


def _spaced(piece: str) -> str:
    text = str(escape(visible(piece)))
    return _SPACES.sub(_space_element, text)


def _space_element(match: re.Match[str]) -> str:
    space = match.group()
    kind = {"\n": "n", "\t": "t", "\r": "r"}.get(space, "w")
    # A carriage return in HTML is read as a newline, so the style sheet's sign stands for it alone.
    return f'<s class="{kind}">{"" if kind == "r" else space}</s>'


def window_ansi(pieces: Sequence[str], activations: Sequence[float], scale: float, *, colour: bool) -> str:
    """Return a window on one line for a terminal: active tokens on a background by strength, or within ``<< >>``."""
    out: list[str] = []
    for piece, activation in zip(pieces, activations, strict=True):
        level = level_of(activation, scale)
        text = one_line(piece)
        if not level or not text:
            out.append(text)
        elif colour:
            shade = (230, 229, 228, 221, 220, 215, 214, 209, 208, 202)[level - 1]
            out.append(f"\x1b[48;5;{shade}m\x1b[30m{text}\x1b[0m")
        else:
            out.append(f"<<{text}>>")
    return "".join(out) if colour else "".join(out).replace(">><<", "")
