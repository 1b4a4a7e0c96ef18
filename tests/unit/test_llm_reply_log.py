"""Replies on disk: what survives, what is dropped, what is never paid twice."""

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from autointerp.digest import digest
from autointerp.errors import EngineStopped, Transient
from autointerp.llm import Budget, BudgetReached, FakeEngine, LoggedEngine, Prices, ReplyLog
from autointerp.llm.budget import cost_of
from autointerp.llm.reply_log import reply_from_json, reply_to_json, request_key
from autointerp.records import (
    Chat,
    Choice,
    EngineId,
    PromptLogprobs,
    Regex,
    Reply,
    Request,
    Text,
    TokenIds,
    TokenLogprob,
    Usage,
)


def ask(text="hi", **changes):
    return Request(prompt=Chat(messages=(("user", text),)), **changes)


FULL = Reply(
    text='a "quoted"\n\u00e9 \U0001f600 line',
    finish="length",
    tokens=(TokenLogprob(token="a", token_id=5, logprob=-0.1, top=(("a", -0.1), ("b", -9999.0))),),
    prompt_tokens=(TokenLogprob(token="x", token_id=1, logprob=None),),
    label_probs=(0.1, 1e-300),
    label_mass=0.1,
    usage=Usage(prompt_tokens=3, cached_tokens=2, output_tokens=1, reasoning_tokens=1),
    served_model="m-2024",
)


def key(i):
    return f"sha256:{i:064x}"


def test_a_reply_survives_the_log_whole(tmp_path):
    assert reply_from_json(reply_to_json(FULL)) == FULL
    with ReplyLog(tmp_path / "deep" / "shard.jsonl") as log:
        log.append(key(1), FULL)
        assert log.get(key(1)) == replace(FULL, request_id=key(1))
    with ReplyLog(tmp_path / "deep" / "shard.jsonl") as log:
        assert log.get(key(1)) == replace(FULL, request_id=key(1))
        assert key(2) not in log and log.get(key(2)) is None


def test_a_last_line_torn_at_any_byte_is_dropped(tmp_path):
    whole = tmp_path / "whole"
    with ReplyLog(whole) as log:
        log.append(key(1), FULL)
        end = whole.stat().st_size
        log.append(key(2), FULL)
    data = whole.read_bytes()
    for cut in range(end, len(data)):
        path = tmp_path / "torn"
        path.write_bytes(data[:cut])
        with ReplyLog(path) as log:
            assert (len(log), log.dropped_bytes) == (1, cut - end)
            log.append(key(3), FULL)
        with ReplyLog(path) as log:
            assert len(log) == 2 and log.dropped_bytes == 0
        path.unlink()


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_damaged_byte_loses_its_line_only(tmp_path, where):
    path = tmp_path / "log"
    with ReplyLog(path) as log:
        log.append(key(1), FULL)
        middle = path.stat().st_size
        log.append(key(2), FULL)
    data = bytearray(path.read_bytes())
    at = (middle if where == "last" else 0) + 100
    data[at] ^= 1
    path.write_bytes(data)
    with ReplyLog(path) as log:
        assert len(log) == 1 and log.num_damaged == 1
        assert (key(2) in log) is (where == "first")
        assert (log.dropped_bytes > 0) is (where == "last")


def test_keys_know_every_field_that_can_change_an_answer():
    engine = EngineId(kind="openai", model="m")
    base = Request(prompt=Text(text="a"))
    variants = [
        base,
        Request(prompt=Text(text="b")),
        Request(prompt=Chat(messages=(("user", "a"),))),
        Request(prompt=Chat(messages=(("system", "a"),))),
        Request(prompt=TokenIds(ids=(1, 2))),
        replace(base, max_tokens=65),
        replace(base, temperature=0.5),
        replace(base, top_p=0.5),
        replace(base, stop=("x",)),
        replace(base, seed=0),
        replace(base, constraint=Choice(options=("a",))),
        replace(base, constraint=Regex(pattern="a")),
        replace(base, labels=("a",)),
        replace(base, top_logprobs=1),
        replace(base, prompt_logprobs=PromptLogprobs()),
        replace(base, sample=1),
    ]
    keys = [request_key(engine, variant) for variant in variants]
    keys += [request_key(replace(engine, **{name: "x"}), base) for name in ("revision", "quantization", "template_digest")]
    keys += [request_key(engine, base, {"reasoning_effort": "low"})]
    assert len(set(keys)) == len(keys)
    assert request_key(engine, replace(base)) == keys[0] == request_key(engine, base, {})


def test_keys_are_those_of_every_field_written_out():
    """What is in a log stays found: the digest is of all fields, records within records included."""
    engine = EngineId(kind="openai", model="m", revision="r")
    slots = PromptLogprobs(start=1, top=3, at=(1, 2))
    for request in (
        Request(prompt=TokenIds(ids=(1, 2, 3)), prompt_logprobs=slots, max_tokens=0),
        Request(prompt=Chat(messages=(("system", "é"), ("user", "b"))), constraint=Choice(options=("a", "b")), stop=("x",)),
    ):
        body = asdict(request)
        body["prompt"]["kind"] = type(request.prompt).__name__
        if request.constraint is not None:
            body["constraint"]["kind"] = type(request.constraint).__name__
        assert request_key(engine, request) == digest({"v": 1, "engine": asdict(engine), "request": body, "extra": {}})


def test_a_reply_is_fetched_once_and_read_after(tmp_path):
    async def main():
        fake = FakeEngine(lambda request: "yes", max_delay_s=0.01)
        engine = LoggedEngine(fake, ReplyLog(tmp_path / "log"))
        first = await asyncio.gather(*(engine.complete(ask()) for _ in range(5)))
        assert len({reply.request_id for reply in first}) == 1 and first[0].request_id == engine.key(ask())
        assert (engine.counters.sent, engine.counters.shared, engine.counters.hits) == (1, 4, 0)
        assert await engine.complete(ask()) == first[0]
        await engine.complete(ask(sample=1))
        assert (engine.counters.sent, engine.counters.hits, len(fake.requests)) == (2, 1, 2)
        await engine.aclose()
        await engine.aclose()
        again = LoggedEngine(fake, ReplyLog(tmp_path / "log"))
        assert await again.complete(ask()) == first[0]
        assert (again.counters.sent, again.counters.hits, len(fake.requests)) == (0, 1, 2)
        assert again.counters.usage == Usage()
        await again.aclose()

    asyncio.run(main())


def test_errors_are_not_stored(tmp_path):
    answers = [Transient("down"), "up"]

    async def main():
        engine = LoggedEngine(FakeEngine(lambda request: answers.pop(0)), ReplyLog(tmp_path / "log"))
        with pytest.raises(Transient, match="down"):
            await engine.complete(ask())
        assert len(engine.log) == 0 and engine.counters.failures == 1
        assert (await engine.complete(ask())).text == "up"
        await engine.aclose()

    asyncio.run(main())


def test_one_callers_end_does_not_take_the_reply_from_the_others(tmp_path):
    async def main():
        fake = FakeEngine(lambda request: "yes", max_delay_s=0.2)
        engine = LoggedEngine(fake, ReplyLog(tmp_path / "log"))
        one, two = (asyncio.ensure_future(engine.complete(ask())) for _ in range(2))
        await asyncio.sleep(0)
        one.cancel()
        assert (await two).text == "yes"
        with pytest.raises(asyncio.CancelledError):
            await one
        alone = asyncio.ensure_future(engine.complete(ask("other")))
        await asyncio.sleep(0.001)
        alone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await alone
        assert (await engine.complete(ask("other"))).text == "yes"
        assert len(engine.log) == 2 and fake.in_flight == 0
        await engine.aclose()

    asyncio.run(main())


def test_limits_stop_before_sending(tmp_path):
    async def main():
        fake = FakeEngine(lambda request: Reply(text="x", finish="stop", usage=Usage(prompt_tokens=100, output_tokens=10)))
        budget = Budget(max_requests=2)
        one, two = (LoggedEngine(fake, ReplyLog(tmp_path / name), budget) for name in "ab")
        await one.complete(ask("1"))
        await two.complete(ask("2"))
        with pytest.raises(BudgetReached, match="max_requests = 2") as caught:
            await one.complete(ask("3"))
        assert isinstance(caught.value, EngineStopped) and len(fake.requests) == 2
        assert (await one.complete(ask("1"))).text == "x", "a hit is free"
        # 100 tokens at 1 + 10 at 10 per million = 200e-6 a reply; the next is estimated at 8 + 64 * 10 = 648e-6.
        priced = LoggedEngine(fake, ReplyLog(tmp_path / "c"), Budget(prices=Prices(input=1, output=10), max_cost=900e-6))
        for text in "12":
            await priced.complete(ask(text))
        assert priced.budget.cost == pytest.approx(400e-6) and priced.budget.reserved == 0
        with pytest.raises(BudgetReached, match="max_cost"):
            await priced.complete(ask("3"))
        assert len(fake.requests) == 4
        for engine in (one, two, priced):
            await engine.aclose()

    asyncio.run(main())


def test_what_is_in_flight_is_reserved(tmp_path):
    async def main():
        fake = FakeEngine(lambda request: "x", max_delay_s=0.01)
        engine = LoggedEngine(fake, ReplyLog(tmp_path / "log"), Budget(prices=Prices(output=1e6), max_cost=200.0))
        results = await asyncio.gather(*(engine.complete(ask(str(i))) for i in range(5)), return_exceptions=True)
        assert sum(isinstance(result, BudgetReached) for result in results) == 2, "64 each: three fit into 200"
        await engine.aclose()

    asyncio.run(main())


def test_cached_tokens_have_their_own_price():
    usage = Usage(prompt_tokens=1_000_000, cached_tokens=400_000, output_tokens=100_000)
    assert cost_of(usage, Prices(input=1.0, cached=0.1, output=6.0)) == pytest.approx(0.6 + 0.04 + 0.6)
    assert cost_of(usage, Prices(input=1.0)) == pytest.approx(1.0)


WRITER = """
import asyncio, sys
from autointerp.llm import FakeEngine, LoggedEngine, ReplyLog
from autointerp.records import Request, Text
async def main():
    engine = LoggedEngine(FakeEngine(lambda request: request.prompt.text), ReplyLog(sys.argv[1]))
    for i in range(10**9):
        await engine.complete(Request(prompt=Text(text=str(i))))
        print(i, flush=True)
asyncio.run(main())
"""


def test_a_reply_that_was_used_survives_sigkill(tmp_path):
    path = tmp_path / "log"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 200:
                os.kill(process.pid, signal.SIGKILL)
                break
        used = 200 + sum(1 for line in process.stdout if line.endswith("\n"))
    with ReplyLog(path) as log:
        assert used < len(log) <= used + 2
