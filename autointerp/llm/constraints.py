"""Output constraints, looked at from outside the model: does a text obey one, and how is one written for a standard server.

A server may ignore a constraint and answer with status 200, so every constrained reply is checked and violations are counted.
JSON schemas are validated for the keywords listed in `_CHECKS` and `_ANNOTATIONS`; another keyword is refused, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from autointerp.errors import ConfigError
from autointerp.records import Choice, JsonSchema, Regex

Constraint = Choice | Regex | JsonSchema

_WRAPPER = "answer"
_ANNOTATIONS = {"title", "description", "$schema", "default", "examples"}


def conforms(constraint: Constraint | None, text: str) -> bool:
    """Return whether `text` as a whole obeys `constraint`; None is obeyed by every text.

    Raises: ConfigError when the schema has a keyword this module does not check, or the pattern is not a regular expression.
    """
    if constraint is None:
        return True
    if isinstance(constraint, Choice):
        return text in constraint.options
    if isinstance(constraint, Regex):
        try:
            return re.fullmatch(constraint.pattern, text) is not None
        except re.error as error:
            raise ConfigError(f"the constraint {constraint.pattern!r} is not a regular expression: {error}") from None
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return matches(orjson.loads(constraint.schema), value)


def matches(schema: Any, value: Any) -> bool:
    """Return whether a JSON value is valid under `schema`.

    Raises: ConfigError on a keyword outside the supported subset.
    """
    if isinstance(schema, bool):
        return schema
    for key in schema:
        if key not in _CHECKS and key not in _ANNOTATIONS and key != "additionalProperties":
            known = ", ".join(sorted(_CHECKS))
            raise ConfigError(f"the JSON schema keyword {key!r} is not supported in a constraint; known: {known}")
    return all(_CHECKS[key](argument, value, schema) for key, argument in schema.items() if key in _CHECKS)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b) if isinstance(a, bool) or isinstance(b, bool) else bool(a == b)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def _type(names: str | list[str], value: Any, _: Mapping[str, Any]) -> bool:
    return any(_TYPES[name](value) for name in ([names] if isinstance(names, str) else names))


def _properties(properties: Mapping[str, Any], value: Any, schema: Mapping[str, Any]) -> bool:
    if not isinstance(value, dict):
        return True
    rest = schema.get("additionalProperties", True)
    return all(matches(properties[key], item) if key in properties else matches(rest, item) for key, item in value.items())


def _size(kind: type[Any], check: Callable[[int, int], bool]) -> Callable[[int, Any, Mapping[str, Any]], bool]:
    return lambda bound, value, _: not isinstance(value, kind) or check(len(value), bound)


def _bound(check: Callable[[float, float], bool]) -> Callable[[float, Any, Mapping[str, Any]], bool]:
    return lambda bound, value, _: not _TYPES["number"](value) or check(value, bound)


_CHECKS: dict[str, Callable[[Any, Any, Mapping[str, Any]], bool]] = {
    "type": _type,
    "enum": lambda options, value, _: any(_same(option, value) for option in options),
    "const": lambda option, value, _: _same(option, value),
    "anyOf": lambda options, value, _: any(matches(option, value) for option in options),
    "properties": _properties,
    "required": lambda names, value, _: not isinstance(value, dict) or all(name in value for name in names),
    "items": lambda items, value, _: not isinstance(value, list) or all(matches(items, item) for item in value),
    "minItems": _size(list, lambda size, bound: size >= bound),
    "maxItems": _size(list, lambda size, bound: size <= bound),
    "minLength": _size(str, lambda size, bound: size >= bound),
    "maxLength": _size(str, lambda size, bound: size <= bound),
    "pattern": lambda pattern, value, _: not isinstance(value, str) or re.search(pattern, value) is not None,
    "minimum": _bound(lambda value, bound: value >= bound),
    "maximum": _bound(lambda value, bound: value <= bound),
    "exclusiveMinimum": _bound(lambda value, bound: value > bound),
    "exclusiveMaximum": _bound(lambda value, bound: value < bound),
}


@dataclass(frozen=True)
class Wrapped:
    """A constraint as the standard ``response_format`` of a server, whose schemas must be objects."""

    schema: dict[str, Any]
    is_wrapped: bool
    """The answer is the member ``answer`` of the object, not the object."""
    is_text: bool
    """The answer is a string of its own, not JSON."""

    def unwrap(self, text: str) -> str:
        """Return the answer inside a reply, or the reply as it is when it has not the form asked for."""
        if not self.is_wrapped:
            return text
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            return text
        if not isinstance(value, dict) or set(value) != {_WRAPPER}:
            return text
        answer = value[_WRAPPER]
        if self.is_text:
            return answer if isinstance(answer, str) else text
        return orjson.dumps(answer).decode()


def wrap(constraint: Constraint) -> Wrapped:
    """Return `constraint` in the form that ``response_format`` can carry."""
    if isinstance(constraint, JsonSchema):
        schema = orjson.loads(constraint.schema)
        if schema.get("type") == "object":
            return Wrapped(schema, False, False)
        return Wrapped(_object(schema), True, False)
    inner = {"enum": list(constraint.options)} if isinstance(constraint, Choice) else {"pattern": constraint.pattern}
    return Wrapped(_object({"type": "string"} | inner), True, True)


def _object(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {_WRAPPER: schema}, "required": [_WRAPPER], "additionalProperties": False}
