"""Every LLM explainer against replies and texts that mean harm: a row for each, counts add up, and nothing is invented."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hostile import CORPUS, TEXTS, HostileVocabulary
from judged import validated
from planted import resources, run

from autointerp.errors import ContextExceeded, EngineStopped, Permanent, RateLimited, ReplyError, Transient
from autointerp.explainers import REGISTRY
from autointerp.jobs.methods import build_explainer
from autointerp.llm.fake import FakeEngine, prompt_text
from autointerp.records import Chat, Examples, LatentExamples, Reply

EXPLAINERS = {
    "default": ("default", {}),
    "default with reasoning": ("default", {"reasoning": True}),
    "contrastive": ("contrastive", {}),
    "activations_logits": ("activations_logits", {}),
    "best_of": ("best_of", {}),
    "refine": ("refine", {}),
}


def test_no_llm_explainer_is_missing_here():
    asking = {name for name in REGISTRY if build_explainer(name, {}).needs.engine}
    assert asking == {name for name, _ in EXPLAINERS.values()}


class CountingEngine(FakeEngine):
    """Counts the requests that it answered."""

    num_answered = 0

    async def complete(self, request, /):
        reply = await super().complete(request)
        self.num_answered += 1
        return reply


def a_latent():
    return validated(promoted=tuple(range(12)))


def explained(which, script, *, latent=None, vocabulary=None):
    name, options = EXPLAINERS[which]
    engine = CountingEngine(script)
    given = resources(engine)
    given = given if vocabulary is None else replace(given, vocabulary=vocabulary)
    return list(run(build_explainer(name, options).explain(latent or a_latent(), given))), engine


def check(rows, engine, *, statuses):
    """Nothing but a status comes of it, and what was asked is counted."""
    assert rows
    assert {row.status for row in rows} <= statuses, rows
    assert {(row.text, row.rule) for row in rows} == {(None, None)}
    assert sum(row.num_attempts for row in rows) == engine.num_answered


@pytest.mark.parametrize("which", EXPLAINERS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_replies_that_are_no_explanations(which, text):
    rows, engine = explained(which, lambda request: text)
    check(rows, engine, statuses={"refused"} if text == TEXTS["refusal"] else {"unparseable"})


@pytest.mark.parametrize("which", EXPLAINERS)
def test_the_prompt_echoed_back_is_no_explanation(which):
    rows, engine = explained(which, prompt_text)
    check(rows, engine, statuses={"unparseable"})


@pytest.mark.parametrize("which", EXPLAINERS)
def test_a_worked_example_echoed_back_is_no_explanation(which):
    num = sum(role == "assistant" for role, _ in explained(which, lambda request: "")[1].requests[0].prompt.messages)
    for i in range(num):

        def echo(request, i=i):
            return [content for role, content in request.prompt.messages if role == "assistant"][i]

        rows, engine = explained(which, echo)
        check(rows, engine, statuses={"unparseable"})


@pytest.mark.parametrize("which", EXPLAINERS)
@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (Reply(text="EXPLANATION: the word pa", finish="length"), "truncated"),
        (Reply(text="", finish="length"), "truncated"),
        (Reply(text="EXPLANATION: the word path", finish="filter"), "refused"),
        (ContextExceeded("too long"), "too_long"),
    ],
    ids=["cut", "thinking", "filter", "long"],
)
def test_replies_that_ended_early(which, reply, status):
    rows, engine = explained(which, lambda request: reply)
    check(rows, engine, statuses={status})


@pytest.mark.parametrize("which", EXPLAINERS)
@pytest.mark.parametrize(
    "error",
    [Transient("timeout"), RateLimited("slow down"), Permanent("400"), ReplyError("not JSON"), EngineStopped("no such key")],
    ids=lambda error: type(error).__name__,
)
def test_what_the_engine_raises_becomes_no_row_here(which, error):
    """The runner makes a row of it, or stops."""
    with pytest.raises(type(error)):
        explained(which, lambda request: error)


def hostile_latent():
    latent = a_latent()
    changed = {}
    for name in (field.name for field in fields(LatentExamples)):
        block = getattr(latent, name)
        if isinstance(block, Examples) and len(block):
            num, width = block.tokens.shape
            rows = np.arange(num)[:, None] + np.arange(width)
            changed[name] = replace(block, tokens=(rows % len(CORPUS)).astype(np.uint32))
    return replace(latent, **changed)


@pytest.mark.parametrize("which", EXPLAINERS)
def test_corpus_text_cannot_change_the_form_of_a_prompt(which):
    _, plain = explained(which, lambda request: "?")
    _, engine = explained(which, lambda request: "?", latent=hostile_latent(), vocabulary=HostileVocabulary())
    num = len(plain.requests[0].prompt.messages)
    for request, other in zip(engine.requests, plain.requests, strict=True):
        assert isinstance(request.prompt, Chat)
        asked, expected = request.prompt.messages[num - 1][1], other.prompt.messages[num - 1][1]
        assert request.prompt.messages[: num - 1] == other.prompt.messages[: num - 1]
        assert asked.count("\n") == expected.count("\n")
        assert [line.split(" ")[:2] for line in asked.splitlines() if line.startswith("Excerpt ")] == [
            line.split(" ")[:2] for line in expected.splitlines() if line.startswith("Excerpt ")
        ]
        assert asked.count("<<") == asked.count(">>") == expected.count("<<")
        marker = "LABEL:" if which == "activations_logits" else "EXPLANATION:"
        assert asked.count(marker) == expected.count(marker) and "hacked" in asked
        assert not any(found in asked for found in ("<|im_end|>", "\x1b", "\u202e", "\t"))


@pytest.mark.parametrize("which", EXPLAINERS)
def test_what_the_corpus_says_is_no_explanation_when_it_is_repeated(which):
    """A corpus that holds the marker, and a model that repeats what it was shown, all of it or one window."""
    latent, vocabulary = hostile_latent(), HostileVocabulary()
    rows, engine = explained(which, prompt_text, latent=latent, vocabulary=vocabulary)
    check(rows, engine, statuses={"unparseable"})
    num = len(engine.requests[0].prompt.messages)
    lines = engine.requests[0].prompt.messages[num - 1][1].splitlines()
    hacked = [line for line in lines if "hacked" in line]
    assert hacked
    for line in hacked[:3]:
        rows, engine = explained(which, lambda request, line=line: line, latent=latent, vocabulary=vocabulary)
        check(rows, engine, statuses={"unparseable"})
