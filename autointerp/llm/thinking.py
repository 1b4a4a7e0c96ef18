"""Thinking that a reasoning model writes before its answer: taken off the reply, its tokens counted."""

from __future__ import annotations

import re
from dataclasses import dataclass

_OPEN = re.compile(r"\s*<think(?:ing)?>", re.IGNORECASE)
# A closing tag in quotes is one that the answer talks about.
_CLOSE = re.compile(r"(?<![\"'`])</think(?:ing)?>", re.IGNORECASE)


@dataclass(frozen=True)
class Stripped:
    """A reply without its thinking."""

    text: str
    """The answer; empty when the thinking did not end."""
    num_thinking_chars: int
    """Characters taken off, tags included."""
    is_open: bool
    """The thinking did not end."""


def strip_thinking(text: str) -> Stripped:
    """Take ``<think>...</think>`` blocks off the start of a reply; the first opening tag may lie in the prompt."""
    rest = text
    while True:
        opened = _OPEN.match(rest)
        closed = _CLOSE.search(rest)
        if opened and not closed:
            return Stripped("", len(text), True)
        if closed is None or (not opened and rest is not text):
            break
        rest = rest[closed.end() :]
    if rest is text:
        return Stripped(text, 0, False)
    answer = rest.lstrip()
    return Stripped(answer, len(text) - len(answer), False)


def reasoning_tokens(num_output: int, num_thinking_chars: int, num_chars: int) -> int:
    """Return the share of `num_output` tokens that thinking took, by characters, where a server does not count it."""
    if num_thinking_chars == 0 or num_chars == 0:
        return 0
    return min(num_output, round(num_output * num_thinking_chars / num_chars))
