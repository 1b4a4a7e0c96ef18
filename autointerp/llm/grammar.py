"""Output constraints, looked at from inside the model: which texts may a constrained reply begin with.

Every constraint becomes a regular expression, matched in part. JSON schemas: the subset whose values a regular expression can
describe (fixed objects, arrays, enumerations, strings, numbers without bounds, integers in a small range).
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import orjson

from autointerp.errors import Permanent
from autointerp.llm.constraints import Constraint
from autointerp.records import Choice, JsonSchema, Regex

_MAX_RANGE = 1024
_STRING = r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})'
_INTEGER = r"-?(?:0|[1-9][0-9]*)"


class Grammar:
    """Says of a text whether a reply may begin with it, and whether it is complete."""

    def __init__(self, constraint: Constraint) -> None:
        # transformers depends on this package; unlike `re` it can match in part.
        self._pattern: Any = import_module("regex").compile(to_regex(constraint))

    def may_begin(self, text: str) -> bool:
        """Return whether some complete reply starts with `text`."""
        return self._pattern.fullmatch(text, partial=True) is not None

    def is_complete(self, text: str) -> bool:
        """Return whether `text` obeys the constraint."""
        return self._pattern.fullmatch(text) is not None


def to_regex(constraint: Constraint) -> str:
    """Return a pattern for exactly the texts that obey `constraint` (of JSON: in its usual compact or spaced form).

    Raises: Permanent when the schema needs more than a regular expression.
    """
    if isinstance(constraint, Choice):
        return _either(re.escape(option) for option in constraint.options)
    if isinstance(constraint, Regex):
        return constraint.pattern
    return _of_schema(orjson.loads(constraint.schema))


def structured_outputs(constraint: Constraint) -> dict[str, Any]:
    """Return vLLM's parameters for `constraint`.

    A schema goes as a pattern where it can: vLLM's JSON grammar allows whitespace without end, and a weak model then writes
    nothing else until it runs out of tokens.
    """
    if isinstance(constraint, Choice):
        return {"choice": list(constraint.options)}
    try:
        return {"regex": to_regex(constraint)}
    except Permanent:
        assert isinstance(constraint, JsonSchema)
        return {"json": orjson.loads(constraint.schema)}


def _either(patterns: Any) -> str:
    return "(?:" + "|".join(patterns) + ")"


def _json(value: Any) -> str:
    return re.escape(orjson.dumps(value).decode())


def _of_schema(schema: Any) -> str:
    if not isinstance(schema, dict):
        raise _unsupported(str(schema))
    if "const" in schema:
        return _json(schema["const"])
    if "enum" in schema:
        return _either(_json(value) for value in schema["enum"])
    if "anyOf" in schema:
        return _either(_of_schema(option) for option in schema["anyOf"])
    kind = schema.get("type")
    if kind == "boolean":
        return "(?:true|false)"
    if kind == "null":
        return "null"
    if kind == "integer":
        return _integer(schema)
    if kind == "number" and not schema.keys() & {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}:
        return _INTEGER + r"(?:\.[0-9]+)?"
    if kind == "string":
        if "pattern" in schema:
            return '"' + str(schema["pattern"]).removeprefix("^").removesuffix("$") + '"'
        return '"' + _STRING + f"{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}" + '"'
    if kind == "array":
        return _array(schema)
    if kind == "object":
        return _object(schema)
    raise _unsupported(f"type {kind!r}")


def _integer(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is None and high is None:
        return _INTEGER
    if low == 0 and high is None:
        return _INTEGER.removeprefix("-?")
    if low is None or high is None or high - low > _MAX_RANGE:
        raise _unsupported("integers with these bounds")
    return _either(str(value) for value in range(low, high + 1))


def _array(schema: dict[str, Any]) -> str:
    item = _of_schema(schema.get("items"))
    low, high = schema.get("minItems", 0), schema.get("maxItems")
    if high == 0:
        return r"\[\]"
    more = f"(?:, ?{item}){{{max(0, low - 1)},{'' if high is None else high - 1}}}"
    body = item + more
    return r"\[" + (f"(?:{body})?" if low == 0 else body) + r"\]"


def _object(schema: dict[str, Any]) -> str:
    members = [f"{_json(name)}: ?{_of_schema(inner)}" for name, inner in schema.get("properties", {}).items()]
    return r"\{" + ", ?".join(members) + r"\}"


def _unsupported(what: str) -> Permanent:
    return Permanent(
        f"an hf: engine cannot hold a reply to this JSON schema ({what}); use a server, or a method that parses free text"
    )
