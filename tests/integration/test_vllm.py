"""A real vLLM, over HTTP and in this process, against the transformers engine. Run by ``make test-vllm``."""

import asyncio

import pytest

from autointerp.errors import ConfigError, ContextExceeded, LLMError, Permanent
from autointerp.llm import EngineConfig, LoggedEngine, ReplyLog, check_constraint, conforms, open_engine, prepare
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
from tests.integration.vllm_server import open_in_process, open_over_http, serving, successes

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

CONTEXT = 512
PROMPTS = [
    Chat(messages=(("user", "The quick brown fox"), ("assistant", "jumps"), ("user", "over?"))),
    Text(text="def add(a, b):\n    return"),
    TokenIds(ids=(0, 40, 41, 42, 43)),
]
LABELS = ("a", "the", "self")
CONSTRAINTS = [
    Choice(options=("yes", "yes please", "no")),
    Regex(pattern="[01]{4}"),
    JsonSchema(schema='{"type":"array","items":{"type":"integer","minimum":0,"maximum":1},"minItems":5,"maxItems":5}'),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tests.tiny_llm import write_chat_model

    return write_chat_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def oracle(model, runner):
    engine = open_engine(f"hf:{model}", EngineConfig(device="cpu"))
    yield engine
    runner.run(engine.aclose())


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    arguments = ("--dtype", "float32", "--enable-prompt-tokens-details")
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(model, log, name="tiny", context=CONTEXT, arguments=arguments) as url:
        yield url


@pytest.fixture(scope="module", params=["http", "process"])
def engine(request, model, runner):
    if request.param == "http":
        engine = open_over_http(runner, request.getfixturevalue("server"), start_concurrency=64)
    else:
        engine = open_in_process(runner, model, context=CONTEXT)
    yield engine
    runner.run(engine.aclose())
    runner.run(engine.aclose())


def ask_both(runner, oracle, engine, request):
    async def main():
        return await asyncio.gather(oracle.complete(request), engine.complete(request))

    return runner.run(main())


def close(ours, theirs):
    assert [token.token_id for token in ours] == [token.token_id for token in theirs] or theirs[0].token_id is None
    assert [token.logprob for token in ours] == pytest.approx([token.logprob for token in theirs], abs=1e-2, nan_ok=False)
    for one, other in zip(ours, theirs, strict=True):
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-2)


def test_it_says_what_it_is(engine):
    assert engine.context_tokens == CONTEXT
    assert engine.capabilities.prompt_logprobs and engine.capabilities.labels and engine.capabilities.tokenize


@pytest.mark.parametrize("prompt", PROMPTS, ids=["chat", "text", "ids"])
def test_text_and_its_logprobs_agree(runner, oracle, engine, prompt):
    expected, got = ask_both(runner, oracle, engine, Request(prompt=prompt, max_tokens=10, top_logprobs=3))
    # Bytes that are no character are shown in more than one way.
    assert (got.text.rstrip("\ufffd"), got.finish) == (expected.text, expected.finish)
    assert got.usage.prompt_tokens == expected.usage.prompt_tokens and got.usage.output_tokens == expected.usage.output_tokens
    assert [token.logprob for token in got.tokens] == pytest.approx([token.logprob for token in expected.tokens], abs=1e-2)


@pytest.mark.parametrize("prompt", PROMPTS, ids=["chat", "text", "ids"])
def test_label_probabilities_agree(runner, oracle, engine, prompt):
    expected, got = ask_both(runner, oracle, engine, Request(prompt=prompt, max_tokens=1, labels=LABELS))
    assert got.label_probs == pytest.approx(expected.label_probs, rel=1e-2, abs=1e-6)
    assert got.label_mass == pytest.approx(sum(expected.label_probs), rel=1e-2) and got.label_mass > 0


@pytest.mark.parametrize("prompt", PROMPTS, ids=["chat", "text", "ids"])
def test_prompt_logprobs_agree(runner, oracle, engine, prompt):
    ask = Request(prompt=prompt, max_tokens=0, prompt_logprobs=PromptLogprobs(top=2, start=1))
    expected, got = ask_both(runner, oracle, engine, ask)
    close(expected.prompt_tokens, got.prompt_tokens)
    assert (got.text, got.finish) == ("", "stop")


def test_constraints_are_honoured(runner, oracle, engine):
    runner.run(check_constraint(engine))
    for prompt in PROMPTS:
        for constraint in CONSTRAINTS:
            ask = Request(prompt=prompt, max_tokens=40, constraint=constraint, temperature=1.0, seed=1)
            reply = runner.run(engine.complete(ask))
            assert reply.finish == "stop" and conforms(constraint, reply.text), reply
        # Where a grammar leaves room for spaces, each engine has its own taste, so only what has none is compared.
        expected, got = ask_both(runner, oracle, engine, Request(prompt=prompt, max_tokens=10, constraint=CONSTRAINTS[1]))
        assert expected.text == got.text
    assert engine.num_violations == 0


def test_alternatives_survive_a_batch_with_labels(runner, engine):
    async def main():
        asks = [Request(prompt=Text(text=f"x{i} ="), max_tokens=1, top_logprobs=5) for i in range(40)]
        asks += [Request(prompt=Text(text=f"y{i} ="), max_tokens=1, labels=LABELS) for i in range(40)]
        return await asyncio.gather(*(engine.complete(ask) for pair in zip(asks[:40], asks[40:], strict=True) for ask in pair))

    for reply in runner.run(main()):
        assert (reply.label_probs is not None) or all(value > -100 for token in reply.tokens for _, value in token.top)


def test_what_is_too_long_is_said(runner, engine):
    for ask in (Request(prompt=Text(text="x " * 600)), Request(prompt=Text(text="x"), max_tokens=600)):
        with pytest.raises(ContextExceeded, match=r"512|context"):
            runner.run(engine.complete(ask))


def test_tokenize_agrees(runner, oracle, engine):
    text = "def add(a, b):\n    return a"
    assert runner.run(engine.tokenize(text)) == runner.run(oracle.tokenize(text))


def test_another_model_is_refused(runner, server):
    engine = open_engine(f"openai:other@{server}/v1")
    with pytest.raises(ConfigError, match="has no model 'other'; it has: tiny"):
        runner.run(prepare(engine))
    runner.run(engine.aclose())


def test_the_servers_own_count_is_ours(runner, server, tmp_path):
    """200 requests, some of them impossible: what the server answered is what was logged, and the rest failed with a reason."""

    async def main():
        engine = open_engine(f"openai:tiny@{server}/v1")
        await prepare(engine)
        logged = LoggedEngine(engine, ReplyLog(tmp_path / "log"))
        asks = [
            Request(prompt=Text(text=f"number {i} " + ("long " * 600 if i % 10 == 0 else "")), max_tokens=4) for i in range(200)
        ]
        before = successes(server)
        results = await asyncio.gather(*(logged.complete(ask) for ask in asks), return_exceptions=True)
        again = await asyncio.gather(*(logged.complete(ask) for ask in asks[1:10]))
        await logged.aclose()
        await engine.aclose()
        assert again == results[1:10]
        return results, successes(server) - before, logged.counters

    results, answered, counters = runner.run(main())
    failed = [result for result in results if isinstance(result, LLMError)]
    assert len(failed) == 20 and all(isinstance(error, Permanent) for error in failed)
    assert answered == 180 == counters.sent - counters.failures and counters.hits == 9
