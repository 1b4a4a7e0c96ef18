"""The base of every configuration: frozen, keyword-only, unknown keys refused with the nearest name.

Each part declares its own ``Config`` beside what it configures; this module owns reading TOML, ``--set`` and error texts.
Every field is part of a result's identity unless it is marked with :data:`RUNTIME`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from autointerp.errors import ConfigError, nearest

RUNTIME: dict[str, Any] = {"runtime": True}
"""``Field(json_schema_extra=RUNTIME)``: the field changes how work is done and never what comes out."""


class Config(BaseModel):
    """Base class of configurations."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str = "the configuration") -> Self:
        """Validate `values`.

        Raises: ConfigError naming the first wrong key, what was found and what was expected.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(_sentence(cls, error, where)) from None

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide what comes out, as JSON values."""
        fields = type(self).model_fields
        values = self.model_dump(mode="json")
        return {name: value for name, value in values.items() if not _is_runtime(fields[name].json_schema_extra)}


def _is_runtime(extra: Any) -> bool:
    return isinstance(extra, Mapping) and bool(extra.get("runtime"))


def _sentence(cls: type[BaseModel], error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        model: Any = cls
        for part in first["loc"][:-1]:
            field = model.model_fields.get(part) if isinstance(part, str) else None
            model = field.annotation if field is not None and hasattr(field.annotation, "model_fields") else None
            if model is None:
                break
        known = model.model_fields if model is not None else cls.model_fields
        return f"{where} has an unknown key {key!r}; {nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"{where} lacks the key {key!r}"
    return f"{where}: {key} = {first.get('input')!r} cannot be used: {first['msg']}"


def build_method(kind: str, name: str, registry: Mapping[str, str], options: Mapping[str, Any]) -> Any:
    """Return the explainer or scorer `name` of a registry, or ``module:Class``, with `options`.

    ``name:NUMBER`` sets the option that the class calls its `argument`, such as ``best_of:8``.

    Raises: ConfigError when there is none, or an option is unknown.
    """
    short, _, argument = name.partition(":")
    has_number = argument.isdecimal()
    target = registry.get(short if has_number else name, name)
    module, colon, attribute = target.partition(":")
    if not colon or attribute.isdecimal():
        raise ConfigError(f"there is no {kind} {name!r}; {nearest(name, registry)} (or module:Class of your own)")
    try:
        found = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        raise ConfigError(f"the {kind} {name!r} cannot be loaded: there is no module {module!r}") from None
    except AttributeError:
        raise ConfigError(f"the {kind} {name!r} cannot be loaded: {module} has no {attribute!r}") from None
    if has_number:
        key = getattr(found, "argument", None)
        if key is None:
            raise ConfigError(f"the {kind} {short!r} takes no number, {name!r} given; write {short!r}")
        if options.get(key, int(argument)) != int(argument):
            raise ConfigError(f"the {kind} {name!r} and its option {key} = {options[key]!r} contradict each other; give one")
        options = {**options, key: int(argument)}
    config_class = getattr(found, "Config", None)
    if config_class is not None:
        return found(config_class.parse(options, where=f"the options of {kind} {name!r}"))
    if options:
        raise ConfigError(f"the {kind} {name!r} takes no options, {', '.join(sorted(options))} given")
    return found()


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises: ConfigError when it is missing or not TOML.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def apply_settings(values: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return `values` with each ``section.key=value`` of `settings` applied; a value is TOML, or text when it is not.

    Raises: ConfigError when a setting has no ``=``.
    """
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: expected SECTION.KEY=VALUE")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *sections, key = path.strip().split(".")
        target = result
        for section in sections:
            child = target.get(section)
            target[section] = dict(child) if isinstance(child, dict) else {}
            target = target[section]
        target[key] = value
    return result
