"""A process that has imported everything and forks one child per line of JSON, so that kill tests need not import torch each.

A line is ``[config as JSON text, n]``; the child runs `cache` and, with n > 0, kills itself by SIGKILL at its n-th rename.
Answers are ``pid`` and then ``[return code, renames, error text]``.
"""

import json
import os
import signal
import sys
from pathlib import Path

from autointerp.errors import AutointerpError
from autointerp.jobs.cache import CacheConfig, cache

_rename = Path.replace


def child(config: str, limit: int, answer: int) -> None:
    count = 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return _rename(self, target)

    Path.replace = replace
    code, text = 0, ""
    try:
        cache(CacheConfig.model_validate_json(config))
    except AutointerpError as error:
        code, text = error.exit_code, str(error)
    os.write(answer, json.dumps([count, text]).encode())
    os._exit(code)


def main() -> None:
    for line in sys.stdin:
        config, limit = json.loads(line)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            child(config, limit, write)
        os.close(write)
        print(pid, flush=True)
        with os.fdopen(read) as pipe:
            said = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps([code, *(json.loads(said) if said else (0, ""))]), flush=True)


if __name__ == "__main__":
    main()
