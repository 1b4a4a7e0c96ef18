"""A real vLLM for tests: a server in a process of its own, or the engine in this one."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

from autointerp.llm import EngineConfig, open_engine, prepare

SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
"""Environment variables that vLLM needs on a small machine without a network."""


@contextmanager
def serving(model, log, *, name, context, arguments=()):
    """Serve a model under a name; yields the server's address. What it says goes to the file `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not `vllm serve`: in some releases of vllm-cpu that command looks for a package named vllm.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", str(context), *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=os.environ | SETTINGS, stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{url}/health", process, log)
        yield url
    finally:
        process.terminate()  # not kill: the engine is a child of its own
        process.wait(60)


def _wait_for(url, process, log):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(log.read_text(errors="replace")[-3000:])


def open_over_http(runner, url, **config):
    """Return the engine of the model named tiny of a server."""
    engine = open_engine(f"openai:tiny@{url}/v1", EngineConfig(**config))
    runner.run(prepare(engine))
    return engine


def open_in_process(runner, model, *, context):
    """Return an engine with vLLM in this process, in the runner's loop."""
    os.environ.update(SETTINGS)

    async def start():
        arguments = {"enforce_eager": True, "max_model_len": context}
        return open_engine(f"vllm:{model}", EngineConfig(dtype="float32", engine_args=arguments))

    return runner.run(start())


def successes(url):
    """Return how many requests a server has answered, by its own count."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as page:
        text = page.read().decode()
    return sum(float(value) for value in re.findall(r"^vllm:request_success_total\{[^}]*\} (\S+)$", text, re.MULTILINE))
