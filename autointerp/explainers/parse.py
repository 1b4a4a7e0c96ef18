"""Reads the explanation out of a reply: what follows the last marker, on one line. Nothing else ever becomes an explanation."""

from __future__ import annotations

import re
from collections.abc import Collection

from autointerp.errors import ReplyError
from autointerp.examples.render import neutralise
from autointerp.prompts import marker_pattern
from autointerp.records import Reply

_BLANK = re.compile(r"\n\s*\n")
_ECHO_CHARS = 30
_WRAPPERS = ("**", "*", "`", '"')


def read_explanation(reply: Reply, *, marker: str, max_chars: int, not_these: Collection[str] = ()) -> str:
    """Return the explanation in a reply, cleaned to one line.

    The last marker counts, since reasoning may mention it earlier. `not_these` are texts of the prompt itself, which a model
    that echoes it would seem to answer. Raises: ReplyError when there is no marker, nothing after it, or too much.
    """
    if reply.finish != "stop":
        raise ReplyError(f"the reply ended early ({reply.finish}), so what it says is not complete", raw=reply.text)
    text = reply.text
    places = list(marker_pattern(marker).finditer(text))
    if not places:
        raise ReplyError(f"the reply has no line that begins with {marker!r}", raw=text)
    after = _BLANK.split(text[places[-1].end() :].strip(), maxsplit=1)[0]
    explanation = clean(after)
    if not any(char.isalnum() for char in explanation):
        raise ReplyError(f"the reply says nothing after {marker!r}", raw=text)
    if len(explanation) > max_chars:
        raise ReplyError(f"the explanation has {len(explanation)} characters; at most {max_chars} are taken", raw=text)
    if any(_repeats(explanation, clean(other)) for other in not_these):
        raise ReplyError("the reply repeats the prompt", raw=text)
    return explanation


def _repeats(explanation: str, other: str) -> bool:
    if explanation.casefold() == other.casefold():
        return True
    # Not parts of short ones: two words of an explanation may well occur in the prompt.
    return min(len(explanation), len(other)) >= _ECHO_CHARS and (explanation in other or other in explanation)


def clean(text: str) -> str:
    """Return `text` on one line, without control characters, chat tokens and the quotes or markup around the whole of it."""
    text = neutralise(" ".join(text.split()), markers=()).strip()
    for pair in _WRAPPERS:
        inner = text[len(pair) : -len(pair)]
        if len(text) > 2 * len(pair) and text.startswith(pair) and text.endswith(pair) and pair not in inner:
            text = inner.strip()
    return text
