"""Scorers that read the log-probabilities of a prompt, with a real vLLM over HTTP and in process, against transformers.

Run by ``make test-vllm``.
"""

import asyncio

import numpy as np
import pytest

from autointerp.llm import EngineConfig, open_engine
from autointerp.protocols import Resources
from autointerp.scorers.surprisal import Surprisal
from tests.integration.test_simulation_hf import EXPLANATION, Words, a_latent, model_with_bos, simulation
from tests.integration.vllm_server import open_in_process, open_over_http, serving

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
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(model, log, name="tiny", context=CONTEXT, arguments=("--dtype", "float32")) as url:
        yield url


@pytest.fixture(scope="module", params=["http", "process"])
def engine(request, model, runner):
    if request.param == "http":
        engine = open_over_http(runner, request.getfixturevalue("server"))
    else:
        engine = open_in_process(runner, model, context=CONTEXT)
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
    [headline] = [score for score in ours.scores if score.is_headline]
    told = [
        (level, activation)
        for verdict in ours.verdicts
        for level, activation in zip(verdict.answers, verdict.truths, strict=True)
        if level is not None
    ]
    assert headline.value == pytest.approx(np.corrcoef(np.array(told).T)[0, 1])


def test_information_values_are_those_of_transformers(runner, engine, oracle):
    ours, theirs = score(runner, Surprisal(), engine), score(runner, Surprisal(), oracle)
    assert [v.status for v in ours.verdicts] == ["ok"] * 9
    assert [v.value for v in ours.verdicts] == pytest.approx([v.value for v in theirs.verdicts], abs=1e-2)
