"""The server engine over real HTTP, against a local server that misbehaves by script."""

import asyncio
import json
import logging
import random
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from autointerp.errors import (
    ConfigError,
    ContextExceeded,
    EngineStopped,
    Permanent,
    ReplyError,
    Transient,
)
from autointerp.llm import EngineConfig, LoggedEngine, ReplyLog, check_constraint, conforms, open_engine, prepare
from autointerp.llm.fake import FakeClock
from autointerp.llm.openai import OpenAIEngine
from autointerp.records import (
    Chat,
    Choice,
    JsonSchema,
    PromptLogprobs,
    Regex,
    Request,
    Text,
    TokenIds,
)
from tests.scripted_server import Script, serve

CHAT = Chat(messages=(("user", "What is it?"),))
ASK = Request(prompt=CHAT)
LIST = JsonSchema(schema='{"type":"array","items":{"enum":[0,1]},"minItems":5,"maxItems":5}')
OBJECT = JsonSchema(
    schema='{"type":"object","properties":{"why":{"type":"string","maxLength":40},"n":{"type":"integer"}},"required":["why","n"]}'
)
ROOT = Path(__file__).parents[2]


def against(script, test, **settings):
    """Run ``test(engine, server)`` with an engine whose waits take no time."""

    async def main():
        async with serve(script) as server:
            engine = OpenAIEngine(
                model="scripted", urls=[server.url], config=EngineConfig(**settings), clock=FakeClock(), rng=random.Random(0)
            )
            try:
                return await test(engine, server)
            finally:
                await engine.aclose()
                await engine.aclose()

    return asyncio.run(main())


def ask(number, **changes):
    return Request(prompt=Chat(messages=(("user", f"question {number}"),)), **changes)


def test_prepare_finds_the_dialect_and_the_context():
    async def test(engine, server):
        await engine.prepare()
        return engine.flavour, engine.context_tokens, engine.capabilities.prompt_logprobs

    assert against(Script(flavour="vllm"), test) == ("vllm", 8192, True)
    assert against(Script(flavour="openai"), test) == ("openai", None, False)
    assert against(Script(flavour="openai"), test, flavour="vllm", context_tokens=100) == ("vllm", 100, True)


def test_prepare_refuses_what_cannot_work(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-wrong-key-123456")

    async def test(engine, server):
        await engine.prepare()

    with pytest.raises(ConfigError, match=r"has no model 'scripted'; it has: other"):
        against(Script(model="other"), test)
    with pytest.raises(EngineStopped, match=r"401.*\[key\].*check the key") as caught:
        against(Script(key="right"), test, api_key_env="MY_KEY")
    assert "sk-wrong" not in str(caught.value)
    monkeypatch.setenv("MY_KEY", "right")
    against(Script(key="right"), test, api_key_env="MY_KEY")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_no_server_is_one_sentence():
    async def main():
        url = f"http://127.0.0.1:{free_port()}/v1"
        engine = OpenAIEngine(model="m", urls=[url], config=EngineConfig(max_attempts=2), clock=FakeClock())
        with pytest.raises(EngineStopped, match=r"cannot be reached; start the server, or correct the address"):
            await prepare(engine)
        await engine.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("flavour", ["vllm", "openai"])
def test_constraints_hold_in_both_dialects(flavour):
    async def test(engine, server):
        await check_constraint(engine)
        for prompt in (CHAT, Text(text="It is")):
            for constraint in (Choice(options=("yes", "no")), Regex(pattern="[01]{3}"), LIST, OBJECT):
                reply = await engine.complete(Request(prompt=prompt, constraint=constraint))
                assert conforms(constraint, reply.text), reply
        assert engine.num_violations == 0

    against(Script(flavour=flavour), test)


def test_ignored_constraints_are_found_out_and_counted():
    async def test(engine, server):
        with pytest.raises(ConfigError, match="ignores output constraints"):
            await check_constraint(engine)
        reply = await engine.complete(Request(prompt=CHAT, constraint=LIST))
        assert reply.text.startswith("Fires on") and engine.num_violations == 2

    against(Script(behaviours={"ignore_constraint": 1}), test)


@pytest.mark.parametrize("flavour", ["vllm", "openai"])
def test_labels_come_as_probabilities(flavour):
    async def test(engine, server):
        for prompt in (CHAT, Text(text="It is")):
            reply = await engine.complete(Request(prompt=prompt, labels=("Yes", "No"), max_tokens=1))
            # e^-0.3 + e^-2 = 0.876153 for "Yes" and " Yes"; "Yesterday" is another word; e^-2.5 = 0.082085
            assert reply.label_probs == pytest.approx((0.876153, 0.082085), abs=3e-3)
            assert reply.label_mass == pytest.approx(sum(reply.label_probs))
        asked = [entry["body"] for entry in server.requests]
        await asyncio.gather(*(engine.complete(ask(i, labels=("a", "b"), max_tokens=1)) for i in range(9)))
        assert server.num_tokenized == (32 if flavour == "vllm" else 0), "8 spellings of 4 labels, once each"
        assert all(("logprob_token_ids" in body) == (flavour == "vllm") for body in asked)

    against(Script(flavour=flavour), test)


def test_a_server_that_ignores_label_ids_is_read_by_text():
    async def test(engine, server):
        reply = await engine.complete(Request(prompt=CHAT, labels=("Yes", "No"), max_tokens=1))
        assert reply.label_probs == pytest.approx((0.876153, 0.082085), abs=1e-5)
        await engine.complete(Request(prompt=Text(text="x"), labels=("Yes", "No"), max_tokens=1))
        assert ["logprob_token_ids" in entry["body"] for entry in server.requests] == [True, False, False]

    async def main():
        async with serve(Script()) as server:
            logprobs = server.logprobs
            server.logprobs = lambda body, *rest: logprobs({k: v for k, v in body.items() if k != "logprob_token_ids"}, *rest)
            engine = OpenAIEngine(model="scripted", urls=[server.url], clock=FakeClock())
            await test(engine, server)
            await engine.aclose()

    asyncio.run(main())


def test_prompt_logprobs_and_tokens():
    async def test(engine, server):
        ids = await engine.tokenize("It is a word")
        assert len(ids) == 4
        ask = Request(prompt=TokenIds(ids=ids), max_tokens=0, prompt_logprobs=PromptLogprobs(start=1))
        reply = await engine.complete(ask)
        assert [token.token_id for token in reply.prompt_tokens] == list(ids[1:]) and reply.text == ""
        ask = Request(prompt=TokenIds(ids=ids), max_tokens=0, prompt_logprobs=PromptLogprobs(start=1, top=1, at=(2,)))
        reply = await engine.complete(ask)
        assert [len(token.top) for token in reply.prompt_tokens] == [0, 1, 0]
        reply = await engine.complete(Request(prompt=CHAT, max_tokens=3, top_logprobs=2))
        assert len(reply.tokens) == 3 and all(len(token.top) == 2 for token in reply.tokens)

    against(Script(), test)

    async def refuses(engine, server):
        for call in (engine.tokenize("x"), engine.complete(Request(prompt=CHAT, prompt_logprobs=PromptLogprobs()))):
            with pytest.raises(Permanent, match="use a vLLM server"):
                await call

    against(Script(flavour="openai"), refuses)


@pytest.mark.parametrize(
    "trouble", ["429", "503", "500", "502", "drop", "truncated", "truncated_json", "html", "empty", "aborted", "error_in_ok"]
)
def test_passing_trouble_is_waited_out(trouble):
    async def test(engine, server):
        reply = await engine.complete(ASK)
        assert reply.text.startswith("Fires on")
        assert Counter(entry["outcome"] for entry in server.requests) == {trouble: 3, "ok": 1}
        limited = trouble in ("429", "503")
        assert engine.pacer.counters.rate_limits == (3 if limited else 0)
        assert engine.pacer.counters.failures == (0 if limited else 3)

    against(Script(first=[trouble] * 3), test)


@pytest.mark.parametrize("trouble", ["500", "drop", "truncated", "truncated_json", "html", "empty"])
def test_lasting_trouble_is_an_error_and_never_a_reply(trouble):
    async def test(engine, server):
        with pytest.raises(Transient):
            await engine.complete(ASK)
        assert len(server.requests) == 3

    against(Script(behaviours={trouble: 1}), test, max_attempts=3)


@pytest.mark.parametrize(
    ("trouble", "kind", "message"),
    [
        ("400", Permanent, "answered 400"),
        ("422", Permanent, "answered 422"),
        ("context", ContextExceeded, "maximum context length is 8192"),
        ("401", EngineStopped, "check the key"),
        ("402", EngineStopped, "quota is spent"),
        ("403", EngineStopped, "check the key"),
        ("404", EngineStopped, "check the model's name"),
        ("quota", EngineStopped, "quota is spent"),
        ("no_choices", ReplyError, "no choices"),
        ("empty_choices", ReplyError, "no choices"),
        ("null_content", ReplyError, "no content"),
        ("wrong_type", ReplyError, "content of type dict"),
        ("no_message", ReplyError, "no message"),
        ("unknown_finish", ReplyError, "finish_reason 'tired'"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(trouble, kind, message):
    async def test(engine, server):
        with pytest.raises(kind, match=message):
            await engine.complete(ASK)
        assert len(server.requests) == 1
        if kind is EngineStopped:
            with pytest.raises(EngineStopped, match=message):
                await engine.complete(ask(2))
            assert len(server.requests) == 1

    against(Script(behaviours={trouble: 1}), test)


def test_thinking_refusals_and_filters():
    async def test(engine, server):
        replies = [await engine.complete(ask(i)) for i in range(6)]
        thinking, endless, filtered, refusal, reasoning, only = replies
        assert thinking.text.startswith("Fires on") and 0 < thinking.usage.reasoning_tokens < thinking.usage.output_tokens
        assert (endless.text, endless.finish) == ("", "length")
        assert endless.usage.reasoning_tokens == endless.usage.output_tokens > 0
        assert (filtered.text, filtered.finish) == ("", "filter")
        assert (refusal.text, refusal.finish) == ("I cannot help with that.", "filter")
        assert reasoning.text.startswith("Fires on") and reasoning.usage.reasoning_tokens > 0
        assert (only.text, only.finish) == ("", "length") and only.usage.reasoning_tokens > 0

    against(Script(first=["thinking", "endless_thinking", "filtered", "refusal", "reasoning_field", "only_reasoning"]), test)


def test_no_logprobs_is_an_error_and_never_a_probability():
    async def test(engine, server):
        with pytest.raises(Permanent, match="no log-probabilities"):
            await engine.complete(Request(prompt=CHAT, labels=("Yes",), max_tokens=1))

    against(Script(behaviours={"no_logprobs": 1}), test)


def test_retry_after_is_obeyed():
    async def test(engine, server):
        start = engine._clock.now()
        await engine.complete(ASK)
        assert 7 <= engine._clock.now() - start <= 8

    against(Script(first=["429"], headers={"retry-after": "7"}), test)


def test_a_hanging_server_times_out():
    async def test(engine, server):
        assert (await engine.complete(ASK)).text.startswith("Fires on")
        assert [entry["outcome"] for entry in server.requests] == ["hang", "ok"]

    against(Script(first=["hang"]), test, timeout_s=0.3)


def test_concurrency_finds_the_servers_limit():
    async def test(engine, server):
        replies = await asyncio.gather(*(engine.complete(ask(i)) for i in range(400)))
        assert len(replies) == 400 and len(server.requests) - 400 == engine.pacer.counters.rate_limits > 0
        assert engine.pacer.endpoints[0].limit.value < 64

    against(Script(max_in_flight=20), test, start_concurrency=4, concurrency=64)


def test_a_server_that_dies_stops_the_run_in_a_sentence():
    async def main():
        async with serve() as server:
            engine = OpenAIEngine(model="scripted", urls=[server.url], clock=FakeClock())
            await engine.complete(ASK)
        results = await asyncio.gather(*(engine.complete(ask(i)) for i in range(30)), return_exceptions=True)
        assert all(isinstance(result, EngineStopped) for result in results)
        assert "stopped answering" in str(results[0])
        await engine.aclose()

    asyncio.run(main())


def test_two_servers_share_the_work_and_one_may_die():
    async def main():
        async with serve() as one:
            async with serve() as two:
                engine = OpenAIEngine(model="scripted", urls=[one.url, two.url], clock=FakeClock())
                await asyncio.gather(*(engine.complete(ask(i)) for i in range(40)))
                assert len(one.requests) + len(two.requests) == 40 and min(len(one.requests), len(two.requests)) >= 10
                before = len(one.requests)
            replies = await asyncio.gather(*(engine.complete(ask(i)) for i in range(40, 80)))
            assert len(replies) == 40 and len(one.requests) == before + 40
            await engine.aclose()

    asyncio.run(main())


def test_refused_fields_are_left_out():
    async def main():
        async with serve(Script(flavour="openai")) as server:
            good = server.act

            async def picky(outcome, request, body, rng):
                for field, advice in (
                    ("max_tokens", "Use 'max_completion_tokens' instead."),
                    ("temperature", "Only the default."),
                ):
                    if field in body:
                        from tests.scripted_server import error

                        return error(
                            400, f"Unsupported parameter: '{field}' is not supported with this model. {advice}", "unsupported"
                        )
                return await good(outcome, request, body | {"max_tokens": body["max_completion_tokens"]}, rng)

            server.act = picky
            engine = OpenAIEngine(model="scripted", urls=[server.url], clock=FakeClock())
            assert (await engine.complete(ASK)).text.startswith("Fires on")
            assert (await engine.complete(ask(2))).text.startswith("Fires on")
            assert len(server.requests) == 4
            await engine.aclose()

    asyncio.run(main())


def test_keys_reach_no_log(caplog, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-hush-hush-hush-42")
    caplog.set_level(logging.DEBUG)

    async def test(engine, server):
        for i in range(3):
            await asyncio.gather(engine.complete(ask(i)), return_exceptions=True)

    against(Script(key="sk-hush-hush-hush-42", first=["500", "400"]), test, api_key_env="MY_KEY")
    assert "hush-hush" not in caplog.text


def process(tmp_path, script):
    (tmp_path / "script.json").write_text(json.dumps(script))
    record = tmp_path / "requests.jsonl"
    command = [
        sys.executable,
        "-m",
        "tests.scripted_server",
        "--script",
        str(tmp_path / "script.json"),
        "--record",
        str(record),
    ]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True), record


def test_a_mix_of_troubles_loses_and_doubles_nothing(tmp_path):
    """The server's own record: every good answer was used, no request was paid twice, failures add up."""
    mix = {"ok": 0.6, "429": 0.1, "503": 0.05, "500": 0.1, "drop": 0.05, "truncated": 0.05, "empty": 0.05}
    server, record = process(tmp_path, {"seed": 3, "behaviours": mix, "latency_s": [0, 0.002]})

    async def main(url):
        settings = EngineConfig(backoff_s=0.001, backoff_cap_s=0.01, max_attempts=30, concurrency=16)
        engine = open_engine(f"openai:scripted@{url}", settings)
        logged = LoggedEngine(engine, ReplyLog(tmp_path / "log"))
        replies = await asyncio.gather(*(logged.complete(ask(i % 100)) for i in range(200)))
        again = await asyncio.gather(*(logged.complete(ask(i)) for i in range(100)))
        await logged.aclose()
        await engine.aclose()
        assert replies[:100] == replies[100:] == again
        assert (logged.counters.sent, logged.counters.shared, logged.counters.hits) == (100, 100, 100)
        return engine.pacer.counters

    try:
        counters = asyncio.run(main(server.stdout.readline().strip()))
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    entries = [json.loads(line) for line in record.read_text().splitlines()]
    good = Counter(json.dumps(entry["body"]) for entry in entries if entry["outcome"] == "ok")
    assert len(good) == 100 and set(good.values()) == {1}
    assert (
        len(entries) == counters.attempts - 1 == 100 + counters.rate_limits + counters.failures
    )  # one attempt asked for the models
