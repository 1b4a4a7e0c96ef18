"""Children that die by SIGKILL at a chosen moment, for tests of resuming.

A child is a fork of a process that has imported what it needs, so a hundred of them cost little. Events are what a run does to the disk
(rename, link, removal, folder, opening for writing) as Python's audit hooks see them; requests are counted by the server that gets them.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

FILE_EVENTS = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}


class FileEvents:
    """Counts what happens to the disk and kills the process at the given count."""

    def __init__(self, kill_at=None):
        self.names, self.kill_at = [], kill_at

    def __call__(self, event, arguments):
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if event in FILE_EVENTS or writes:
            if len(self.names) == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.names.append(f"{event} {arguments[0]}")


def fork(work, *, kill_at=None):
    """Run `work()` in a fork; return (exit status, negative for a signal; its file events; its output)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        events, output, code = FileEvents(kill_at), io.StringIO(), 0
        sys.addaudithook(events)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                work()
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException as error:  # noqa: BLE001  a fork must never run on into the parent's code
            code = 99
            output.write(repr(error))
        os.write(write, json.dumps({"events": events.names, "output": output.getvalue()}).encode())
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    found = json.loads(text) if text else {"events": [], "output": ""}
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), found["events"], found["output"]


def fork_until(work, reached):
    """Run `work()` in a fork and kill it as soon as `reached()` is true; return its exit status."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            work()
        except SystemExit as stop:
            os._exit(stop.code or 0)
        except BaseException:  # noqa: BLE001  a fork must never run on into the parent's code
            os._exit(99)
        os._exit(0)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if reached():
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.001)


def parquet_tables(folder):
    """Return {relative path: table as rows} of every committed parquet file below `folder`."""
    found = {}
    for path in sorted(Path(folder).rglob("*.parquet")):
        if not path.name.startswith(".tmp-") and not any(part.startswith(".tmp-") for part in path.parts):
            with pq.ParquetFile(path) as file:
                table = file.read()
            found[path.relative_to(folder).as_posix()] = (table.schema.remove_metadata(), table)
    return found


def different(folder, whole):
    """Return the names of tables that are not equal, column by column, in the two mappings of `parquet_tables`."""
    names = sorted(set(folder) ^ set(whole))
    return names + [name for name in sorted(set(folder) & set(whole)) if not _equal(folder[name], whole[name])]


def _equal(one, other):
    return one[0].equals(other[0]) and one[1].replace_schema_metadata(None).equals(other[1].replace_schema_metadata(None))


class Requests:
    """What a scripted server was sent, read from its record."""

    def __init__(self, record):
        self._record, self._offset, self._count = record, 0, 0

    def __call__(self):
        """Return the bodies of all requests for completions so far."""
        lines = [json.loads(line) for line in self._record.read_text().splitlines() if line.endswith("}")]
        return [line["body"] for line in lines if line["path"].endswith("/completions")]

    def count(self):
        """Return how many there are, reading only what is new."""
        with self._record.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._count += sum(b'completions",' in line for line in whole.splitlines())
        return self._count


@contextlib.contextmanager
def scripted_server(folder, **script):
    """A scripted server in a process of its own; yields (base URL, function that returns the request bodies so far)."""
    (folder / "script.json").write_text(json.dumps(script))
    record = folder / "requests.jsonl"
    record.write_text("")
    command = [sys.executable, "-m", "tests.scripted_server", "--script", folder / "script.json", "--record", record]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])

    try:
        yield process.stdout.readline().strip(), Requests(record)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
