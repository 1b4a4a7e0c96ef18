"""Settings of an engine, apart from its spec: what changes its replies, and how requests travel."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from autointerp.config import RUNTIME, Config


class Prices(Config):
    """Prices in any currency, per million tokens."""

    input: float = Field(default=0.0, ge=0)
    """Prompt tokens that the server had not cached."""
    cached: float | None = Field(default=None, ge=0)
    """Prompt tokens that it had; None = as `input`."""
    output: float = Field(default=0.0, ge=0)
    """Generated tokens, thinking included."""


class EngineConfig(Config):
    """How an engine is opened; the model and its address are in the spec."""

    revision: str | None = None
    """Revision of the weights, where the model's name alone does not say; part of the engine's identity."""
    quantization: str | None = None
    """How the weights are quantised; part of the engine's identity."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Fields added to every request's body (``chat_template_kwargs``, ``reasoning_effort``, ...)."""
    flavour: Literal["auto", "vllm", "openai"] = Field(default="auto", json_schema_extra=RUNTIME)
    """Dialect of a server: vLLM's fields, or only the standard ones. It changes how a request is written, not what it asks."""
    api_key_env: str = Field(default="OPENAI_API_KEY", json_schema_extra=RUNTIME)
    """Name of the environment variable that holds the key; servers on this machine need none."""
    context_tokens: int | None = Field(default=None, ge=1, json_schema_extra=RUNTIME)
    """Longest prompt plus output, where the server does not say."""

    concurrency: int = Field(default=128, ge=1, json_schema_extra=RUNTIME)
    """Most requests in flight per server; the limit in force adapts below it."""
    start_concurrency: int = Field(default=8, ge=1, json_schema_extra=RUNTIME)
    """Limit before the first round of replies."""
    timeout_s: float = Field(default=600.0, gt=0, json_schema_extra=RUNTIME)
    """A request without an answer after this long is sent again."""
    connect_timeout_s: float = Field(default=30.0, gt=0, json_schema_extra=RUNTIME)
    """Time to open a connection."""
    max_attempts: int = Field(default=6, ge=1, json_schema_extra=RUNTIME)
    """How often a request that fails for the server's reasons is sent; rate limits do not count."""
    backoff_s: float = Field(default=0.5, ge=0, json_schema_extra=RUNTIME)
    """Longest first wait before another attempt; it doubles with each."""
    backoff_cap_s: float = Field(default=30.0, ge=0, json_schema_extra=RUNTIME)
    """Longest wait of the server's making none."""
    max_wait_s: float = Field(default=900.0, ge=0, json_schema_extra=RUNTIME)
    """A server that asks for a longer wait, or refuses every request for twice as long, stops the run."""
    retry_frac: float = Field(default=0.1, ge=0, le=1, json_schema_extra=RUNTIME)
    """Attempts beyond this share of the traffic wait `backoff_cap_s`, so that retries cannot flood a failing server."""
    stop_after_failures: int = Field(default=20, ge=1, json_schema_extra=RUNTIME)
    """So many failures in a row, over at least `stop_after_s`, and the run stops."""
    stop_after_s: float = Field(default=60.0, ge=0, json_schema_extra=RUNTIME)
    """See `stop_after_failures`; a server that cannot be reached at all stops the run after this long."""

    device: str = Field(default="auto", json_schema_extra=RUNTIME)
    """Where a model in this process runs: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    dtype: str = "auto"
    """Numbers of a model in this process: ``float32``, ``bfloat16``, ``float16``; ``auto``: float32 on a CPU, else bfloat16."""
    batch_size: int = Field(default=8, ge=1, json_schema_extra=RUNTIME)
    """Requests that an ``hf:`` engine runs together; 1 makes replies independent of their company to the last bit."""
    engine_args: dict[str, Any] = Field(default_factory=dict, json_schema_extra=RUNTIME)
    """Arguments of vLLM's engine (``gpu_memory_utilization``, ``max_model_len``, ...) for ``vllm:`` in this process."""

    prices: Prices = Field(default_factory=Prices, json_schema_extra=RUNTIME)
    """What tokens cost; used by `max_cost` and the cost columns of a plan."""
    max_requests: int | None = Field(default=None, ge=0, json_schema_extra=RUNTIME)
    """Stop before sending more than this many requests."""
    max_cost: float | None = Field(default=None, ge=0, json_schema_extra=RUNTIME)
    """Stop before spending more than this, in the currency of `prices`."""
