"""Builds explainers and scorers by name or ``module:Class``, and checks what they need before anything is spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autointerp.config import build_method
from autointerp.errors import ConfigError
from autointerp.explainers import REGISTRY as EXPLAINERS
from autointerp.llm.engines import check_constraint
from autointerp.protocols import Embedder, Engine, Explainer, Needs, Scorer
from autointerp.records import Capabilities
from autointerp.results.folder import check_method_name
from autointerp.scorers import REGISTRY as SCORERS


def build_explainer(name: str, options: Mapping[str, Any]) -> Explainer:
    """Return the explainer `name`, ``name:NUMBER`` such as ``best_of:8``, or ``module:Class``, with `options`.

    Raises: ConfigError when there is none, or an option is unknown.
    """
    built: Explainer = _build("explainer", name, EXPLAINERS, options)
    return built


def build_scorer(name: str, options: Mapping[str, Any]) -> Scorer:
    """Return the scorer `name`, or ``module:Class``, with `options`.

    Raises: ConfigError when there is none, or an option is unknown.
    """
    built: Scorer = _build("scorer", name, SCORERS, options)
    return built


def _build(kind: str, name: str, registry: Mapping[str, str], options: Mapping[str, Any]) -> Any:
    method = build_method(kind, name, registry, options)
    check_method_name(method.name)
    return method


def missing(needs: Needs, capabilities: Capabilities | None, *, has_embedder: bool, engine: str = "the engine") -> str | None:
    """Return what a method needs and is not there, and what to do about it; None when nothing is missing.

    `capabilities`: of `engine`, None without one.
    """
    if needs.subject:
        return "the subject model, which this command cannot give yet"
    if needs.embedder and not has_embedder:
        return "an embedder: give --embedder"
    if not (needs.engine or needs.labels or needs.constraints or needs.prompt_logprobs):
        return None
    if capabilities is None:
        return "an LLM: give --engine, such as openai:MODEL@http://localhost:8000/v1"
    shows_prompt = capabilities.prompt_logprobs and capabilities.token_ids and capabilities.tokenize
    for wanted, has, what in (
        (needs.labels, capabilities.labels, "label probabilities"),
        (needs.constraints, capabilities.constraints, "constrained output"),
        (needs.prompt_logprobs, shows_prompt, "log-probabilities of the prompt"),
    ):
        if wanted and not has:
            return f"{what}, which {engine} does not give; choose another engine or another variant"
    return None


async def check_needs(kind: str, name: str, needs: Needs, engine: Engine | None, embedder: Embedder | None = None) -> None:
    """Check that `engine` and `embedder` can do what a method needs; a constraint is tried out, for some servers ignore it.

    Raises: ConfigError naming the first thing that is missing.
    """
    capabilities = engine.capabilities if engine is not None else None
    label = f"{engine.id.kind}:{engine.id.model}" if engine is not None else ""
    what = missing(needs, capabilities, has_embedder=embedder is not None, engine=label)
    if what is not None:
        raise ConfigError(f"the {kind} {name!r} needs {what}")
    if needs.constraints and engine is not None:
        await check_constraint(engine)
