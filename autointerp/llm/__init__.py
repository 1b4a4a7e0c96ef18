"""Engines: whatever answers LLM requests, and the log that makes sure that no answer is paid twice.

`engines.open_engine` opens one by its spec, `reply_log.LoggedEngine` puts a log and a budget before it. Each engine has a
module: `openai` for servers, `vllm` and `hf` for models in this process, `fake` for tests and plug-ins.
"""

from __future__ import annotations

from autointerp.llm.budget import Budget, BudgetReached
from autointerp.llm.constraints import conforms
from autointerp.llm.engines import check_constraint, open_engine, prepare
from autointerp.llm.fake import FakeEngine
from autointerp.llm.reply_log import LoggedEngine, ReplyLog
from autointerp.llm.settings import EngineConfig, Prices

__all__ = [
    "Budget",
    "BudgetReached",
    "EngineConfig",
    "FakeEngine",
    "LoggedEngine",
    "Prices",
    "ReplyLog",
    "check_constraint",
    "conforms",
    "open_engine",
    "prepare",
]
