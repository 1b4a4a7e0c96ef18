"""Reads the replies of judges, strictly: what is not exactly in the form that was asked for is no answer."""

from __future__ import annotations

import re
from typing import Any

import orjson

from autointerp.errors import ReplyError

_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
_NUMBER = re.compile(r"\d{1,3}")
_COMMA = r"\s*,\s*(?:and\s+)?|\s+and\s+"
_NUMBERS = re.compile(rf"\d{{1,3}}(?:(?:{_COMMA})\d{{1,3}})*")


def bare(text: str) -> str:
    """Return a reply without space and without the code fence around it."""
    stripped = text.strip()
    fenced = _FENCE.fullmatch(stripped)
    return fenced[1] if fenced else stripped


def read_integers(text: str, count: int, *, low: int, high: int) -> list[int]:
    """Return a JSON array of exactly `count` integers from `low` to `high`, and nothing else; a code fence is allowed.

    Raises: ReplyError for anything else.
    """
    stripped = bare(text)
    try:
        value: Any = orjson.loads(stripped)
    except orjson.JSONDecodeError:
        raise ReplyError(f"the reply is not a JSON array: {stripped[:80]!r}", raw=text) from None
    if not isinstance(value, list) or len(value) != count:
        found = f"{len(value)} answers" if isinstance(value, list) else type(value).__name__
        raise ReplyError(f"the reply has {found}; an array of {count} was asked for", raw=text)
    if not all(_is_integer(item) for item in value):
        raise ReplyError(f"the reply has answers that are no integers: {stripped[:80]!r}", raw=text)
    if any(not low <= item <= high for item in value):
        raise ReplyError(f"the reply has answers outside {low} to {high}: {stripped[:80]!r}", raw=text)
    return [int(item) for item in value]


def _is_integer(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


def read_list(text: str, count: int) -> list[bool]:
    """Return the answers of a reply that is a JSON array of exactly `count` zeros and ones, and nothing else.

    Raises: ReplyError for anything else.
    """
    return [item == 1 for item in read_integers(text, count, low=0, high=1)]


def read_number(text: str, count: int) -> int:
    """Return the number from 1 to `count` that is all of a reply, a full stop apart.

    Raises: ReplyError for anything else.
    """
    stripped = bare(text).removesuffix(".")
    if not _NUMBER.fullmatch(stripped) or not 1 <= int(stripped) <= count:
        raise ReplyError(f"the reply is not a number from 1 to {count}: {stripped[:80]!r}", raw=text)
    return int(stripped)


def read_numbers(text: str, count: int) -> set[int]:
    """Return the numbers from 1 to `count` of a reply that lists them, parted by commas, or says ``none``.

    Raises: ReplyError for anything else, a number named twice included.
    """
    stripped = bare(text).removesuffix(".")
    if stripped.lower() == "none":
        return set()
    if not _NUMBERS.fullmatch(stripped):
        raise ReplyError(f"the reply is not a list of numbers: {stripped[:80]!r}", raw=text)
    numbers = [int(number) for number in re.split(_COMMA, stripped)]
    if len(set(numbers)) < len(numbers) or not all(1 <= number <= count for number in numbers):
        raise ReplyError(f"the reply names numbers twice or outside 1 to {count}: {stripped[:80]!r}", raw=text)
    return set(numbers)
