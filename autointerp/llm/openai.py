"""Engines behind HTTP: any server with the OpenAI endpoints, one or several of the same model.

The SDK only carries requests; retries, waits and concurrency are `pacing`'s, the format is `wire`'s. Keys appear in no message.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import openai

from autointerp.errors import (
    ConfigError,
    ContextExceeded,
    EngineStopped,
    LLMError,
    Permanent,
    RateLimited,
    ReplyError,
    Transient,
)
from autointerp.llm.clock import Clock, SystemClock
from autointerp.llm.constraints import conforms
from autointerp.llm.gate import Gate, kind_of
from autointerp.llm.pacing import Pacer, Unreachable, retry_after_s
from autointerp.llm.settings import EngineConfig
from autointerp.llm.tokenizing import candidates
from autointerp.llm.wire import Flavour, LabelIdsIgnored, Wire, decode, encode, excerpt, parse_json
from autointerp.records import Capabilities, EngineId, Reply, Request

_LOG = logging.getLogger(__name__)

_LOCAL = {"localhost", "127.0.0.1", "::1", "0.0.0.0"}
_DEFAULT_KEY_ENV = EngineConfig.model_fields["api_key_env"].default
_CONTEXT = re.compile(
    r"context[_ ]length|context[_ ]size|context[_ ]window|maximum context|max_model_len|maximum model length"
    r"|prompt is too long|too many tokens|input is too long|longer than the maximum|exceeds? the (model's )?max",
    re.IGNORECASE,
)
_QUOTA = re.compile(
    r"insufficient_quota|exceeded your current quota|billing_hard_limit|insufficient (credit|balance)", re.IGNORECASE
)
_UNREACHABLE = {"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol"}
_REFUSABLE = ("temperature", "top_p", "seed")


@dataclass(frozen=True)
class Server:
    """One address and its client."""

    client: openai.AsyncOpenAI
    url: str
    """Base URL without user or password."""
    root: str
    """The server's root, where vLLM has what OpenAI has not; with user and password."""


class OpenAIEngine:
    """One model behind one or several compatible servers."""

    def __init__(
        self,
        *,
        model: str,
        urls: Sequence[str],
        config: EngineConfig | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """Nothing is sent before `prepare` or the first request.

        Raises: ConfigError when a URL is none or the key is missing.
        """
        self.config = config = config if config is not None else EngineConfig()
        self.id = EngineId(kind="openai", model=model, revision=config.revision, quantization=config.quantization)
        self.extra_body: Mapping[str, Any] = config.extra_body
        self.num_violations = 0
        """Constrained replies that ended by themselves and did not obey their constraint."""
        self._clock = clock if clock is not None else SystemClock()
        servers = {}
        for url in urls:
            parts = _checked(url)
            key = _key(parts.hostname or "", config)
            server = _server(url, key, config)
            servers[server.url] = server
        self._secrets = tuple({server.client.api_key for server in servers.values()} | _passwords(urls))
        self.pacer: Pacer[Server] = Pacer(servers, config, clock=self._clock, rng=rng)
        self._flavour: Flavour | None = None if config.flavour == "auto" else config.flavour
        self._context_tokens = config.context_tokens
        self._gate = Gate()
        self._asking = asyncio.Lock()
        self._is_ready = False
        self._label_ids: dict[tuple[str, ...], dict[int, int]] = {}
        self._knows_label_ids = True
        self._refused: set[str] = set()

    @classmethod
    def from_spec(cls, spec: str, config: EngineConfig) -> Self:
        """Open ``MODEL@BASE_URL[,BASE_URL...]``.

        Raises: ConfigError when it is not of that form.
        """
        found = re.fullmatch(r"(?P<model>.+?)@(?P<urls>https?://.+)", spec)
        if found is None:
            raise ConfigError(
                f"the engine 'openai:{excerpt(spec)}' cannot be opened: expected openai:MODEL@BASE_URL, for example "
                "openai:my-model@http://localhost:8000/v1"
            )
        return cls(model=found["model"], urls=[url.strip() for url in found["urls"].split(",") if url.strip()], config=config)

    @property
    def flavour(self) -> Flavour | None:
        """The servers' dialect; None before `prepare` where it is to be found out."""
        return self._flavour

    @property
    def capabilities(self) -> Capabilities:
        """What the servers can do; with flavour ``auto`` known after `prepare`, and all before."""
        is_vllm = self._flavour != "openai"
        return Capabilities(prompt_logprobs=is_vllm, token_ids=is_vllm, tokenize=is_vllm)

    @property
    def context_tokens(self) -> int | None:
        return self._context_tokens

    async def prepare(self) -> None:
        """Ask every server which models it has. Safe to call again.

        Raises: EngineStopped when one cannot be reached; ConfigError when one has not the model.
        """
        if self._is_ready:
            return
        async with self._asking:
            if self._is_ready:
                return
            flavours: set[Flavour] = set()
            for endpoint in self.pacer.endpoints:
                flavours.add(await self._ask_models(endpoint.target))
            if self._flavour is None:
                self._flavour = "vllm" if flavours == {"vllm"} else "openai"
            self._is_ready = True

    async def _ask_models(self, server: Server) -> Flavour:
        async def ask(_: Server) -> str | None:
            try:
                return await self._get(server, "/models")
            except Refused as error:
                # Not every server has the list, and not every key may read it.
                if error.status in (403, 404, 405):
                    return None
                raise

        try:
            text = await self.pacer.call(ask, is_patient=False)
        except Transient as error:
            raise EngineStopped(f"{server.url} cannot be used: {error}; start the server, or correct the address") from error
        data = None if text is None else parse_json(text).get("data")
        models = [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
        own = next((entry for entry in models if entry.get("id") == self.id.model), None)
        is_vllm = any(entry.get("owned_by") == "vllm" for entry in models)
        if own is None and models and (is_vllm or _is_local(server.url)):
            names = ", ".join(str(entry.get("id")) for entry in models[:8])
            raise ConfigError(f"{server.url} has no model {self.id.model!r}; it has: {names}")
        length = own.get("max_model_len") if own is not None else None
        if self.config.context_tokens is None and isinstance(length, int):
            self._context_tokens = min(length, self._context_tokens or length)
        return "vllm" if is_vllm else "openai"

    async def complete(self, request: Request, /) -> Reply:
        """Answer one request.

        Raises: see :class:`autointerp.protocols.Engine`.
        """
        await self.prepare()
        while True:
            wire = await self._encode(request)
            try:
                async with self._gate.enter(kind_of(request) if self._flavour == "vllm" else None):
                    reply = await self.pacer.call(lambda server, wire=wire: self._send(server, wire))  # type: ignore[misc]
                break
            except LabelIdsIgnored:
                self._knows_label_ids = False
                _LOG.warning("%s does not know logprob_token_ids: labels are read from the 20 likeliest tokens", self.id.model)
            except Permanent as error:
                if not self._gives_way(wire, error):
                    raise
        if reply.finish == "stop" and not conforms(request.constraint, reply.text):
            if not self.num_violations:
                _LOG.warning(
                    "%s answered outside the form it was held to: it ignores constraints, and what cannot be read will count "
                    "as unparseable; use a server with structured output, or set the scorer's constraint to off",
                    self.id.model,
                )
            self.num_violations += 1
        return reply

    async def _encode(self, request: Request) -> Wire:
        assert self._flavour is not None
        label_ids: Mapping[int, int] = {}
        if request.labels and self._flavour == "vllm" and self._knows_label_ids and not request.top_logprobs:
            label_ids = await self._ids_of(request.labels)
        wire = encode(request, model=self.id.model, flavour=self._flavour, label_ids=label_ids, extra_body=self.extra_body)
        if "max_tokens" in self._refused:
            wire.body["max_completion_tokens"] = wire.body.pop("max_tokens")
        for name in _REFUSABLE:
            if name in self._refused:
                wire.body.pop(name, None)
        return wire

    def _gives_way(self, wire: Wire, error: Permanent) -> bool:
        """Return whether the server refused a field that it can do without, which is then left out from now on."""
        text = str(error)
        if isinstance(error, EngineStopped | ContextExceeded) or not re.search(
            "unsupported|not support|unknown|deprecated", text, re.I
        ):
            return False
        if "max_completion_tokens" in text and "max_tokens" in wire.body:
            self._refused.add("max_tokens")
            return True
        for name in _REFUSABLE:
            if re.search(rf"\b{name}\b", text) and name in wire.body:
                self._refused.add(name)
                _LOG.warning("%s does not let us set %s: its own value is used", self.id.model, name)
                return True
        return False

    async def _ids_of(self, labels: tuple[str, ...]) -> dict[int, int]:
        """Return token id -> label index over all single tokens that are a label with or without space around it."""
        async with self._asking:
            if labels in self._label_ids:
                return self._label_ids[labels]
            ids: dict[int, int] = {}
            alone = [False] * len(labels)
            for index, label in enumerate(labels):
                for text in candidates(label):
                    tokens = await self.tokenize(text)
                    if len(tokens) == 1:
                        ids[tokens[0]] = index
                        alone[index] = True
            self._label_ids[labels] = ids if all(alone) else {}
            return self._label_ids[labels]

    async def _send(self, server: Server, wire: Wire) -> Reply:
        return decode(wire, await self._post(server, wire.path, wire.body))

    async def _post(self, server: Server, path: str, body: Mapping[str, Any]) -> str:
        try:
            return await server.client.post(path, cast_to=str, body=dict(body))
        except openai.OpenAIError as error:
            raise translate(error, server.url, wall=self._clock.wall(), secrets=self._secrets) from None

    async def _get(self, server: Server, path: str) -> str:
        try:
            return await server.client.get(path, cast_to=str)
        except openai.OpenAIError as error:
            raise translate(error, server.url, wall=self._clock.wall(), secrets=self._secrets) from None

    async def tokenize(self, text: str, /) -> tuple[int, ...]:
        """Return the token ids of `text`; only vLLM servers can tell.

        Raises: Permanent where the server cannot.
        """
        await self.prepare()
        if self._flavour != "vllm":
            raise Permanent(
                f"the server of {self.id.model!r} has no tokenizer to ask; use a vLLM server, or an hf: or vllm: engine"
            )
        body = {"model": self.id.model, "prompt": text, "add_special_tokens": False}
        answer = await self.pacer.call(lambda server: self._post(server, server.root + "/tokenize", body))
        tokens = parse_json(answer).get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise ReplyError("the server's answer to /tokenize has no token ids", raw=answer[:2000])
        return tuple(tokens)

    async def aclose(self) -> None:
        """Close the connections. Safe to call twice."""
        for endpoint in self.pacer.endpoints:
            await endpoint.target.client.close()


class Refused(EngineStopped):
    """A status that no request will get past."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


def translate(error: openai.OpenAIError, url: str, *, wall: float, secrets: Sequence[str] = ()) -> LLMError | ReplyError:
    """Return this package's error for one of the SDK's; `wall` is the time now, `secrets` are blotted out of the message."""
    if isinstance(error, openai.APIStatusError):
        return _of_status(error, url, wall, secrets)
    if isinstance(error, openai.APIConnectionError):
        causes = _causes(error)
        # The SDK's transport calls a dropped connection a timeout of connecting; the first cause knows better.
        if causes & {"ServerDisconnectedError", "ClientOSError", "ClientPayloadError"}:
            return Transient(f"the connection to {url} was dropped")
        if causes & _UNREACHABLE:
            return Unreachable(f"{url} cannot be reached")
        if isinstance(error, openai.APITimeoutError):
            return Transient(f"{url} did not answer in time")
        return Transient(f"the connection to {url} was dropped")
    if isinstance(error, openai.APIResponseValidationError):
        return ReplyError(f"{url} sent a reply of an unknown form", raw=_blot(str(error.body), secrets)[:2000])
    return Permanent(f"{url}: {_blot(excerpt(str(error), 300), secrets)}")


def _causes(error: BaseException) -> set[str]:
    names = set()
    while error.__cause__ is not None:
        error = error.__cause__
        names.add(type(error).__name__)
    return names


def _of_status(error: openai.APIStatusError, url: str, wall: float, secrets: Sequence[str]) -> LLMError:
    status = error.status_code
    said = _blot(excerpt(_said(error), 300), secrets)
    text = f"{url} answered {status}: {said}"
    if status in (401, 403):
        return Refused(f"{text}; check the key in the variable named by api_key_env, and what it may use", status=status)
    if status == 402 or (status == 429 and _QUOTA.search(f"{error.code} {error.type} {said}")):
        return Refused(f"{text}; the quota is spent, finished work is kept", status=status)
    if status in (404, 405, 410):
        return Refused(f"{text}; check the model's name and the base URL, which usually ends in /v1", status=status)
    if status in (429, 503, 529):
        return RateLimited(text, retry_after_s=retry_after_s(error.response.headers, wall))
    if status in (408, 409, 425) or status >= 500:
        return Transient(text)
    if status in (400, 413, 422) and _CONTEXT.search(f"{error.code} {said}"):
        return ContextExceeded(text)
    return Permanent(text)


def _said(error: openai.APIStatusError) -> str:
    body = error.body
    if isinstance(body, dict):
        inner = body.get("error", body)
        message = inner.get("message") if isinstance(inner, dict) else inner
        if message:
            return str(message)
    return str(body) if body else error.response.reason_phrase


def _blot(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        if len(secret) > 3:
            text = text.replace(secret, "[key]")
    return re.sub(r"\b(sk|key|pk)-[\w*-]{6,}", "[key]", text)


def _checked(url: str) -> Any:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{_bare(url)!r} is not a base URL; expected for example http://localhost:8000/v1")
    return parts


def _bare(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")


def _is_local(url: str) -> bool:
    return (urlsplit(url).hostname or "") in _LOCAL


def _passwords(urls: Sequence[str]) -> set[str]:
    return {password for url in urls if (password := urlsplit(url).password)}


def _key(host: str, config: EngineConfig) -> str:
    """Return the key for a host; a server on this machine gets none unless a variable was named on purpose."""
    if not config.api_key_env or (host in _LOCAL and config.api_key_env == _DEFAULT_KEY_ENV):
        return "none"
    key = os.environ.get(config.api_key_env, "")
    if not key:
        raise ConfigError(
            f"no key for {host}: the environment variable {config.api_key_env} is not set; set it, name another with "
            'api_key_env, or set api_key_env = "" for a server that needs no key'
        )
    return key


def _server(url: str, key: str, config: EngineConfig) -> Server:
    # The SDK's HTTP library has changed its name; its client's base class tells which one this release uses.
    base_class = next(kind for kind in openai.DefaultAioHttpClient.__mro__ if kind.__name__ == "AsyncClient")
    http: Any = import_module(base_class.__module__.partition(".")[0])
    size = config.concurrency + 16
    limits = http.Limits(max_connections=size, max_keepalive_connections=size)
    timeout = openai.Timeout(config.timeout_s, connect=config.connect_timeout_s)
    base = url.rstrip("/")
    client = openai.AsyncOpenAI(
        base_url=base,
        api_key=key,
        max_retries=0,
        timeout=timeout,
        http_client=openai.DefaultAioHttpClient(base_url=base, limits=limits, timeout=timeout),
    )
    return Server(client=client, url=_bare(base), root=base.removesuffix("/v1"))
