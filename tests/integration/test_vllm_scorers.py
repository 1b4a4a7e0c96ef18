"""Scorers that read the log-probabilities of a prompt, with a real vLLM over HTTP and in process, against transformers.

Run by ``make test-vllm``.
"""

import asyncio
import os
import socket
import subprocess
import sys

import pytest

from autointerp.llm import EngineConfig, open_engine, prepare
from autointerp.protocols import Resources
from autointerp.scorers.surprisal import Surprisal
from tests.integration.test_simulation_hf import EXPLANATION, Words, a_latent, model_with_bos, simulation
from tests.integration.test_vllm import SETTINGS, wait_for

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

CONTEXT = 2048
ALTERNATIVES = 20  # what a vLLM server gives unless told otherwise


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny chat model that likes digits: they are among its likeliest tokens at most places."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_with_bos(tmp_path_factory.mktemp("model") / "tiny")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    digits = [tokenizer(str(i), add_special_tokens=False)["input_ids"][0] for i in range(10)]
    with torch.no_grad():
        loaded.lm_head.weight[digits] *= 3
    loaded.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--dtype", "float32"]
    command += ["--max-model-len", str(CONTEXT)]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=os.environ | SETTINGS, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module", params=["http", "process"])
def engine(request, model, runner):
    if request.param == "http":
        engine = open_engine(f"openai:tiny@{request.getfixturevalue('server')}/v1")
        runner.run(prepare(engine))
    else:
        os.environ.update(SETTINGS)
        arguments = {"enforce_eager": True, "max_model_len": CONTEXT}

        async def start():
            return open_engine(f"vllm:{model}", EngineConfig(dtype="float32", engine_args=arguments))

        engine = runner.run(start())
    yield engine
    runner.run(engine.aclose())


@pytest.fixture(scope="module")
def oracle(model, runner):
    engine = open_engine(f"hf:{model}", EngineConfig(device="cpu", batch_size=1))
    yield engine
    runner.run(engine.aclose())


def score(runner, scorer, engine):
    return runner.run(scorer.score(a_latent(), EXPLANATION, Resources(vocabulary=Words(), seed=0, engine=engine)))


def test_simulated_levels_are_those_of_transformers(runner, engine, oracle, tmp_path):
    scorer = simulation(tmp_path, alternatives=ALTERNATIVES, min_predicted=0)
    ours, theirs = score(runner, scorer, engine), score(runner, scorer, oracle)
    assert [v.status for v in ours.verdicts] == [v.status for v in theirs.verdicts] == ["ok"] * 9
    pairs = [
        pair for a, b in zip(ours.verdicts, theirs.verdicts, strict=True) for pair in zip(a.answers, b.answers, strict=True)
    ]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    # The last of the likeliest tokens may differ in the last bits.
    assert len(both) >= 0.5 * len(pairs)
    assert sum((a is None) != (b is None) for a, b in pairs) <= 0.05 * len(pairs)
    assert sum(abs(a - b) < 1e-2 for a, b in both) >= 0.95 * len(both)


def test_information_values_are_those_of_transformers(runner, engine, oracle):
    ours, theirs = score(runner, Surprisal(), engine), score(runner, Surprisal(), oracle)
    assert [v.status for v in ours.verdicts] == ["ok"] * 9
    assert [v.value for v in ours.verdicts] == pytest.approx([v.value for v in theirs.verdicts], abs=1e-2)
