"""A local server with the OpenAI endpoints that behaves, and misbehaves, as a script says.

In a test's own loop: ``async with serve(Script(...)) as server``. As a process, for tests that kill its clients::

    python -m tests.scripted_server --port 0 --script script.json --record requests.jsonl

It prints its base URL on the first line. `Script` has the fields of the JSON file. Each request is one line of the record:
``{"time", "path", "body", "outcome", "attempt"}``, flushed before the answer leaves.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import hashlib
import importlib
import json
import random
import re
import re._parser as sre
import sys
import time
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

WORDS = "tokens about numbers names verbs code quotes dates places brackets loops errors imports strings paths".split()


@dataclasses.dataclass(kw_only=True)
class Script:
    seed: int = 0
    model: str = "scripted"
    flavour: str = "vllm"
    context_tokens: int = 8192
    behaviours: dict = dataclasses.field(default_factory=lambda: {"ok": 1.0})
    """Name -> weight, drawn by (seed, digest of the request, how often it came before)."""
    first: list = dataclasses.field(default_factory=list)
    """Behaviours of the first requests, in order of arrival, before the draw begins."""
    latency_s: list = dataclasses.field(default_factory=lambda: [0.0, 0.0])
    headers: dict = dataclasses.field(default_factory=dict)
    """Headers of 429 and 503 answers, such as retry-after."""
    max_in_flight: int | None = None
    """More at a time get 429. Until one has, good answers take a second, so that a slow machine fills the server too."""
    answer: str | None = None
    """module:function(body) -> str, the text of good answers."""
    alternatives: list = dataclasses.field(
        default_factory=lambda: [["Yes", -0.3], [" Yes", -2.0], ["No", -2.5], ["Yesterday", -3.0]]
    )
    """(token, logprob) pairs at every generated token."""
    key: str | None = None
    """The only key that is let in."""


def digest(body):
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def pieces(text):
    return re.findall(r"\s?\w+|\s|[^\w\s]", text)


def token_id(piece):
    return int(hashlib.sha256(piece.encode()).hexdigest()[:6], 16)


def from_regex(pattern, rng):
    """Return a string that matches `pattern` (the common constructs)."""
    return _walk(sre.parse(pattern), rng)


def _class(items):
    names = {"CATEGORY_DIGIT": r"\d", "CATEGORY_SPACE": r"\s", "CATEGORY_WORD": r"\w"}
    parts = {"LITERAL": lambda v: re.escape(chr(v)), "RANGE": lambda v: f"{re.escape(chr(v[0]))}-{re.escape(chr(v[1]))}"}
    return "".join(names[str(value)] if str(kind) == "CATEGORY" else parts[str(kind)](value) for kind, value in items)


def _walk(parsed, rng):
    text = ""
    for op, argument in parsed:
        name = str(op)
        if name == "LITERAL":
            text += chr(argument)
        elif name == "ANY":
            text += rng.choice("abc")
        elif name == "NOT_LITERAL":
            text += "a" if argument != ord("a") else "b"
        elif name == "IN" and str(argument[0][0]) == "NEGATE":
            outside = [char for char in "abcdefgh 123" if not re.fullmatch("[" + _class(argument[1:]) + "]", char)]
            text += rng.choice(outside)
        elif name == "IN":
            kind, value = rng.choice(argument)
            text += {"LITERAL": lambda v: chr(v), "RANGE": lambda v: chr(rng.randint(*v)), "CATEGORY": lambda v: "1"}[
                str(kind)
            ](value)
        elif name in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, inner = argument
            text += "".join(_walk(inner, rng) for _ in range(rng.randint(low, min(int(high), low + 3))))
        elif name == "SUBPATTERN":
            text += _walk(argument[-1], rng)
        elif name == "BRANCH":
            text += _walk(rng.choice(argument[1]), rng)
        elif name != "AT":
            raise NotImplementedError(name)
    return text


def from_schema(schema, rng):
    """Return a value that is valid under `schema` (the common keywords)."""
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if "anyOf" in schema:
        return from_schema(rng.choice(schema["anyOf"]), rng)
    kind = schema.get("type")
    if kind == "array":
        low = schema.get("minItems", 0)
        return [from_schema(schema["items"], rng) for _ in range(rng.randint(low, schema.get("maxItems", low + 3)))]
    if kind == "object":
        return {name: from_schema(inner, rng) for name, inner in schema.get("properties", {}).items()}
    if kind == "integer":
        return rng.randint(schema.get("minimum", 0), schema.get("maximum", 10))
    if kind == "number":
        return rng.uniform(schema.get("minimum", 0), schema.get("maximum", 1))
    if kind == "string":
        return from_regex(schema["pattern"], rng) if "pattern" in schema else " ".join(rng.choices(WORDS, k=4))
    return {"boolean": rng.random() < 0.5, "null": None}[kind]


def obedient(body, rng):
    """Return a text in the form that the body's constraint asks, or None."""
    asked = body.get("structured_outputs")
    if asked:
        if "choice" in asked:
            return rng.choice(asked["choice"])
        if "regex" in asked:
            return from_regex(asked["regex"], rng)
        return json.dumps(from_schema(asked["json"], rng))
    form = body.get("response_format") or {}
    if form.get("type") == "json_schema":
        return json.dumps(from_schema(form["json_schema"]["schema"], rng))
    return None


class ScriptedServer:
    def __init__(self, script, record=None):
        self.script = script
        self.requests = []
        self.in_flight = self.max_in_flight = self.num_tokenized = 0
        self.url = ""
        self._seen = Counter()
        self._overrun = asyncio.Event()
        self._record = open(record, "a", buffering=1) if record else None
        name = script.answer
        self._answer = getattr(importlib.import_module(name.partition(":")[0]), name.partition(":")[2]) if name else None
        self._first = list(script.first)

    def app(self):
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_post("/v1/completions", self.complete)
        return app

    async def models(self, request):
        if (refusal := self.check_key(request)) is not None:
            return refusal
        own = {"id": self.script.model, "object": "model"}
        if self.script.flavour == "vllm":
            own |= {"owned_by": "vllm", "max_model_len": self.script.context_tokens}
        return web.json_response({"object": "list", "data": [own]})

    async def tokenize(self, request):
        if self.script.flavour != "vllm":
            return web.json_response({"detail": "Not Found"}, status=404)
        self.num_tokenized += 1
        ids = [token_id(piece) for piece in pieces((await request.json())["prompt"])]
        return web.json_response({"tokens": ids, "count": len(ids)})

    def check_key(self, request):
        if self.script.key is None or request.headers.get("authorization") == f"Bearer {self.script.key}":
            return None
        return error(401, f"Incorrect API key provided: {request.headers.get('authorization', '')[7:]}", "invalid_api_key")

    async def complete(self, request):
        if (refusal := self.check_key(request)) is not None:
            return refusal
        body = await request.json()
        name = digest(body)
        attempt = self._seen[name]
        self._seen[name] += 1
        rng = random.Random(f"{self.script.seed} {name} {attempt}")
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            outcome = self.draw(rng)
            entry = {"time": time.time(), "path": request.path, "body": body, "outcome": outcome, "attempt": attempt}
            self.requests.append(entry)
            if self._record:
                self._record.write(json.dumps(entry) + "\n")
            await asyncio.sleep(rng.uniform(*self.script.latency_s))
            if self.script.max_in_flight is not None and outcome != "429":
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._overrun.wait(), timeout=1.0)
            # The same request gets the same good answer, however often it failed before.
            return await self.act(outcome, request, body, random.Random(f"{self.script.seed} {name}"))
        finally:
            self.in_flight -= 1

    def draw(self, rng):
        if self.script.max_in_flight is not None and self.in_flight > self.script.max_in_flight:
            self._overrun.set()
            return "429"
        if self._first:
            return self._first.pop(0)
        names = list(self.script.behaviours)
        return rng.choices(names, [self.script.behaviours[name] for name in names])[0]

    async def act(self, outcome, request, body, rng):
        if outcome in ("429", "503"):
            return error(int(outcome), "slow down", "rate_limit_exceeded", self.script.headers)
        if outcome.isdigit():
            return error(int(outcome), f"status {outcome} for {digest(body)[:8]}", None)
        if outcome == "quota":
            return error(429, "You exceeded your current quota, please check your plan", "insufficient_quota")
        if outcome == "context":
            limit = self.script.context_tokens
            return error(
                400, f"This model's maximum context length is {limit} tokens, you asked for more.", "context_length_exceeded"
            )
        if outcome == "hang":
            await asyncio.sleep(3600)
        if outcome == "drop":
            request.transport.close()
            return web.Response()
        if outcome == "html":
            return web.Response(text="<html><body>Bad gateway</body></html>", content_type="text/html")
        if outcome == "empty":
            return web.Response(text="", content_type="application/json")
        reply = self.reply(outcome, body, rng, is_chat=request.path.endswith("/chat/completions"))
        if outcome == "truncated_json":
            return web.Response(text=json.dumps(reply)[:-30], content_type="application/json")
        if outcome == "truncated":
            data = json.dumps(reply).encode()
            response = web.StreamResponse(headers={"content-type": "application/json", "content-length": str(len(data))})
            await response.prepare(request)
            await response.write(data[: len(data) // 2])
            request.transport.close()
            return response
        return web.json_response(reply)

    def reply(self, outcome, body, rng, *, is_chat):
        text, finish = self.text(outcome, body, rng)
        choice = {"index": 0, "finish_reason": finish}
        choice |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        written = pieces(text)
        if body.get("logprobs") and outcome != "no_logprobs":
            choice["logprobs"] = self.logprobs(body, written[: body["max_tokens"]] or [""], is_chat)
        prompt = body["prompt"] if not is_chat else "\n".join(message["content"] for message in body["messages"])
        ids = prompt if isinstance(prompt, list) else [token_id(piece) for piece in pieces(prompt)]
        reply = {
            "id": "x",
            "model": f"{self.script.model}-served",
            "choices": [choice],
            "usage": {
                "prompt_tokens": len(ids),
                "completion_tokens": len(written),
                "prompt_tokens_details": {"cached_tokens": len(ids) // 2},
            },
        }
        if "prompt_logprobs" in body and self.script.flavour == "vllm":
            rows = [None] + [{str(i): {"logprob": -float(i % 7), "rank": 1, "decoded_token": f"t{i}"}} for i in ids[1:]]
            (reply if is_chat else choice).update(prompt_logprobs=rows, prompt_token_ids=ids)
        self.spoil(outcome, reply, choice, is_chat)
        return reply

    def text(self, outcome, body, rng):
        asked = None if outcome == "ignore_constraint" else obedient(body, rng)
        if self._answer is not None and outcome != "ignore_constraint":
            asked = self._answer(body)
        text = asked if asked is not None else "Fires on " + " ".join(rng.choices(WORDS, k=5)) + "."
        if outcome == "prose":
            text = "Certainly! I looked at all of them, and I think that the first one fits best."
        elif outcome == "short_list":
            text = "[1, 0]"
        elif outcome == "thinking":
            return f"<think>Let me see. {text}?</think>\n\n{text}", "stop"
        elif outcome == "endless_thinking":
            return "<think>" + "hmm, " * 20, "length"
        elif outcome == "filtered":
            return "", "content_filter"
        if len(pieces(text)) > body["max_tokens"]:
            return "".join(pieces(text)[: body["max_tokens"]]), "length"
        return text, "stop"

    def logprobs(self, body, written, is_chat):
        known = {piece: value for piece, value in self.script.alternatives}
        if body.get("logprob_token_ids") and self.script.flavour == "vllm":
            by_id = {token_id(piece): value for piece, value in known.items()}
            top = [(f"token_id:{i}", by_id.get(i, -9.0)) for i in body["logprob_token_ids"]]
            rows = [(f"token_id:{token_id(piece)}", known.get(piece, -9.0), top) for piece in written]
        else:
            rows = [(piece, known.get(piece, -9.0), list(known.items())) for piece in written]
        if is_chat:
            entry = lambda piece, value: {"token": piece, "logprob": value, "bytes": None}  # noqa: E731
            return {"content": [entry(p, v) | {"top_logprobs": [entry(a, b) for a, b in top]} for p, v, top in rows]}
        return {
            "tokens": [piece for piece, _, _ in rows],
            "token_logprobs": [value for _, value, _ in rows],
            "top_logprobs": [dict(top) for _, _, top in rows],
        }

    def spoil(self, outcome, reply, choice, is_chat):
        place, field = (choice["message"], "content") if is_chat else (choice, "text")
        if outcome == "no_choices":
            del reply["choices"]
        elif outcome == "empty_choices":
            reply["choices"] = []
        elif outcome == "null_content":
            place[field] = None
        elif outcome == "wrong_type":
            place[field] = {"a": 1}
        elif outcome == "no_message":
            choice.pop("message", None)
            choice.pop("text", None)
        elif outcome == "unknown_finish":
            choice["finish_reason"] = "tired"
        elif outcome == "refusal":
            place[field] = None
            place["refusal"] = "I cannot help with that."
        elif outcome == "reasoning_field":
            place["reasoning_content"] = "Let me think about it for a while."
        elif outcome == "only_reasoning":
            place[field] = None
            place["reasoning_content"] = "Let me think about it for a while."
            choice["finish_reason"] = "length"
        elif outcome == "error_in_ok":
            del reply["choices"]
            reply["error"] = {"message": "upstream failed", "code": 502}
        elif outcome == "aborted":
            choice["finish_reason"] = "abort"


def error(status, message, code, headers=None):
    body = {"error": {"message": message, "type": "error", "code": code}}
    return web.json_response(body, status=status, headers=headers)


@asynccontextmanager
async def serve(script=None, *, record=None, port=0):
    """Run a server in this loop; yields it with `url` set."""
    server = ScriptedServer(script or Script(), record)
    runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield server
    finally:
        await runner.cleanup()
        if server._record:
            server._record.close()


async def run(script, record, port):
    async with serve(script, record=record, port=port) as server:
        print(server.url, flush=True)
        await asyncio.Event().wait()


def main(arguments):
    parser = argparse.ArgumentParser(prog="python -m tests.scripted_server")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--script", type=Path)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args(arguments)
    script = Script(**json.loads(options.script.read_text())) if options.script else Script()
    asyncio.run(run(script, options.record, options.port))


if __name__ == "__main__":
    main(sys.argv[1:])
