"""A transformers model in this process: for a laptop without a server, and the oracle the other engines are tested against.

Log-probabilities are the model's own, over the whole vocabulary, whatever constraint or temperature is in force. Requests that
wait together are run together, left-padded; with ``batch_size = 1`` a reply does not depend on its company to the last bit.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from autointerp.digest import seed_of
from autointerp.errors import ContextExceeded, Permanent, ReplyError, ResourceError
from autointerp.llm.grammar import Grammar
from autointerp.llm.reply_log import request_key
from autointerp.llm.settings import EngineConfig
from autointerp.llm.thinking import reasoning_tokens, strip_thinking
from autointerp.llm.tokenizing import PromptTokenizer, local_identity
from autointerp.records import Capabilities, EngineId, Reply, Request, TokenLogprob, Usage

# Shapes: B rows, T tokens of a prompt, V vocabulary.
FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot hold; vLLM's servers say the same."""
_SLICE = 256
_LOOKED_AT = 4096


@dataclass
class _Row:
    """One request while it is being answered."""

    request: Request
    ids: list[int]
    future: asyncio.Future[Reply]
    grammar: Grammar | None
    generator: torch.Generator | None
    label_ids: dict[int, int]
    written: list[int] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)
    prompt_tokens: tuple[TokenLogprob, ...] = ()
    label_probs: tuple[float, ...] | None = None
    text: str = ""
    finish: str = ""
    error: Permanent | None = None

    @property
    def group(self) -> tuple[int, bool]:
        """Rows of one group may share a batch: none waits for a much longer one."""
        return self.request.max_tokens, self.request.prompt_logprobs is not None


class HFEngine:
    """A causal language model and its tokenizer, behind `complete`."""

    def __init__(self, name: str, config: EngineConfig | None = None) -> None:
        """Load a folder or a hub model.

        Raises: ResourceError when there is none of that name.
        """
        import transformers

        config = config if config is not None else EngineConfig()
        device = _device(config.device)
        dtype = _dtype(config.dtype, device)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=config.revision)
            model = transformers.AutoModelForCausalLM.from_pretrained(name, revision=config.revision, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ResourceError(f"the model {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        own_name, revision = local_identity(name)
        self._set_up(model.to(device), tokenizer, own_name, revision or getattr(model.config, "_commit_hash", None), config)

    @classmethod
    def of(cls, model: Any, tokenizer: Any, *, name: str, config: EngineConfig | None = None) -> Self:
        """Return an engine over a loaded model; `name` becomes its identity."""
        engine = cls.__new__(cls)
        engine._set_up(model, tokenizer, name, None, config if config is not None else EngineConfig())
        return engine

    def _set_up(self, model: Any, tokenizer: Any, name: str, revision: str | None, config: EngineConfig) -> None:
        self._model = model.eval()
        self._tokenizer = PromptTokenizer(tokenizer, config.extra_body)
        self._config = config
        self.extra_body = config.extra_body
        self.id = EngineId(
            kind="hf",
            model=name,
            revision=config.revision or revision,
            quantization=config.quantization,
            template_digest=self._tokenizer.template_digest,
        )
        length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._context_tokens: int | None = config.context_tokens or length
        accepted = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in accepted
        # Without position ids a left-padded row would be counted from its padding.
        self._batch_size = config.batch_size if "position_ids" in accepted else 1
        self._stop_ids = _stop_ids(model, tokenizer)
        self._waiting: list[_Row] = []
        self._drain: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="autointerp-hf")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(top_logprobs=1000)

    @property
    def context_tokens(self) -> int | None:
        return self._context_tokens

    async def tokenize(self, text: str, /) -> tuple[int, ...]:
        return self._tokenizer.plain(text)

    async def aclose(self) -> None:
        """Wait for the batch under way and end the thread. Safe to call twice."""
        self._thread.shutdown(wait=True)

    async def complete(self, request: Request, /) -> Reply:
        """Answer one request.

        Raises: see :class:`autointerp.protocols.Engine`.
        """
        row = self._row(request)
        self._waiting.append(row)
        if self._drain is None or self._drain.done():
            self._drain = asyncio.ensure_future(self._drain_all())
        return await row.future

    def _row(self, request: Request) -> _Row:
        ids = self._tokenizer.ids(request.prompt)
        if self._context_tokens is not None and len(ids) + request.max_tokens > self._context_tokens:
            raise ContextExceeded(
                f"the prompt has {len(ids)} tokens and asks for {request.max_tokens} more; "
                f"{self.id.model} takes {self._context_tokens}"
            )
        if request.constraint is not None and request.temperature > 0 and request.top_p < 1:
            raise Permanent("an hf: engine cannot combine a constraint with top_p; leave top_p at 1")
        generator = None
        if request.temperature > 0:
            # Samples of one request differ, and each is the same whenever it is drawn.
            seed = seed_of(request.seed) if request.seed is not None else seed_of(request_key(self.id, request))
            generator = torch.Generator().manual_seed(seed % 2**63)
        return _Row(
            request=request,
            ids=ids,
            future=asyncio.get_running_loop().create_future(),
            grammar=None if request.constraint is None else Grammar(request.constraint),
            generator=generator,
            label_ids=self._tokenizer.label_ids(request.labels) if request.labels else {},
        )

    async def _drain_all(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # One turn of the loop lets callers that start together wait together.
            await asyncio.sleep(0)
            self._waiting = [row for row in self._waiting if not row.future.done()]
            if not self._waiting:
                return
            group = self._waiting[0].group
            size = 1 if group[1] else self._batch_size
            batch = [row for row in self._waiting if row.group == group][:size]
            self._waiting = [row for row in self._waiting if row not in batch]
            (result,) = await asyncio.gather(loop.run_in_executor(self._thread, self._run, batch), return_exceptions=True)
            for row in batch:
                if row.future.done():
                    continue
                if isinstance(result, torch.OutOfMemoryError):
                    row.future.set_exception(Permanent(f"{self.id.model} ran out of memory; lower batch_size"))
                elif isinstance(result, BaseException):
                    row.future.set_exception(result)
                else:
                    answer = self._reply(row)
                    row.future.set_result(answer) if isinstance(answer, Reply) else row.future.set_exception(answer)

    @torch.inference_mode()
    def _run(self, batch: list[_Row]) -> None:
        for logits_BV, rows in self._steps(batch):
            for logits_V, row in zip(logits_BV, rows, strict=True):
                if row.finish:
                    continue
                try:
                    self._step(row, logits_V)
                except Permanent as error:
                    # The others of the batch go on.
                    row.error, row.finish = error, "stop"

    def _steps(self, batch: list[_Row]) -> Iterator[tuple[torch.Tensor, list[_Row]]]:
        """Yield float32 logits [B, V] of the next token on the CPU; the rows' last written token is the next input."""
        device = self._model.device
        width = max(len(row.ids) for row in batch)
        ids_BT = torch.tensor([[0] * (width - len(row.ids)) + row.ids for row in batch], device=device)
        mask_BT = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in batch], device=device)
        is_whole = batch[0].request.prompt_logprobs is not None
        cache = None
        while True:
            inputs: dict[str, Any] = {
                "input_ids": ids_BT,
                "attention_mask": mask_BT,
                "use_cache": True,
                "past_key_values": cache,
            }
            if len(batch) > 1:
                inputs["position_ids"] = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
            if self._keeps_logits and not is_whole:
                inputs["logits_to_keep"] = 1
            out = self._model(**inputs)
            if is_whole:
                batch[0].prompt_tokens = self._score_prompt(batch[0], out.logits[0])
                is_whole = False
            yield out.logits[:, -1].float().cpu(), batch
            if all(row.finish for row in batch):
                return
            cache = out.past_key_values
            ids_BT = torch.tensor([[row.written[-1] if row.written else 0] for row in batch], device=device)
            mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], dim=1)

    def _score_prompt(self, row: _Row, logits_TV: torch.Tensor) -> tuple[TokenLogprob, ...]:
        asked = row.request.prompt_logprobs
        assert asked is not None
        tokens = [TokenLogprob(token=self._tokenizer.piece(row.ids[0]), token_id=row.ids[0], logprob=None)]
        for start in range(0, len(row.ids) - 1, _SLICE):
            logprobs = logits_TV[start : min(start + _SLICE, len(row.ids) - 1)].float().log_softmax(-1).cpu()
            for offset, line in enumerate(logprobs):
                position = start + offset + 1
                tokens.append(self._token(row.ids[position], line, asked.top_at(position)))
        return tuple(tokens[asked.start :])

    def _token(self, token_id: int, logprobs_V: torch.Tensor, top: int) -> TokenLogprob:
        values, indices = logprobs_V.topk(min(top, len(logprobs_V))) if top else (torch.empty(0), torch.empty(0))
        alternatives = zip(indices.tolist(), values.tolist(), strict=True)
        return TokenLogprob(
            token=self._tokenizer.piece(token_id),
            token_id=token_id,
            logprob=max(FLOOR, float(logprobs_V[token_id])),
            top=tuple((self._tokenizer.piece(int(other)), max(FLOOR, value)) for other, value in alternatives),
        )

    def _step(self, row: _Row, logits_V: torch.Tensor) -> None:
        request = row.request
        if row.label_ids and row.label_probs is None:
            probs_V = logits_V.softmax(-1)
            probs = [0.0] * len(request.labels)
            for label_id, index in row.label_ids.items():
                probs[index] += float(probs_V[label_id])
            row.label_probs = tuple(probs)
        if request.max_tokens == 0:
            row.finish = "stop"
            return
        token_id = self._choose(row, logits_V)
        if token_id is None:
            row.finish = "stop"
            return
        row.written.append(token_id)
        if request.top_logprobs:
            row.tokens.append(self._token(token_id, logits_V.log_softmax(-1), request.top_logprobs))
        if token_id in self._stop_ids:
            row.finish = "stop"
            return
        row.text = self._tokenizer.text(row.written)
        cut = min((place for stop in request.stop if (place := row.text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            row.text, row.finish = row.text[:cut], "stop"
        elif len(row.written) >= request.max_tokens:
            is_whole = row.grammar is not None and row.grammar.is_complete(row.text)
            row.finish = "stop" if is_whole else "length"
            # A character cut in two by the limit is no character.
            row.text = row.text.rstrip("\ufffd")

    def _choose(self, row: _Row, logits_V: torch.Tensor) -> int | None:
        """Return the next token; None when a constrained reply is complete and cannot go on."""
        scores_V = logits_V
        if row.generator is not None:
            scores_V = logits_V / row.request.temperature
            if row.request.top_p < 1:
                scores_V = _nucleus(scores_V, row.request.top_p)
            # The highest of scores plus Gumbel noise is a draw from their softmax, under any mask applied later.
            uniform_V = torch.rand(len(scores_V), generator=row.generator).clamp_(min=1e-20)
            scores_V = scores_V - torch.log(-torch.log(uniform_V))
        if row.grammar is None:
            return int(scores_V.argmax())
        is_complete = row.grammar.is_complete(row.text)
        # A complete reply need not look at every token for one that could go on.
        size = _LOOKED_AT if is_complete else len(scores_V)
        for index in scores_V.argsort(descending=True).tolist()[:size]:
            token_id = int(index)
            if token_id in self._stop_ids:
                if is_complete:
                    return token_id
                continue
            text = self._tokenizer.text([*row.written, token_id])
            # A character split over tokens shows as U+FFFD until its last byte is there: which one it will be is not known.
            if len(text) > len(row.text) and "\ufffd" not in text and row.grammar.may_begin(text):
                return token_id
        if is_complete:
            return None
        raise Permanent(f"{self.id.model} has no token to go on from {row.text!r} under the request's constraint")

    def _reply(self, row: _Row) -> Reply | ReplyError | Permanent:
        if row.error is not None:
            return row.error
        if row.label_probs is not None and not all(0 <= prob <= 1 for prob in row.label_probs):
            return ReplyError(f"{self.id.model} gave label probabilities that are none: {row.label_probs}")
        stripped = strip_thinking(row.text)
        usage = Usage(
            prompt_tokens=len(row.ids),
            output_tokens=len(row.written),
            reasoning_tokens=reasoning_tokens(len(row.written), stripped.num_thinking_chars, len(row.text)),
        )
        return Reply(
            text=stripped.text,
            finish="length" if row.finish == "length" else "stop",
            tokens=tuple(row.tokens),
            prompt_tokens=row.prompt_tokens,
            label_probs=row.label_probs,
            label_mass=None if row.label_probs is None else sum(row.label_probs),
            usage=usage,
            served_model=self.id.model,
        )


def _nucleus(scores_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the fewest likeliest tokens that hold `top_p` of the probability."""
    ranked, order = scores_V.sort(descending=True)
    probs = ranked.softmax(-1)
    is_out = probs.cumsum(-1) - probs > top_p
    return scores_V.masked_fill(torch.zeros_like(is_out).scatter_(0, order, is_out), float("-inf"))


def _device(name: str) -> str:
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(name: str, device: str) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ResourceError(f"dtype = {name!r} is not known; expected auto, float32, bfloat16 or float16")
    return dtype


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = list(named) if isinstance(named, list | tuple) else [named]
    return frozenset(int(token_id) for token_id in [*ids, tokenizer.eos_token_id] if token_id is not None)
