"""Runs explain and score in forked children that kill themselves with SIGKILL at the n-th event; prints what came of it as
JSON.

Events: before and after each request, and each rename, link, removal, folder and opening for writing. Called by
test_jobs_kill.py.
"""

import asyncio
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import jobs_standins as standins

from autointerp.jobs.explain import ExplainConfig, explain_from
from autointerp.jobs.score import ScoreConfig, score_from
from autointerp.jobs.verify import verify

CONCURRENCY = 3
FILE_EVENTS = {"os.rename", "os.link", "os.remove", "os.mkdir"}


class Events:
    def __init__(self, kill_at=None):
        self.count, self.kill_at = 0, kill_at

    def happened(self):
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def audit(self, event, arguments):
        if event in FILE_EVENTS or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            self.happened()


class Server:
    """The engine; what it was sent is on disk even when the client dies."""

    def __init__(self, record, events):
        self._inner = standins.engine(max_delay_s=0.002)
        self._fd = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._events = events
        self.id, self.capabilities, self.context_tokens = self._inner.id, self._inner.capabilities, None

    async def complete(self, request, /):
        self._events.happened()
        os.write(self._fd, (hashlib.sha256(request.prompt.messages[0][1].encode()).hexdigest() + "\n").encode())
        reply = await self._inner.complete(request)
        self._events.happened()
        return reply

    async def tokenize(self, text, /):
        return ()

    async def aclose(self):
        pass


async def both(results, record, events, *, latents):
    source = standins.Source(coders=("a",))
    server = Server(record, events)
    common = {"concurrency": CONCURRENCY, "threads": 1}
    config = ExplainConfig(store="x", results=results, latents=latents, controls=("shuffled",), shard_latents=3, **common)
    await explain_from(config, source, standins.Explainer(), server, progress=False)
    config = ScoreConfig(results=results, controls=("shuffled",), **common)
    await score_from(config, source, [standins.Scorer()], server, progress=False)


def child(work):
    """Run `work` in a fork; return its exit status (negative for a signal) and what it returned."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            os.write(write, json.dumps(work()).encode())
        except BaseException as error:  # noqa: BLE001 - a fork must not run the parent's code
            os.write(write, json.dumps(repr(error)).encode())
            os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), json.loads(text) if text else None


def run(folder, kill_at, latents):
    def work():
        events = Events(kill_at)
        sys.addaudithook(events.audit)
        asyncio.run(both(folder / "results", folder / "sent", events, latents=latents))
        return events.count

    folder.mkdir(parents=True, exist_ok=True)
    return child(work)


def files(results):
    found = {}
    for table in ("plan", "explanations", "verdicts", "scores", "examples", "failures"):
        for path in sorted((results / table).rglob("*.parquet")):
            if not path.name.startswith(".tmp-"):
                found[str(path.relative_to(results))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def main():
    root, latents, step, offset = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    code, num_events = run(root / "whole", None, latents)
    assert code == 0, num_events
    whole = files(root / "whole" / "results")
    whole_sent = (root / "whole" / "sent").read_text().split()
    outcomes = []
    for kill_at in range(offset, num_events, step):
        folder = root / f"kill{kill_at}"
        code, _ = run(folder, kill_at, latents)
        second, text = run(folder, None, latents)
        sent = (folder / "sent").read_text().split()
        outcomes.append(
            {
                "kill_at": kill_at,
                "killed": code == -signal.SIGKILL,
                "resumed": second if second else text and second,
                "equal": files(folder / "results") == whole,
                "missing": len(set(whole_sent) - set(sent)),
                "again": len(sent) - len(set(sent)),
                "problems": child(lambda folder=folder: verify(folder / "results"))[1],
                # What a killed planner leaves is dropped after an hour, by another planner: nobody holds a lease on the plan.
                "leftovers": sum(path.parent.name != "plan" for path in (folder / "results").rglob(".tmp-*.parquet")),
            }
        )
    print(json.dumps({"events": num_events, "sent": len(whole_sent), "unique": len(set(whole_sent)), "outcomes": outcomes}))


if __name__ == "__main__":
    main()
