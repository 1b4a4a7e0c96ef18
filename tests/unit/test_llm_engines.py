"""Opening engines, the SDK's errors as ours, bodies and replies of the wire format."""

import asyncio
import json

import aiohttp
import httpx2
import openai
import pytest

from autointerp import llm
from autointerp.errors import (
    ConfigError,
    ContextExceeded,
    EngineStopped,
    Permanent,
    RateLimited,
    ReplyError,
    Transient,
)
from autointerp.llm.engines import check_constraint, open_engine
from autointerp.llm.fake import FakeEngine
from autointerp.llm.openai import translate
from autointerp.llm.pacing import Unreachable
from autointerp.llm.settings import EngineConfig
from autointerp.llm.wire import decode, encode
from autointerp.protocols import Engine
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

CHAT = Chat(messages=(("system", "s"), ("user", "u")))


class OwnEngine(FakeEngine):
    def __init__(self, config):
        super().__init__(lambda request: config.api_key_env)


class NotAnEngine:
    def __init__(self, config):
        pass


def test_own_engines_are_opened_by_their_dotted_name():
    engine = open_engine(f"{__name__}:OwnEngine", EngineConfig(api_key_env="X"))
    assert isinstance(engine, Engine)
    assert asyncio.run(engine.complete(Request(prompt=CHAT))).text == "X"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt", "expected openai:MODEL@BASE_URL"),
        ("openai:", "expected openai:MODEL@BASE_URL"),
        ("openai:gpt", "expected openai:MODEL@BASE_URL"),
        ("openai:m@localhost:8000", "expected openai:MODEL@BASE_URL"),
        ("openai:m@http://", "is not a base URL|expected openai"),
        ("opnai:m@http://localhost:1/v1", "unknown kind 'opnai'; did you mean 'openai'"),
        ("no.such.module:Engine", "there is no module 'no.such.module'"),
        ("autointerp.llm.fake:NoSuch", "has no 'NoSuch'"),
        (f"{__name__}:NotAnEngine", "is not one"),
    ],
)
def test_specs_that_cannot_be_opened(spec, message):
    with pytest.raises(ConfigError, match=message):
        open_engine(spec)


def test_keys(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"no key for api.example.com: the environment variable OPENAI_API_KEY is not set"):
        open_engine("openai:m@https://api.example.com/v1")
    local = open_engine("openai:m@http://localhost:1/v1,http://127.0.0.1:2/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-1234")
    monkeypatch.setenv("OTHER", "another-secret")
    still_local = open_engine("openai:m@http://localhost:1/v1")
    hosted = open_engine("openai:m@https://api.example.com/v1")
    named = open_engine("openai:m@http://localhost:1/v1", EngineConfig(api_key_env="OTHER"))
    none = open_engine("openai:m@https://gpu7.example.com/v1", EngineConfig(api_key_env=""))
    engines = [local, still_local, hosted, named, none]
    keys = [engine.pacer.endpoints[0].target.client.api_key for engine in engines]
    assert keys == ["none", "none", "sk-very-secret-1234", "another-secret", "none"]
    assert all("secret" not in repr(vars(engine.id)) for engine in engines)


def test_an_engines_identity_has_no_address(monkeypatch):
    one = open_engine("openai:org/m@v2@http://localhost:1/v1", EngineConfig(revision="abc"))
    two = open_engine("openai:org/m@v2@http://127.0.0.1:2/v1,http://127.0.0.1:3/v1", EngineConfig(revision="abc"))
    assert one.id == two.id and one.id.model == "org/m@v2" and one.id.revision == "abc"


def test_user_and_password_of_a_url_stay_out_of_names():
    engine = open_engine("openai:m@http://me:hush@localhost:1/v1")
    assert [endpoint.name for endpoint in engine.pacer.endpoints] == ["http://localhost:1/v1"]


def test_settings_say_which_of_them_are_identity():
    assert set(EngineConfig().identity()) == {"revision", "quantization", "extra_body", "dtype"}
    with pytest.raises(ConfigError, match="did you mean 'concurrency'"):
        EngineConfig.parse({"concurency": 3})


def test_a_server_that_ignores_constraints_is_found_out():
    with pytest.raises(ConfigError, match=r"ignores output constraints.*'Blue.'"):
        asyncio.run(check_constraint(FakeEngine(lambda request: "Blue.")))
    asyncio.run(check_constraint(FakeEngine(lambda request: request.constraint.options[0])))


def test_a_model_without_a_template_is_asked_in_text():
    def answer(request):
        return Permanent("no chat template") if isinstance(request.prompt, Chat) else request.constraint.options[1]

    asyncio.run(check_constraint(FakeEngine(answer)))


def status_error(status, body=None, headers=None):
    response = httpx2.Response(status, headers=headers, json=body, request=httpx2.Request("POST", "http://h/v1"))
    return openai.OpenAI(api_key="x", base_url="http://h/v1")._make_status_error_from_response(response)


def failure(message, code=None):
    return {"error": {"message": message, "code": code, "type": "t"}}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (status_error(400, failure("bad field")), Permanent),
        (status_error(400, failure("x", "context_length_exceeded")), ContextExceeded),
        (status_error(400, failure("This model's maximum context length is 10 tokens")), ContextExceeded),
        (status_error(400, {"message": "prompt is too long: 9 tokens"}), ContextExceeded),
        (status_error(413, failure("input exceeds the max size")), ContextExceeded),
        (status_error(401, failure("bad key")), EngineStopped),
        (status_error(402, failure("pay")), EngineStopped),
        (status_error(403, failure("no")), EngineStopped),
        (status_error(404, failure("no model")), EngineStopped),
        (status_error(405), EngineStopped),
        (status_error(408), Transient),
        (status_error(409), Transient),
        (status_error(418), Permanent),
        (status_error(422, failure("bad type")), Permanent),
        (status_error(429, failure("slow down")), RateLimited),
        (status_error(429, failure("You exceeded your current quota", "insufficient_quota")), EngineStopped),
        (status_error(500), Transient),
        (status_error(502, None), Transient),
        (status_error(503, failure("queue full")), RateLimited),
        (status_error(529, failure("overloaded")), RateLimited),
        (openai.APITimeoutError(httpx2.Request("POST", "http://h")), Transient),
        (openai.APIConnectionError(request=httpx2.Request("POST", "http://h")), Transient),
        (openai.OpenAIError("odd"), Permanent),
    ],
)
def test_every_sdk_error_has_its_place(error, kind):
    assert type(translate(error, "http://h/v1", wall=0.0)) is kind or (
        kind is EngineStopped and isinstance(translate(error, "http://h/v1", wall=0.0), EngineStopped)
    )


def test_a_refused_connection_is_unreachable():
    error = openai.APIConnectionError(request=httpx2.Request("POST", "http://h"))
    error.__cause__ = httpx2.ConnectError("refused")
    assert type(translate(error, "http://h/v1", wall=0.0)) is Unreachable
    # What a dropped connection looks like through the SDK's aiohttp transport.
    dropped = openai.APITimeoutError(httpx2.Request("POST", "http://h"))
    dropped.__cause__ = httpx2.ConnectTimeout("Server disconnected")
    dropped.__cause__.__cause__ = aiohttp.ServerDisconnectedError()
    assert type(translate(dropped, "http://h/v1", wall=0.0)) is Transient


def test_waits_are_read_from_headers():
    assert translate(status_error(429, None, {"Retry-After": "12"}), "u", wall=0.0).retry_after_s == 12
    assert translate(status_error(503, None, {"retry-after-ms": "1500"}), "u", wall=0.0).retry_after_s == 1.5
    assert translate(status_error(503), "u", wall=0.0).retry_after_s is None


def test_keys_are_blotted_out_of_messages():
    error = status_error(401, failure("Incorrect API key provided: sk-abcdefgh12345678, or hush-hush\x1b[31m"))
    text = str(translate(error, "http://h/v1", wall=0.0, secrets=("hush-hush",)))
    assert "sk-abc" not in text and "hush" not in text and "\x1b" not in text and text.count("[key]") == 2


def body(request, *, flavour="vllm", label_ids=(), extra=()):
    return encode(request, model="m", flavour=flavour, label_ids=dict(label_ids), extra_body=dict(extra)).body


def test_chat_text_and_ids_go_to_their_endpoints():
    wires = [
        encode(Request(prompt=prompt), model="m", flavour="openai", label_ids={}, extra_body={})
        for prompt in (CHAT, Text(text="t"), TokenIds(ids=(1, 2)))
    ]
    assert [wire.path for wire in wires] == ["/chat/completions", "/completions", "/completions"]
    assert wires[0].body == {
        "model": "m",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "max_tokens": 64,
        "temperature": 0.0,
    }
    assert wires[1].body["prompt"] == "t" and wires[2].body["prompt"] == [1, 2]


def test_sampling_fields():
    request = Request(prompt=CHAT, temperature=0.5, top_p=0.9, stop=("x",), seed=3, sample=7)
    sent = body(request, flavour="openai")
    assert sent | {"temperature": 0.5, "top_p": 0.9, "stop": ["x"], "seed": 3} == sent and "sample" not in sent
    assert body(request) | {"top_k": 0, "repetition_penalty": 1.0} == body(request)
    assert body(request, extra={"reasoning_effort": "low"})["reasoning_effort"] == "low"


@pytest.mark.parametrize(
    ("constraint", "field"),
    [
        (Choice(options=("a", "b")), {"choice": ["a", "b"]}),
        (Regex(pattern="a+"), {"regex": "a+"}),
        (JsonSchema(schema='{"type":"null"}'), {"regex": "null"}),
        (JsonSchema(schema='{"type":"number","minimum":0}'), {"json": {"type": "number", "minimum": 0}}),
    ],
)
def test_constraints_in_both_dialects(constraint, field):
    request = Request(prompt=CHAT, constraint=constraint)
    assert body(request)["structured_outputs"] == field and "response_format" not in body(request)
    standard = body(request, flavour="openai")
    assert standard["response_format"]["json_schema"]["schema"]["required"] == ["answer"]
    assert "structured_outputs" not in standard and standard["max_tokens"] > 64


def test_labels_by_id_and_by_text():
    request = Request(prompt=CHAT, labels=("Yes", "No"), max_tokens=1)
    by_id = body(request, label_ids={5: 0, 3: 1, 9: 0})
    assert by_id["logprob_token_ids"] == [3, 5, 9] and by_id["logprobs"] is True
    assert body(request)["top_logprobs"] == 20 and body(request, flavour="openai", label_ids={5: 0})["top_logprobs"] == 20
    completion = Request(prompt=Text(text="t"), labels=("Yes",), max_tokens=1)
    assert body(completion, label_ids={5: 0})["logprobs"] == 1 and body(completion)["logprobs"] == 20


def test_prompt_logprobs_need_vllm():
    request = Request(prompt=TokenIds(ids=(1,)), max_tokens=0, prompt_logprobs=PromptLogprobs(top=2))
    assert body(request) | {"prompt_logprobs": 2, "return_token_ids": True, "max_tokens": 1} == body(request)
    with pytest.raises(Permanent, match="no log-probabilities of the prompt"):
        body(request, flavour="openai")


def reply(request, value, *, flavour="openai", label_ids=()):
    wire = encode(request, model="m", flavour=flavour, label_ids=dict(label_ids), extra_body={})
    return decode(wire, value if isinstance(value, str) else json.dumps(value))


def chat_body(content, finish="stop", **fields):
    message = {"role": "assistant", "content": content} | fields.pop("message", {})
    return {"model": "served", "choices": [{"message": message, "finish_reason": finish} | fields.pop("choice", {})]} | fields


ASK = Request(prompt=CHAT)


def test_a_reply_is_read():
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 8},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    got = reply(ASK, chat_body("hi", "length", usage=usage))
    assert (got.text, got.finish, got.served_model) == ("hi", "length", "served")
    assert (got.usage.prompt_tokens, got.usage.cached_tokens, got.usage.output_tokens, got.usage.reasoning_tokens) == (
        9,
        8,
        4,
        2,
    )
    assert reply(ASK, chat_body("", "content_filter")).finish == "filter"
    assert reply(ASK, chat_body(None, "content_filter")).finish == "filter"
    assert reply(ASK, chat_body(None, message={"refusal": "no."})).text == "no."
    assert reply(ASK, chat_body(None, message={"refusal": "no."})).finish == "filter"
    assert reply(ASK, chat_body(None, "length", message={"reasoning": "hmm"})).text == ""


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("", Transient, "empty body"),
        ("  \n", Transient, "empty body"),
        ('{"choices": [{"mess', Transient, "no valid JSON"),
        ("<html>Bad gateway</html>", Transient, "an HTML page"),
        ("[1, 2]", ReplyError, "a JSON list"),
        ("null", ReplyError, "a JSON NoneType"),
        ({}, ReplyError, "has no choices"),
        ({"choices": []}, ReplyError, "has no choices"),
        ({"choices": "x"}, ReplyError, "has no choices"),
        ({"choices": [3]}, ReplyError, "has no choices"),
        ({"error": {"message": "upstream"}}, Transient, "upstream"),
        ({"choices": [{}]}, ReplyError, "has no message"),
        (chat_body(None), ReplyError, "has no content"),
        (chat_body(3), ReplyError, "content of type int"),
        (chat_body(["a"]), ReplyError, "content of type list"),
        (chat_body("x", None), ReplyError, "finish_reason None"),
        (chat_body("x", "tired"), ReplyError, "finish_reason 'tired'"),
        (chat_body("x", {"a": 1}), ReplyError, "finish_reason"),
        (chat_body("x", "abort"), Transient, "gave the request up"),
    ],
)
def test_nothing_is_made_of_what_is_no_reply(value, kind, message):
    with pytest.raises(kind, match=message) as caught:
        reply(ASK, value)
    if kind is ReplyError and value not in ("null",):
        assert caught.value.raw


@pytest.mark.parametrize("usage", [None, "x", [], {"prompt_tokens": "many"}, {"prompt_tokens": -1, "completion_tokens": True}])
def test_an_odd_usage_counts_nothing(usage):
    assert reply(ASK, chat_body("x", usage=usage)).usage.prompt_tokens == 0


def logprobs(*rows):
    entries = [{"token": t, "logprob": v, "top_logprobs": [{"token": a, "logprob": b} for a, b in top]} for t, v, top in rows]
    return {"logprobs": {"content": entries}}


def test_labels_are_whole_tokens():
    top = [("Yes", -1.0), (" Yes", -2.0), ("Yesterday", -0.5), ("yes", -0.6), ("No", -3.0)]
    ask = Request(prompt=CHAT, labels=("Yes", "No", "Maybe"), max_tokens=1)
    got = reply(ask, chat_body("Yesterday", "length", choice=logprobs(("Yesterday", -0.5, top))))
    # e^-1 + e^-2 = 0.503215, e^-3 = 0.049787
    assert got.label_probs == pytest.approx((0.503215, 0.049787, 0.0), abs=1e-6)
    assert got.label_mass == pytest.approx(0.553002, abs=1e-6)
    by_id = [("token_id:7", -1.0), ("token_id:8", -2.0), ("token_id:9", -9999.0)]
    row = logprobs(("token_id:3", -0.1, by_id))
    got = reply(ask, chat_body("x", "length", choice=row), flavour="vllm", label_ids={7: 0, 8: 1, 9: 2})
    assert got.label_probs == pytest.approx((0.367879, 0.135335, 0.0), abs=1e-6)


def test_missing_or_broken_label_probabilities_are_errors():
    ask = Request(prompt=CHAT, labels=("Yes",), max_tokens=1)
    with pytest.raises(Permanent, match="gave no log-probabilities"):
        reply(ask, chat_body("Yes"))
    with pytest.raises(ReplyError, match="no first token"):
        reply(ask, chat_body("", choice=logprobs()))
    with pytest.raises(ReplyError, match="out of range"):
        reply(ask, chat_body("Yes", choice=logprobs(("Yes", 3.0, []))))
    with pytest.raises(ReplyError, match="unknown form"):
        reply(ask, chat_body("Yes", choice={"logprobs": {"content": [{"token": "Yes"}]}}))
    with pytest.raises(Permanent, match="logprob_token_ids"):
        reply(ask, chat_body("Yes", choice=logprobs(("Yes", -0.1, [("Yes", -0.1)]))), flavour="vllm", label_ids={7: 0})


def test_alternatives_lost_in_the_servers_batch_are_asked_for_again():
    ask = Request(prompt=CHAT, top_logprobs=2, max_tokens=1)
    good = logprobs(("a", -0.1, [("a", -0.1), ("b", -3.0), ("c", -4.0)]))
    assert reply(ask, chat_body("a", choice=good)).tokens[0].top == (("a", -0.1), ("b", -3.0))
    with pytest.raises(Transient, match="lost the alternatives"):
        reply(ask, chat_body("a", choice=logprobs(("a", -0.1, [("a", -0.1), ("!", -9999.0)]))))


def test_prompt_logprobs_are_read():
    rows = [None, {"5": {"logprob": -2.0, "decoded_token": "b"}, "6": {"logprob": -0.5, "decoded_token": "c"}}]
    ask = Request(prompt=TokenIds(ids=(4, 5)), max_tokens=0, prompt_logprobs=PromptLogprobs(top=1))
    value = {"choices": [{"text": "x", "finish_reason": "length", "prompt_logprobs": rows, "prompt_token_ids": [4, 5]}]}
    got = reply(ask, value, flavour="vllm")
    assert (got.text, got.finish) == ("", "stop")
    assert [(token.token_id, token.logprob) for token in got.prompt_tokens] == [(4, None), (5, -2.0)]
    assert got.prompt_tokens[1].top == (("c", -0.5),)
    del value["choices"][0]["prompt_logprobs"]
    with pytest.raises(Permanent, match="no log-probabilities of the prompt"):
        reply(ask, value, flavour="vllm")


def test_thinking_is_counted_where_the_server_does_not():
    usage = {"prompt_tokens": 1, "completion_tokens": 10}
    got = reply(ASK, chat_body("<think>123456</think>yes!!", usage=usage))
    assert got.text == "yes!!" and got.usage.reasoning_tokens == round(10 * 21 / 26)
    endless = reply(ASK, chat_body("<think>on and on", "length", usage=usage))
    assert (endless.text, endless.finish, endless.usage.reasoning_tokens) == ("", "length", 10)


def test_public_names():
    assert all(getattr(llm, name) is not None for name in llm.__all__)
