"""Opening an engine by its spec, and the checks of one before work starts.

Specs: ``openai:MODEL@BASE_URL[,BASE_URL...]``, ``vllm:MODEL``, ``hf:MODEL``, or ``package.module:Class`` of an own engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

from autointerp.errors import ConfigError, EngineStopped, Permanent, nearest
from autointerp.llm.constraints import conforms
from autointerp.llm.settings import EngineConfig
from autointerp.protocols import Engine
from autointerp.records import Chat, Choice, Request, Text

KINDS: dict[str, str] = {
    "openai": "autointerp.llm.openai:OpenAIEngine.from_spec",
    "vllm": "autointerp.llm.vllm:VLLMEngine",
    "hf": "autointerp.llm.hf:HFEngine",
}
"""Prefix of a spec -> what opens the rest of it, called with (rest, config)."""

_FORMS = "openai:MODEL@BASE_URL, vllm:MODEL, hf:MODEL or package.module:Class"


def open_engine(spec: str, config: EngineConfig | None = None) -> Engine:
    """Return the engine that `spec` names. A model in this process is loaded now; a server is not asked before `prepare`.

    An own engine, ``package.module:Class``, is called with `config` as its only argument.
    Raises: ConfigError when the spec cannot be read; ResourceError when a package or a model is missing.
    """
    config = config if config is not None else EngineConfig()
    prefix, colon, rest = spec.partition(":")
    if not colon or not prefix or not rest:
        raise ConfigError(f"the engine {spec!r} cannot be opened; expected {_FORMS}")
    if prefix in KINDS:
        engine: Engine = _load(KINDS[prefix], spec)(rest, config)
        return engine
    if "." not in prefix and not re.fullmatch(r"[A-Z_a-z]\w*", rest):
        raise ConfigError(f"the engine {spec!r} is of an unknown kind {prefix!r}; {nearest(prefix, KINDS)}")
    own: Engine = _load(spec, spec)(config)
    if not isinstance(own, Engine):
        raise ConfigError(f"the engine {spec!r} is not one: it lacks an attribute of autointerp.protocols.Engine")
    return own


def _load(target: str, spec: str) -> Callable[..., Any]:
    module, _, names = target.partition(":")
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            raise ConfigError(
                f"the engine {spec!r} cannot be opened: there is no module {module!r}; expected {_FORMS}"
            ) from None
        raise
    for name in names.split("."):
        found = getattr(found, name, None)
        if found is None:
            raise ConfigError(f"the engine {spec!r} cannot be opened: {module} has no {names!r}")
    return found  # type: ignore[no-any-return]


async def prepare(engine: Engine) -> None:
    """Ask a server what it is (model, context, capabilities); other engines are ready already. Safe to call again.

    Raises: EngineStopped when the server cannot be reached or has not the model; ConfigError when a key is missing.
    """
    inner = getattr(engine, "engine", engine)
    own = getattr(inner, "prepare", None)
    if own is not None:
        await own()


_ODD = ("zqx-17", "vkp-42")
"""Two replies that nobody gives to the question below without being made to."""


async def check_constraint(engine: Engine) -> None:
    """Send one small constrained request and check that the answer obeys: some servers accept a constraint and ignore it.

    The request goes past any reply log. Raises: ConfigError when the constraint was ignored.
    """
    inner: Engine = getattr(engine, "engine", engine)
    question = "What colour is the sky on a clear day? Answer in one word."
    constraint = Choice(options=_ODD)
    try:
        reply = await inner.complete(Request(prompt=Chat(messages=(("user", question),)), max_tokens=64, constraint=constraint))
    except EngineStopped:
        raise
    except Permanent:
        # A model without a chat template can still complete text.
        reply = await inner.complete(
            Request(prompt=Text(text=f"Question: {question}\nAnswer:"), max_tokens=64, constraint=constraint)
        )
    if not conforms(constraint, reply.text):
        raise ConfigError(
            f"the engine {inner.id.model!r} ignores output constraints: asked to choose between {_ODD[0]!r} and {_ODD[1]!r} it "
            f"wrote {reply.text[:80]!r}; set the engine's flavour to the server's dialect (vllm or openai), or use a method "
            "that parses free text"
        )
