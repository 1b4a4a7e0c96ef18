"""Latents planted by known rules, with explanations of every quality written by hand (``planted.toml``).

What a latent fires on is its rule and nothing else, so a score of its true explanation has a known answer, and of two
explanations it is known which is better. :class:`PlantedExplanations` lets them enter a results folder as imported ones do.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pydantic import Field

from autointerp.config import RUNTIME, Config
from autointerp.digest import digest
from autointerp.errors import ConfigError, InputError, nearest
from autointerp.protocols import Needs, Resources, Vocabulary
from autointerp.records import Explanation, LatentExamples, Request
from autointerp.rules import Clause, Condition, Rule
from autointerp.store import read_manifest

Role = Literal["true", "paraphrase", "too_broad", "too_narrow", "neighbour", "wrong"]
ROLES: tuple[Role, ...] = get_args(Role)
"""What an explanation is to its latent, from the best to the worst."""

ORIGIN = "imported:planted"
_OWN = ("true", "paraphrase", "too_broad", "too_narrow")
_CONDITION = re.compile(r"(?s)([a-z]+):(.*?)(?:@(-?\d+))?")


@dataclass(frozen=True, kw_only=True)
class PlantedText:
    """One explanation."""

    text: str
    rule: Rule


@dataclass(frozen=True, kw_only=True)
class PlantedLatent:
    """One latent: its rule, or a firing rate where it follows none, and its explanations."""

    name: str
    family: str
    rule: Rule | None
    """None for pure noise."""
    rate: float
    """Share of tokens that noise fires on; 0 for a rule."""
    explanations: Mapping[str, PlantedText]
    """By role; noise has no true one."""


def planted_latents(vocabulary: Vocabulary) -> list[PlantedLatent]:
    """Return the latents of ``planted.toml`` for one vocabulary, in the file's order.

    Raises: ConfigError when a rule cannot be read or names a token that the vocabulary lacks.
    """
    source = tomllib.loads((files("autointerp.studies") / "planted.toml").read_text(encoding="utf-8"))
    ids = _token_ids(vocabulary)
    own: list[tuple[str, str, float, Rule | None, dict[str, PlantedText]]] = []
    for family in source["family"]:
        for number, instance in enumerate(family["instances"]):
            slots = {key: str(value) for key, value in instance.items()}
            plant = _rule(family["plant"], slots, ids) if "plant" in family else None
            texts: dict[str, PlantedText] = {}
            for role in _OWN if plant is not None else ():
                assert plant is not None
                given = family[role]
                rule = _rule(given["rule"], slots, ids) if "rule" in given else plant
                texts[role] = PlantedText(text=given["text"].format(**slots), rule=rule)
            own.append((f"{family['name']}-{number}", family["name"], float(instance.get("rate", 0)), plant, texts))
    return [
        PlantedLatent(name=name, family=family, rule=rule, rate=rate, explanations=texts | _borrowed(own, i))
        for i, (name, family, rate, rule, texts) in enumerate(own)
    ]


def _borrowed(own: Sequence[tuple[str, str, float, Rule | None, dict[str, PlantedText]]], row: int) -> dict[str, PlantedText]:
    """Return what other latents lend: the next instance of the family, and one half the list away."""
    ruled = [i for i, item in enumerate(own) if item[3] is not None]
    family = [i for i in ruled if own[i][1] == own[row][1]] or ruled
    near = family[(family.index(row) + 1) % len(family)] if row in family else family[row % len(family)]
    at = ruled.index(row) if row in ruled else row
    far = ruled[(at + len(ruled) // 2) % len(ruled)]
    return {"neighbour": own[near][4]["true"], "wrong": own[far][4]["true"]}


def _token_ids(vocabulary: Vocabulary) -> dict[str, int]:
    found: dict[str, int] = {}
    for token in range(len(vocabulary)):
        found.setdefault(vocabulary.text(np.array([token], np.uint32)), token)
    return found


def _rule(clauses: Sequence[Sequence[str]], slots: Mapping[str, str], ids: Mapping[str, int]) -> Rule:
    return Rule(
        clauses=tuple(
            Clause(conditions=tuple(_condition(text.format(**slots), ids) for text in conditions), score=1.0)
            for conditions in clauses
        )
    )


def _condition(text: str, ids: Mapping[str, int]) -> Condition:
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise ConfigError(f"a planted condition reads {text!r}; expected KIND:VALUE@OFFSET")
    kind, value, offset = match[1], match[2], int(match[3] or 0)
    if kind == "token" and value not in ids:
        raise ConfigError(f"a planted rule names the token {value!r}, which the tokenizer lacks; {nearest(value, ids)}")
    number: int | str = ids[value] if kind == "token" else int(value) if kind == "column" else value
    condition = Condition(kind=kind, offset=offset, value=number)  # type: ignore[arg-type]  # checked by the next line
    # Reading it back runs the checks that explanations from elsewhere get.
    return Rule.from_json(Rule(clauses=(Clause(conditions=(condition,), score=1.0),)).to_json()).clauses[0].conditions[0]


def to_values(latents: Sequence[PlantedLatent]) -> list[dict[str, Any]]:
    """Return the latents as JSON values, as a planted store keeps them."""
    return [
        {
            "name": latent.name,
            "family": latent.family,
            "rate": latent.rate,
            "rule": latent.rule.to_json() if latent.rule is not None else None,
            "explanations": {role: {"text": e.text, "rule": e.rule.to_json()} for role, e in latent.explanations.items()},
        }
        for latent in latents
    ]


def planted_in(store: Path | str) -> dict[str, Any]:
    """Return what was planted in a store: ``latents`` as :func:`to_values` wrote them, and ``coders`` with their noise.

    Raises: InputError when nothing was.
    """
    found = read_manifest(Path(store)).provenance.get("planted")
    if not isinstance(found, dict):
        raise InputError(f"{store} holds no planted latents; make such a store with `autointerp calibrate`")
    return found


class PlantedConfig(Config):
    """Which explanations."""

    role: Role
    """What they are to their latents."""
    store: Path = Field(json_schema_extra=RUNTIME)
    """The planted store."""


class PlantedExplanations:
    """Gives each planted latent its explanation of one role, as an explainer named after the role."""

    Config = PlantedConfig
    needs = Needs()

    def __init__(self, config: PlantedConfig) -> None:
        """Read the explanations from the store.

        Raises: InputError when nothing is planted there.
        """
        self.name = config.role
        self._latents = planted_in(config.store)["latents"]

    def identity(self) -> Mapping[str, Any]:
        return {"role": self.name, "planted": digest(self._latents)}

    def requests(self, latent: LatentExamples, resources: Resources, /) -> list[Request]:
        """Return nothing: no LLM is asked."""
        return []

    async def explain(self, latent: LatentExamples, resources: Resources, /) -> Sequence[Explanation]:
        """Return the explanation; ``not_applicable`` for a latent that has none of this role."""
        found = self._latents[latent.latent]["explanations"].get(self.name)
        row = Explanation(
            coder=latent.coder,
            latent=latent.latent,
            explainer=self.name,
            explainer_id="",
            selection_id=latent.selection_id,
            status="ok" if found else "not_applicable",
            text=found["text"] if found else None,
            rule=found["rule"] if found else None,
            origin=ORIGIN,
        )
        return [row]
