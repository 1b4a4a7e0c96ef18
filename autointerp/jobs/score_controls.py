"""Controls: the same examples, judged by an explanation that should do worse. What a score is worth is its lift over them.

- ``shuffled``: the explanation of a partner that fires about as often; on every latent.
- ``generic``: one fixed sentence about ordinary text, with a rule that says yes to everything; what any explanation gets.
- ``lexical``: the rule that the lexical explainer learns from the latent's explain pool, judged by rule where the scorer can;
  the floor that an explanation by an LLM has to beat.

The last two are run on a seeded sample of the planned latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np

from autointerp.config import Config
from autointerp.digest import hash64, seed_of
from autointerp.errors import ConfigError
from autointerp.explainers.lexical import Lexical
from autointerp.jobs.plan import Plan
from autointerp.jobs.session import Control
from autointerp.protocols import Resources, Scorer
from autointerp.records import Explanation, LatentExamples
from autointerp.results.folder import Method
from autointerp.results.write import Key, explanation_id
from autointerp.rules import Clause, Condition, Rule

CONTROLS: tuple[Control, ...] = get_args(Control)
SAMPLED: frozenset[str] = frozenset({"generic", "lexical"})
"""Controls that are run on a sample."""

GENERIC = "Common words, punctuation and spaces of ordinary text, as they occur in most passages"
"""What the generic control says of every latent."""
GENERIC_RULE = Rule(
    clauses=tuple(
        Clause(conditions=(Condition(kind="class", offset=0, value=name),), score=1.0)
        for name in ("letters", "space_first", "punctuation", "newline", "opening", "closing", "digits", "operator")
    )
)
"""The same as a rule: true of some token of nearly every window."""


def controls_for(controls: tuple[Control, ...], explainer: Method, scorer: Scorer) -> list[str]:
    """Return the controls that apply: lexical explanations are no floor to themselves, and a scorer that needs no explanation
    has none that another could take the place of.
    """
    left_out = {"lexical"} if explainer.name == Lexical.name else set()
    if not scorer.needs.explanation:
        left_out |= SAMPLED
    return [control for control in controls if control not in left_out]


def control_scorer(scorer: Scorer, control: str | None) -> Scorer:
    """Return what judges under a control: the scorer; for ``lexical`` the same with rules as its judge, where it has them."""
    return (by_rule(scorer) or scorer) if control == "lexical" else scorer


def by_rule(scorer: Scorer) -> Scorer | None:
    """Return the same scorer judged by rule; None where its settings know no such judge."""
    kind, config = getattr(type(scorer), "Config", None), getattr(scorer, "config", None)
    if kind is None or not isinstance(config, Config) or "judge" not in type(config).model_fields:
        return None
    try:
        found: Scorer = type(scorer)(kind.parse({**config.model_dump(), "judge": "rule"}))  # type: ignore[call-arg]
    except ConfigError:
        return None
    return None if found.needs.engine else found


def control_identity(control: str | None) -> dict[str, Any]:
    """Return what decides a control's rows beside its name."""
    if control == "generic":
        return {"control_settings": {"text": GENERIC, "rule": GENERIC_RULE.to_json()}}
    return {"control_settings": dict(Lexical().identity())} if control == "lexical" else {}


def sampled(plan: Plan, num: int | None, *, seed: int) -> Mapping[str, np.ndarray] | None:
    """Return `num` of each coder's requested latents, those that a seeded hash puts first; None for all.

    Of two plans one of which holds the other, the larger one's sample has no latent of the smaller that its own lacks.
    """
    if num is None:
        return None
    chosen = {}
    for coder, latents in plan.latents(plan.coders, only_requested=True).items():
        order = np.argsort(hash64(seed_of("control", seed, coder), latents), kind="stable")
        chosen[coder] = np.sort(latents[order[:num]])
    return chosen


def keys_of(chosen: Mapping[str, np.ndarray] | None) -> frozenset[Key] | None:
    """Return a sample as keys; None for all."""
    if chosen is None:
        return None
    return frozenset((coder, int(latent)) for coder, latents in chosen.items() for latent in latents)


async def own_explanations(control: str, latent: LatentExamples, resources: Resources) -> list[Explanation]:
    """Return what ``generic`` or ``lexical`` says of a latent."""
    if control == "generic":
        rows = [
            Explanation(
                coder=latent.coder,
                latent=latent.latent,
                explainer=control,
                explainer_id="",
                selection_id=latent.selection_id,
                status="ok",
                text=GENERIC,
                rule=GENERIC_RULE.to_json(),
            )
        ]
    else:
        rows = list(await Lexical().explain(latent, resources))
    return [row.with_(explanation_id=explanation_id(row)) for row in rows]
