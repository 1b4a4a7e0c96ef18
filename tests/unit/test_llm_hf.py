"""The transformers engine against the model itself: it is the oracle of the other engines."""

import asyncio
import math
from dataclasses import replace

import pytest
import torch

from autointerp.errors import ConfigError, ContextExceeded, Permanent, ResourceError
from autointerp.llm.constraints import conforms
from autointerp.llm.engines import check_constraint, open_engine
from autointerp.llm.hf import HFEngine
from autointerp.llm.settings import EngineConfig
from autointerp.llm.tokenizing import candidates
from autointerp.records import Chat, Choice, JsonSchema, PromptLogprobs, Regex, Request, Text, TokenIds
from tests.tiny_llm import chat_model, chat_tokenizer, write_chat_model

CHAT = Chat(messages=(("user", "The quick brown fox"),))
TEXT = Text(text="def add(a, b):")
IDS = TokenIds(ids=(0, 40, 41, 42, 43))


@pytest.fixture(scope="module")
def parts():
    tokenizer = chat_tokenizer()
    return chat_model(tokenizer).eval(), tokenizer


def engine(parts, **settings):
    return HFEngine.of(*parts, name="tiny", config=EngineConfig(device="cpu", **settings))


def answer(parts, *requests, **settings):
    async def main():
        one = engine(parts, **settings)
        try:
            return await asyncio.gather(*(one.complete(request) for request in requests))
        finally:
            await one.aclose()

    replies = asyncio.run(main())
    return replies[0] if len(requests) == 1 else replies


def ids_of(parts, prompt):
    _, tokenizer = parts
    if isinstance(prompt, TokenIds):
        return list(prompt.ids)
    if isinstance(prompt, Text):
        return tokenizer(prompt.text)["input_ids"]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The quick brown fox"}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def logprobs(parts, ids):
    return parts[0](input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("prompt", [CHAT, TEXT, IDS], ids=["chat", "text", "ids"])
def test_labels_and_prompt_logprobs_are_the_models(parts, prompt):
    ids = ids_of(parts, prompt)
    expected = logprobs(parts, ids)
    labels = ("a", "the", "self")
    ask = Request(prompt=prompt, labels=labels, max_tokens=0, prompt_logprobs=PromptLogprobs(top=2, start=1))
    got = answer(parts, ask)
    vocabulary = [parts[1].decode([i], skip_special_tokens=True).strip() for i in range(len(parts[1]))]
    for label, prob in zip(labels, got.label_probs, strict=True):
        naive = sum(math.exp(expected[-1, i]) for i, text in enumerate(vocabulary) if text == label)
        assert prob == pytest.approx(naive, rel=1e-4) and naive > 0
    assert got.label_mass == pytest.approx(sum(got.label_probs))
    assert [token.token_id for token in got.prompt_tokens] == ids[1:]
    for i, token in enumerate(got.prompt_tokens):
        assert token.logprob == pytest.approx(float(expected[i, ids[i + 1]]), abs=1e-4)
        assert [value for _, value in token.top] == pytest.approx(expected[i].topk(2).values.tolist(), abs=1e-4)
    assert (got.text, got.finish, got.usage.output_tokens, got.usage.prompt_tokens) == ("", "stop", 0, len(ids))


def test_the_first_prompt_token_has_no_probability(parts):
    got = answer(parts, Request(prompt=IDS, max_tokens=0, prompt_logprobs=PromptLogprobs()))
    assert len(got.prompt_tokens) == 5 and got.prompt_tokens[0].logprob is None and got.prompt_tokens[1].top == ()


def test_alternatives_are_given_only_where_they_are_asked_for(parts):
    got = answer(parts, Request(prompt=IDS, max_tokens=0, prompt_logprobs=PromptLogprobs(top=3, start=1, at=(2, 4))))
    whole = answer(parts, Request(prompt=IDS, max_tokens=0, prompt_logprobs=PromptLogprobs(top=3, start=1)))
    assert [len(token.top) for token in got.prompt_tokens] == [0, 3, 0, 3]
    assert got.prompt_tokens[1] == whole.prompt_tokens[1] and got.prompt_tokens[3] == whole.prompt_tokens[3]
    assert [token.logprob for token in got.prompt_tokens] == [token.logprob for token in whole.prompt_tokens]


@pytest.mark.parametrize("prompt", [CHAT, TEXT, IDS], ids=["chat", "text", "ids"])
def test_greedy_text_is_generates(parts, prompt):
    model, tokenizer = parts
    ids = ids_of(parts, prompt)
    out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=1)[0, len(ids) :]
    got = answer(parts, Request(prompt=prompt, max_tokens=12, top_logprobs=1))
    assert got.text == tokenizer.decode(out, skip_special_tokens=True).rstrip("\ufffd")
    assert [token.token_id for token in got.tokens] == out.tolist()
    assert got.finish == ("stop" if out[-1] == tokenizer.eos_token_id else "length")
    assert all(token.top[0] == (token.token, token.logprob) for token in got.tokens)


def test_a_reply_does_not_depend_on_its_company(parts):
    requests = [Request(prompt=TokenIds(ids=tuple(range(40, 41 + n))), max_tokens=6, top_logprobs=2) for n in (1, 9, 4, 30)]
    requests.append(replace(requests[1], labels=("a",), top_logprobs=0))
    together = answer(parts, *requests)
    alone = [answer(parts, request, batch_size=1) for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert one.text == other.text and one.usage == other.usage
        assert [t.logprob for t in one.tokens] == pytest.approx([t.logprob for t in other.tokens], abs=1e-4)
    assert together[-1].label_probs == pytest.approx(alone[-1].label_probs, rel=1e-4)


CONSTRAINTS = [
    Choice(options=("yes", "yes please", "no")),
    Regex(pattern="[01]{4}"),
    Regex(pattern="(ab|cd)+e?"),
    JsonSchema(schema='{"type":"array","items":{"enum":[0,1]},"minItems":5,"maxItems":5}'),
    JsonSchema(
        schema='{"type":"object","properties":{"n":{"type":"integer","minimum":0,"maximum":10},"ok":{"type":"boolean"}},"required":["n","ok"]}'
    ),
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
def test_constraints_are_obeyed(parts, constraint, temperature):
    requests = [Request(prompt=CHAT, max_tokens=40, constraint=constraint, temperature=temperature, sample=i) for i in range(3)]
    replies = answer(parts, *requests)
    done = [reply for reply in replies if reply.finish == "stop"]
    assert all(conforms(constraint, reply.text) for reply in done) and (done or "+" in str(constraint))
    assert len({reply.text for reply in replies}) == 1 or temperature


def test_a_choice_is_drawn_by_its_probability(parts):
    # Single letters, each also the beginning of nothing else: P(a) / (P(a) + P(b)) over the tokens that spell them.
    expected = logprobs(parts, ids_of(parts, CHAT))[-1].exp()
    a, b = (float(expected[parts[1].convert_tokens_to_ids(letter)]) for letter in "ab")
    ask = Request(prompt=CHAT, max_tokens=2, constraint=Choice(options=("a", "b")), temperature=1.0)
    replies = answer(parts, *(replace(ask, sample=i) for i in range(300)), batch_size=64)
    share = sum(reply.text == "a" for reply in replies) / 300
    p = a / (a + b)
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 300) + 1e-9


def test_the_constraint_check_passes(parts):
    one = engine(parts)
    asyncio.run(check_constraint(one))


def test_samples_differ_and_repeat(parts):
    ask = Request(prompt=TEXT, max_tokens=8, temperature=1.0)
    first = answer(parts, ask, replace(ask, sample=1), replace(ask, seed=5))
    again = answer(parts, ask, replace(ask, sample=1), replace(ask, seed=5))
    assert [r.text for r in first] == [r.text for r in again] and len({r.text for r in first}) == 3
    narrow = answer(parts, replace(ask, top_p=1e-6))
    assert narrow.text == answer(parts, replace(ask, temperature=0.0)).text


def test_stop_strings_end_a_reply(parts):
    whole = answer(parts, Request(prompt=TEXT, max_tokens=12)).text
    stop = whole[4:6]
    got = answer(parts, Request(prompt=TEXT, max_tokens=12, stop=("never there", stop)))
    assert got.text == whole[: whole.index(stop)] and got.finish == "stop"


def test_what_cannot_be_answered_is_said(parts):
    with pytest.raises(ContextExceeded, match=r"2000 tokens and asks for 64 more; tiny takes 2048"):
        answer(parts, Request(prompt=TokenIds(ids=(5,) * 2000)))
    with pytest.raises(Permanent, match="label 'extraordinary' is no single token"):
        answer(parts, Request(prompt=CHAT, labels=("extraordinary",)))
    with pytest.raises(Permanent, match="prompt is empty"):
        answer(parts, Request(prompt=TokenIds(ids=())))
    with pytest.raises(Permanent, match="cannot combine a constraint with top_p"):
        answer(parts, Request(prompt=CHAT, constraint=CONSTRAINTS[0], temperature=1.0, top_p=0.5))
    with pytest.raises(ConfigError, match=r"extra_body.reasoning_effort has no meaning"):
        engine(parts, extra_body={"reasoning_effort": "low"})
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(Permanent, match="has no chat template"):
        answer((parts[0], tokenizer), Request(prompt=CHAT))


def test_one_bad_request_does_not_touch_the_others(parts):
    async def main():
        one = engine(parts)
        bad = Request(prompt=CHAT, max_tokens=9, constraint=Choice(options=("\u4e00\u4e8c",)))
        good = Request(prompt=CHAT, max_tokens=9, constraint=Choice(options=("x",)))
        results = await asyncio.gather(one.complete(bad), one.complete(good), one.complete(bad), return_exceptions=True)
        assert (await one.complete(good)).text == "x"
        await one.aclose()
        return results

    results = asyncio.run(main())
    assert isinstance(results[0], Permanent) and "no token to go on" in str(results[0])
    assert results[1].text == "x"


def test_a_folder_is_known_by_its_weights(parts, tmp_path):
    one, two = write_chat_model(tmp_path / "a" / "m"), write_chat_model(tmp_path / "b" / "m", seed=1)
    engines = [open_engine(f"hf:{folder}", EngineConfig(device="cpu")) for folder in (one, f"{one}/", two)]
    assert engines[0].id == engines[1].id and engines[0].id.model == "m" and engines[0].id.template_digest
    assert engines[0].id.revision != engines[2].id.revision
    assert engines[0].context_tokens == 2048
    assert asyncio.run(engines[0].tokenize("def")) == tuple(parts[1]("def", add_special_tokens=False)["input_ids"])
    with pytest.raises(ResourceError, match="cannot be loaded"):
        open_engine(f"hf:{tmp_path / 'none'}")


def test_label_candidates():
    assert candidates("Yes")[:3] == ("Yes", " Yes", "\nYes")
