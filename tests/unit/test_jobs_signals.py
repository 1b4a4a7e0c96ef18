"""Clean stops, running inside a loop that exists already, keys kept out of texts, and the gate's bounds."""

import asyncio
import os
import signal
import threading
import time

import jobs_standins as standins
import pytest

from autointerp.errors import EngineStopped
from autointerp.jobs.gate import Gate, GatedEngine, Meter, Stop
from autointerp.jobs.progress import Progress, span
from autointerp.jobs.redact import redact, redacted
from autointerp.jobs.signals import StopFlag, listening, run_sync
from autointerp.llm.budget import Budget
from autointerp.llm.settings import Prices
from autointerp.records import Chat, Request


def request(i=0):
    return Request(prompt=Chat(messages=(("user", f"question {i}"),)), max_tokens=10)


def test_run_sync_inside_a_loop():
    async def outer():
        async def inner(stop):
            await asyncio.sleep(0)
            return 5

        return run_sync(inner)

    assert asyncio.run(outer()) == 5


def test_run_sync_passes_errors_on():
    async def inner(stop):
        raise EngineStopped("gone")

    with pytest.raises(EngineStopped, match="gone"):
        run_sync(inner)


def test_a_signal_sets_the_flag_and_the_second_does_not():
    before = signal.getsignal(signal.SIGUSR1)
    flag, reasons = StopFlag(), []
    flag.connect(reasons.append)
    with listening(flag):
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 5
        while not reasons and time.monotonic() < deadline:
            time.sleep(0.01)
        assert reasons == ["SIGUSR1"]
        assert signal.getsignal(signal.SIGUSR1) == before
    late = []
    flag.connect(late.append)
    assert late == ["SIGUSR1"]
    flag.request("SIGINT")
    assert flag.reason == "SIGUSR1"


def test_other_threads_leave_signals_alone():
    handlers = []

    def work():
        with listening(StopFlag()):
            handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [before]


def test_redaction(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "abc123def456")
    assert redact("Authorization: Bearer abc.DEF-123456") == "Authorization: Bearer [redacted]"
    assert redact("key sk-proj-123456789 and hf_abcdefgh") == "key sk-[redacted] and hf_[redacted]"
    assert redact("https://me:secret@host/v1") == "https://[redacted]@host/v1"
    assert redact("it said abc123def456!") == "it said [redacted]!"
    assert redact("the word task-oriented stays") == "the word task-oriented stays"
    assert redacted({"a": ["sk-123456789", 3], "b": None}) == {"a": ["sk-[redacted]", 3], "b": None}


def test_a_closed_gate_lets_nothing_out():
    async def run():
        engine = standins.engine()
        gate = Gate(engine, concurrency=2)
        meter = Meter()
        gated = GatedEngine(gate, meter)
        assert (await gated.complete(request(1))).text.startswith("answer")
        gate.close(Stop("signal", "SIGTERM"))
        gate.close(Stop("budget", "later reasons do not count"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(gated.complete(request(2)), 0.05)
        return len(engine.requests), meter, gate.stop.sentence

    sent, meter, sentence = asyncio.run(run())
    assert (sent, meter.sent, meter.answered, sentence) == (1, 1, 1, "SIGTERM")


def test_money_reserved_by_requests_under_way_is_waited_for():
    """Each request reserves much more than it costs; one after the other they all fit."""

    async def run():
        engine = standins.engine(max_delay_s=0.001)
        budget = Budget(prices=Prices(output=1e6), max_cost=28.0)
        gate = Gate(engine, concurrency=8, budget=budget)
        gated = GatedEngine(gate, Meter())
        tasks = [asyncio.create_task(gated.complete(request(i))) for i in range(5)]
        done, _ = await asyncio.wait(tasks, timeout=0.5)
        for task in tasks:
            task.cancel()
        return len(done), engine.max_in_flight, gate.stop

    done, in_flight, stop = asyncio.run(run())
    assert in_flight == 2  # 10 tokens are reserved for each, 3 or 4 are used
    assert done == 5 and stop is None


def test_progress_lines(caplog):
    progress = Progress("explain", False)
    progress.start(10)
    progress.advance(4, is_new=False)
    progress.advance(1, is_new=True)
    assert progress.line().startswith("explain: 5 of 10 latents, ")
    assert (span(5), span(65), span(7500)) == ("5 s", "1 min 05 s", "2 h 05 min")


def test_progress_bar(capsys):
    progress = Progress("score", True)
    progress.start(3)
    progress.advance(1, is_new=False)
    progress.advance(2, is_new=True)
    progress.close()
    assert "score" in capsys.readouterr().err
