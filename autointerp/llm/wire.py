"""The OpenAI wire format: a request as a JSON body, a JSON body as a reply. No network here.

Bodies are read strictly: whatever is missing or of another type is an error, and nothing is put in its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from autointerp.errors import Permanent, ReplyError, Transient
from autointerp.llm.constraints import Wrapped, wrap
from autointerp.llm.grammar import structured_outputs
from autointerp.llm.thinking import reasoning_tokens, strip_thinking
from autointerp.records import Chat, Reply, Request, Text, TokenLogprob, Usage

Flavour = Literal["vllm", "openai"]

_RAW_CHARS = 2000
_WRAPPER_TOKENS = 16
"""Room for the object around an answer."""
_FINISH: dict[str, Literal["stop", "length", "filter"]] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "end_turn": "stop",
    "length": "length",
    "max_tokens": "length",
    "content_filter": "filter",
    "safety": "filter",
    "refusal": "filter",
}
_LOST = -9999.0
MAX_LABEL_IDS = 128
"""Most ids that vLLM takes in ``logprob_token_ids``."""
TOP_LOGPROBS = 20
"""Alternatives asked for where the labels' own ids cannot be."""


@dataclass(frozen=True)
class Wire:
    """A request as it is sent, and what is needed to read the answer."""

    path: str
    body: dict[str, Any]
    request: Request
    wrapped: Wrapped | None = None
    label_ids: Mapping[int, int] = field(default_factory=dict)
    """Token id -> index of the label it stands for; empty where labels are read from the alternatives' text."""

    @property
    def is_chat(self) -> bool:
        return self.path == "/chat/completions"


def encode(
    request: Request, *, model: str, flavour: Flavour, label_ids: Mapping[int, int], extra_body: Mapping[str, Any]
) -> Wire:
    """Return the body of `request`. `label_ids` may be empty.

    Raises: Permanent when the dialect cannot say what the request asks.
    """
    is_vllm = flavour == "vllm"
    is_chat = isinstance(request.prompt, Chat)
    # Some servers refuse to generate nothing: one token is asked for and thrown away.
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": max(1, request.max_tokens),
        "temperature": request.temperature,
    }
    if isinstance(request.prompt, Chat):
        body["messages"] = [{"role": role, "content": content} for role, content in request.prompt.messages]
    else:
        body["prompt"] = request.prompt.text if isinstance(request.prompt, Text) else list(request.prompt.ids)
    if is_vllm:
        # The request decides, not the generation_config.json that the server read.
        body |= {"top_p": request.top_p, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    elif request.top_p != 1.0:
        body["top_p"] = request.top_p
    if request.stop:
        body["stop"] = list(request.stop)
    if request.seed is not None:
        body["seed"] = request.seed
    wrapped = _constrain(body, request, is_vllm)
    used_ids = _ask_logprobs(body, request, is_chat, label_ids if is_vllm else {})
    if request.prompt_logprobs is not None:
        if not is_vllm:
            raise Permanent(
                "this server gives no log-probabilities of the prompt; use a vLLM server, or an hf: or vllm: engine"
            )
        body |= {"prompt_logprobs": request.prompt_logprobs.top, "return_token_ids": True}
    path = "/chat/completions" if is_chat else "/completions"
    return Wire(path, body | dict(extra_body), request, wrapped, used_ids)


def _constrain(body: dict[str, Any], request: Request, is_vllm: bool) -> Wrapped | None:
    constraint = request.constraint
    if constraint is None:
        return None
    if is_vllm:
        body["structured_outputs"] = structured_outputs(constraint)
        return None
    wrapped = wrap(constraint)
    schema = {"name": "answer", "schema": wrapped.schema, "strict": True}
    body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if wrapped.is_wrapped:
        body["max_tokens"] += _WRAPPER_TOKENS
    return wrapped


def _ask_logprobs(body: dict[str, Any], request: Request, is_chat: bool, label_ids: Mapping[int, int]) -> Mapping[int, int]:
    top = request.top_logprobs
    ids: Mapping[int, int] = {}
    if request.labels:
        if label_ids and top == 0 and len(label_ids) <= MAX_LABEL_IDS:
            ids = label_ids
            body |= {"logprob_token_ids": sorted(ids), "return_tokens_as_token_ids": True}
            top = len(ids)
        else:
            top = max(top, TOP_LOGPROBS)
    if top:
        body |= {"logprobs": True, "top_logprobs": min(top, TOP_LOGPROBS)} if is_chat else {"logprobs": min(top, TOP_LOGPROBS)}
    return ids


def parse_json(text: str) -> dict[str, Any]:
    """Return the object in a body.

    Raises: Transient when the body is empty, cut off or no JSON: something between the engine and us went wrong. ReplyError
    when it is JSON of another kind.
    """
    if not text.strip():
        raise Transient("the server sent an empty body with status 200")
    try:
        body = orjson.loads(text)
    except orjson.JSONDecodeError:
        kind = "an HTML page" if text.lstrip()[:1] == "<" else "no valid JSON (cut off?)"
        raise Transient(f"the server sent {kind} with status 200: {excerpt(text)!r}") from None
    if not isinstance(body, dict):
        raise ReplyError(f"the server sent a JSON {type(body).__name__} where an object was expected", raw=text[:_RAW_CHARS])
    return body


def excerpt(text: str, limit: int = 120) -> str:
    """Return the start of a text for a message, without control characters."""
    return "".join(char if char.isprintable() else " " for char in text[:limit]) + ("..." if len(text) > limit else "")


def decode(wire: Wire, text: str) -> Reply:
    """Return the reply in the body `text` that answers `wire`.

    Raises: Transient as `parse_json`; ReplyError when the body is not a reply; Permanent when it lacks what was asked for.
    """
    reader = _Reader(wire, parse_json(text), text)
    return reader.reply()


class _Reader:
    def __init__(self, wire: Wire, body: dict[str, Any], raw: str) -> None:
        self.wire = wire
        self.request = wire.request
        self.body = body
        self.raw = raw[:_RAW_CHARS]
        choices = body.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            error = body.get("error")
            if error:
                raise Transient(f"the server sent an error with status 200: {excerpt(str(error), 300)!r}")
            raise self.wrong("has no choices")
        self.choice: dict[str, Any] = choices[0]

    def wrong(self, what: str) -> ReplyError:
        return ReplyError(f"the server's reply {what}", raw=self.raw)

    def reply(self) -> Reply:
        request = self.request
        text, thinking, is_refusal = self.text()
        finish = "filter" if is_refusal else self.finish()
        usage = self.usage()
        stripped = strip_thinking(text)
        num_thinking = stripped.num_thinking_chars + len(thinking)
        if num_thinking and not usage.reasoning_tokens:
            count = reasoning_tokens(usage.output_tokens, num_thinking, len(text) + len(thinking))
            usage = Usage(
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                output_tokens=usage.output_tokens,
                reasoning_tokens=count,
            )
        answer = self.wire.wrapped.unwrap(stripped.text) if self.wire.wrapped is not None else stripped.text
        probs = self.label_probs() if request.labels else None
        model = self.body.get("model")
        return Reply(
            text=answer if request.max_tokens else "",
            finish=finish if request.max_tokens else "stop",
            tokens=self.tokens() if request.top_logprobs and request.max_tokens else (),
            prompt_tokens=self.prompt_tokens() if request.prompt_logprobs is not None else (),
            label_probs=probs,
            label_mass=None if probs is None else math.fsum(probs),
            usage=usage,
            served_model=model if isinstance(model, str) else "",
        )

    def text(self) -> tuple[str, str, bool]:
        """Return the text, separate thinking, and whether the text is a refusal."""
        if not self.wire.is_chat:
            text = self.choice.get("text")
            if not isinstance(text, str):
                raise self.wrong("has no text")
            return text, "", False
        message = self.choice.get("message")
        if not isinstance(message, dict):
            raise self.wrong("has no message")
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        reasoning = reasoning if isinstance(reasoning, str) else ""
        content, refusal = message.get("content"), message.get("refusal")
        if isinstance(content, str):
            return content, reasoning, False
        if content is not None:
            raise self.wrong(f"has a content of type {type(content).__name__}")
        if isinstance(refusal, str) and refusal:
            return refusal, reasoning, True
        is_empty_by_right = reasoning or self.choice.get("finish_reason") in ("length", "content_filter")
        if is_empty_by_right or self.request.labels or self.request.max_tokens == 0:
            return "", reasoning, False
        raise self.wrong("has no content")

    def finish(self) -> Literal["stop", "length", "filter"]:
        reason = self.choice.get("finish_reason")
        if reason in ("abort", "error"):
            raise Transient(f"the server gave the request up (finish_reason {reason!r})")
        if not isinstance(reason, str) or reason not in _FINISH:
            raise self.wrong(f"has the finish_reason {reason!r}; expected one of {', '.join(_FINISH)}")
        return _FINISH[reason]

    def usage(self) -> Usage:
        usage = _mapping(self.body.get("usage"))
        prompt, output = _mapping(usage.get("prompt_tokens_details")), _mapping(usage.get("completion_tokens_details"))
        return Usage(
            prompt_tokens=_count(usage.get("prompt_tokens")),
            cached_tokens=_count(prompt.get("cached_tokens")),
            output_tokens=_count(usage.get("completion_tokens")),
            reasoning_tokens=_count(output.get("reasoning_tokens")),
        )

    def tokens(self) -> tuple[TokenLogprob, ...]:
        """Return the generated tokens, each with its alternatives."""
        rows = self.logprob_rows()
        if self.request.constraint is None and any(value <= _LOST for _, _, top in rows for _, value in top):
            # See `gate`; here another client's labels came between. A grammar masks tokens by right.
            raise Transient("the server lost the alternatives that were asked for, to another request in its batch")
        return tuple(
            TokenLogprob(token=token, token_id=None, logprob=logprob, top=tuple(top[: self.request.top_logprobs]))
            for token, logprob, top in rows
        )

    def logprob_rows(self) -> list[tuple[str, float, list[tuple[str, float]]]]:
        """Return (token, logprob, alternatives) per generated token, from either endpoint's form."""
        logprobs = self.choice.get("logprobs")
        if not isinstance(logprobs, dict):
            raise Permanent("the server gave no log-probabilities though they were asked for; use a method that needs none")
        try:
            if isinstance(logprobs.get("content"), list):
                return [
                    (
                        str(row["token"]),
                        float(row["logprob"]),
                        [(str(a["token"]), float(a["logprob"])) for a in row["top_logprobs"]],
                    )
                    for row in logprobs["content"]
                ]
            columns = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
            return [(str(token), float(value), [(str(t), float(v)) for t, v in top.items()]) for token, value, top in columns]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self.wrong("has log-probabilities of an unknown form") from None

    def label_probs(self) -> tuple[float, ...]:
        rows = self.logprob_rows()
        if not rows:
            raise self.wrong("has no first token to read labels from")
        token, logprob, top = rows[0]
        best: dict[str, float] = {}
        for text, value in [(token, logprob), *top]:
            best[text] = max(value, best.get(text, -math.inf))
        probs = [0.0] * len(self.request.labels)
        if self.wire.label_ids:
            for token_id, index in self.wire.label_ids.items():
                name = f"token_id:{token_id}"
                if name not in best:
                    raise LabelIdsIgnored("the server ignored logprob_token_ids")
                probs[index] += math.exp(best[name])
        else:
            for text, value in best.items():
                stripped = text.strip()
                if stripped in self.request.labels:
                    probs[self.request.labels.index(stripped)] += math.exp(value)
        if not all(0.0 <= prob <= 1.0 + 1e-3 for prob in probs):
            raise self.wrong(f"has label probabilities out of range: {probs}")
        return tuple(probs)

    def prompt_tokens(self) -> tuple[TokenLogprob, ...]:
        asked = self.request.prompt_logprobs
        assert asked is not None
        source = self.body if self.wire.is_chat else self.choice
        rows, ids = source.get("prompt_logprobs"), source.get("prompt_token_ids")
        if not isinstance(rows, list) or not isinstance(ids, list) or len(rows) != len(ids):
            raise Permanent("the server gave no log-probabilities of the prompt though they were asked for")
        try:
            pairs = enumerate(zip(rows, ids, strict=True))
            return tuple(_prompt_token(row, token_id, asked.top_at(i)) for i, (row, token_id) in pairs)[asked.start :]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self.wrong("has log-probabilities of the prompt in an unknown form") from None


class LabelIdsIgnored(Permanent):
    """The server does not know ``logprob_token_ids``; the alternatives' text has to do."""


def _prompt_token(row: Mapping[str, Any] | None, token_id: int, top: int) -> TokenLogprob:
    if row is None:
        return TokenLogprob(token="", token_id=token_id, logprob=None)
    own = row[str(token_id)]
    ranked: Sequence[Mapping[str, Any]] = sorted(row.values(), key=lambda entry: -float(entry["logprob"]))
    return TokenLogprob(
        token=str(own.get("decoded_token") or ""),
        token_id=token_id,
        logprob=float(own["logprob"]),
        top=tuple((str(entry.get("decoded_token") or ""), float(entry["logprob"])) for entry in ranked[:top]),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
