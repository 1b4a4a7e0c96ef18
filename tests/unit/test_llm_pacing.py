"""Concurrency, retries, pauses and breakers, on a clock that does not wait."""

import asyncio
import random
from email.utils import formatdate

import pytest

from autointerp.errors import ContextExceeded, EngineStopped, Permanent, RateLimited, ReplyError, Transient
from autointerp.llm.fake import FakeClock
from autointerp.llm.pacing import AdaptiveLimit, Pacer, Unreachable, retry_after_s
from autointerp.llm.settings import EngineConfig


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
        ({"retry-after": formatdate(1_000_030, usegmt=True)}, 30.0),
        ({"retry-after": formatdate(999_000, usegmt=True)}, 0.0),
        ({"retry-after": "-5"}, 0.0),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "tomorrow"}, None),
        ({}, None),
    ],
)
def test_retry_after(headers, seconds):
    assert retry_after_s(headers, 1_000_000.0) == seconds


def limit(start=4, high=100):
    clock = FakeClock()
    return AdaptiveLimit(start=start, high=high, clock=clock), clock


async def full_round(limit, *, use=None):
    """Take as many slots as the limit (or `use`), then let all succeed."""
    rounds = int(limit.value)
    use = rounds if use is None else use
    for _ in range(-(-rounds // use)):
        for _ in range(use):
            await limit.acquire()
        for _ in range(use):
            limit.succeeded(is_first_attempt=True)
            limit.release()


def test_slow_start_doubles_until_the_first_rate_limit_and_then_grows_by_a_twentieth():
    async def main():
        adaptive, clock = limit(start=4)
        await full_round(adaptive)
        assert adaptive.value == 8
        await full_round(adaptive)
        assert adaptive.value == 16
        adaptive.limited()
        assert adaptive.value == pytest.approx(12.8)
        adaptive.limited()
        assert adaptive.value == pytest.approx(12.8), "one cut per 15 s"
        await full_round(adaptive)
        assert adaptive.value == pytest.approx(12.8), "successes while it cools do not count"
        clock.time += 15.1
        await full_round(adaptive)
        assert adaptive.value == pytest.approx(12.8 * 1.05)
        adaptive.limited()
        assert adaptive.value == pytest.approx(12.8 * 1.05 * 0.8)

    asyncio.run(main())


def test_a_limit_grows_only_when_it_is_used():
    async def main():
        adaptive, _ = limit(start=10)
        await full_round(adaptive, use=7)
        assert adaptive.value == 10
        await full_round(adaptive, use=8)
        assert adaptive.value == 20

    asyncio.run(main())


def test_failures_and_retried_successes_void_or_miss_the_round_but_never_cut():
    async def main():
        adaptive, _ = limit(start=4)
        for _ in range(4):
            await adaptive.acquire()
        for _ in range(3):
            adaptive.succeeded(is_first_attempt=True)
        adaptive.failed()
        adaptive.succeeded(is_first_attempt=True)
        for _ in range(8):
            adaptive.succeeded(is_first_attempt=False)
        assert adaptive.value == 4
        for _ in range(3):
            adaptive.succeeded(is_first_attempt=True)
        assert adaptive.value == 8

    asyncio.run(main())


def test_a_limit_stays_within_its_bounds():
    async def main():
        adaptive, clock = limit(start=4, high=6)
        await full_round(adaptive)
        assert adaptive.value == 6
        for _ in range(30):
            adaptive.limited()
            clock.time += 16
        assert adaptive.value == 1

    asyncio.run(main())


def test_slots_are_given_in_order_and_cancelled_waiters_leave_none_behind():
    async def main():
        adaptive, _ = limit(start=1, high=1)
        order = []

        async def work(name):
            await adaptive.acquire()
            try:
                order.append(name)
                await asyncio.sleep(0)
            finally:
                adaptive.release()

        tasks = [asyncio.ensure_future(work(name)) for name in "abcd"]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == ["a", "c", "d"] and adaptive.load == 0

    asyncio.run(main())


def pacer(endpoints=("a",), **settings):
    clock = FakeClock()
    config = EngineConfig(**settings)
    return Pacer({name: name for name in endpoints}, config, clock=clock, rng=random.Random(0)), clock


def script(*answers):
    """Return a send that gives these answers, the last one for ever, and the list of targets it was called with."""
    left, seen = list(answers), []

    async def send(target):
        seen.append(target)
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return send, seen


def run(pacer, send, **options):
    return asyncio.run(pacer.call(send, **options))


def test_transient_failures_are_retried_with_growing_jittered_waits():
    one, clock = pacer(backoff_s=1.0, max_attempts=6)
    send, seen = script(*[Transient("x")] * 4, "ok")
    assert run(one, send) == "ok" and len(seen) == 5
    assert all(0 <= wait <= 2.0**i for i, wait in enumerate(clock.sleeps)) and len(set(clock.sleeps)) == 4
    assert one.counters.retries == 4 and one.counters.failures == 4


def test_attempts_end():
    one, _ = pacer(max_attempts=3)
    send, seen = script(Transient("still down"))
    with pytest.raises(Transient, match="still down"):
        run(one, send)
    assert len(seen) == 3


@pytest.mark.parametrize("error", [Permanent("no"), ContextExceeded("long"), ReplyError("odd"), EngineStopped("key")])
def test_what_cannot_succeed_is_not_retried(error):
    one, clock = pacer()
    send, seen = script(error)
    with pytest.raises(type(error), match=str(error)):
        run(one, send)
    assert len(seen) == 1 and clock.sleeps == []


def test_a_stopped_engine_sends_nothing_more():
    async def main():
        one, _ = pacer()
        bad, _ = script(EngineStopped("bad key"))
        good, seen = script("ok")
        with pytest.raises(EngineStopped, match="bad key"):
            await one.call(bad)
        with pytest.raises(EngineStopped, match="bad key"):
            await one.call(good)
        assert seen == []

    asyncio.run(main())


def test_retry_after_pauses_everyone_who_asks_that_server():
    async def main():
        one, clock = pacer(start_concurrency=8)
        start = clock.time
        times = []

        async def limited_once(target):
            times.append(clock.time - start)
            if len(times) == 1:
                raise RateLimited("slow", retry_after_s=20)
            return "ok"

        await asyncio.gather(*(one.call(limited_once) for _ in range(1)))
        await asyncio.gather(*(one.call(limited_once) for _ in range(3)))
        assert times[0] == 0 and all(20 <= time <= 25 for time in times[1:])

    asyncio.run(main())


def test_rate_limits_do_not_use_up_attempts():
    one, _ = pacer(max_attempts=2)
    send, seen = script(*[RateLimited("slow", retry_after_s=1)] * 30, "ok")
    assert run(one, send) == "ok" and len(seen) == 31


def test_a_server_that_refuses_for_ever_stops_the_run():
    one, clock = pacer(max_wait_s=100)
    start = clock.time
    send, _ = script(RateLimited("slow down please"))
    with pytest.raises(EngineStopped, match="slow down please"):
        run(one, send)
    assert 200 <= clock.time - start < 400


def test_a_wait_of_hours_stops_the_run():
    one, clock = pacer(max_wait_s=900)
    send, seen = script(RateLimited("daily limit", retry_after_s=7200))
    with pytest.raises(EngineStopped, match=r"daily limit; that is longer than max_wait_s = 900"):
        run(one, send)
    assert len(seen) == 1 and clock.sleeps == []


def test_a_dead_server_stops_the_run_and_marks_nothing_failed():
    async def main():
        one, clock = pacer(stop_after_s=60, max_attempts=3)
        start = clock.time
        send, _ = script(Unreachable("http://x cannot be reached"))
        results = await asyncio.gather(*(one.call(send) for _ in range(20)), return_exceptions=True)
        assert all(isinstance(result, EngineStopped) for result in results)
        assert "http://x cannot be reached" in str(results[0]) and "finished work is kept" in str(results[0])
        assert clock.time - start >= 60

    asyncio.run(main())


def test_failing_requests_stop_the_run_after_many_in_a_row_over_some_time():
    async def main():
        one, clock = pacer(stop_after_failures=10, stop_after_s=30, max_attempts=4, start_concurrency=1, concurrency=1)
        send, seen = script(Transient("500"))
        results = []
        while not results or not isinstance(results[-1], EngineStopped):
            results += await asyncio.gather(one.call(send), return_exceptions=True)
            clock.time += 5
        assert len(seen) >= 10 and len(results) < 12

    asyncio.run(main())


def test_one_success_closes_the_row():
    async def main():
        one, clock = pacer(stop_after_failures=4, stop_after_s=1, max_attempts=4)
        for _ in range(20):
            send, _ = script(*[Transient("500")] * 3, "ok")
            assert await one.call(send) == "ok"
            clock.time += 100

    asyncio.run(main())


def test_a_refusal_shows_that_the_server_works():
    async def main():
        one, clock = pacer(stop_after_failures=4, stop_after_s=1, max_attempts=4)
        for _ in range(20):
            send, _ = script(*[Transient("500")] * 3, Permanent("bad field"))
            with pytest.raises(Permanent, match="bad field"):
                await one.call(send)
            clock.time += 100

    asyncio.run(main())


def test_an_impatient_call_gives_up_on_a_server_that_is_not_there():
    one, _ = pacer(max_attempts=3)
    send, seen = script(Unreachable("nobody"))
    with pytest.raises(Unreachable, match="nobody"):
        run(one, send, is_patient=False)
    assert len(seen) == 3


def test_retries_beyond_their_share_of_the_traffic_wait_longest():
    async def main():
        one, clock = pacer(retry_frac=0.125, backoff_s=0.001, backoff_cap_s=30, max_attempts=2, stop_after_failures=10**6)
        send, _ = script(Transient("500"))
        await asyncio.gather(*(one.call(send) for _ in range(40)), return_exceptions=True)
        # 10 are free and 40 requests earn 5 more: 15 short waits, 25 long ones.
        assert sum(wait == 30 for wait in clock.sleeps) == 25 and len(clock.sleeps) == 40

    asyncio.run(main())


def test_servers_share_the_load_and_a_retry_goes_elsewhere():
    async def main():
        two, _ = pacer(("a", "b"), start_concurrency=4)
        send, seen = script("ok")

        async def slow(target):
            await asyncio.sleep(0)
            return await send(target)

        await asyncio.gather(*(two.call(slow) for _ in range(8)))
        assert sorted(seen) == ["a"] * 4 + ["b"] * 4
        failing, seen = script(Transient("x"), "ok")
        await two.call(failing)
        assert sorted(seen) == ["a", "b"]

    asyncio.run(main())


def test_a_dead_server_among_two_is_left_alone_and_tried_again_later():
    async def main():
        two, clock = pacer(("a", "b"), stop_after_s=10, backoff_s=4)
        seen = []
        dead = {"a"}

        async def send(target):
            seen.append(target)
            await asyncio.sleep(0)
            if target in dead:
                raise Unreachable(f"{target} is dead")
            return target

        results = []
        for _ in range(40):
            results += await asyncio.gather(*(two.call(send) for _ in range(4)))
            clock.time += 1
        assert set(results) == {"b"}
        assert 1 <= seen[-40:].count("a") <= 6
        dead.clear()
        clock.time += 60
        results = [await two.call(send) for _ in range(4)]
        assert "a" in results

    asyncio.run(main())


def test_never_more_in_flight_than_the_ceiling():
    async def main():
        one, _ = pacer(start_concurrency=2, concurrency=5)
        now = peak = 0

        async def send(target):
            nonlocal now, peak
            now += 1
            peak = max(peak, now)
            await asyncio.sleep(0)
            now -= 1

        await asyncio.gather(*(one.call(send) for _ in range(200)))
        assert peak == 5

    asyncio.run(main())
