"""Which scorers need no LLM, and how they are set to do without."""

import pytest

from autointerp.errors import ConfigError
from autointerp.jobs.methods import build_scorer
from autointerp.jobs.score import without_llm
from autointerp.scorers import REGISTRY


def test_all_are_divided_by_what_they_need():
    found, others = without_llm(["all"], has_embedder=True)
    assert {scorer.name for scorer in others} == {"surprisal", "intruder"}
    assert set(found) | {scorer.name for scorer in others} == set(REGISTRY)
    for name, options in found.items():
        needs = build_scorer(name, options).needs
        assert not needs.engine and needs.embedder == (name in ("embedding", "example_embedding"))
    without, more = without_llm(["all"], has_embedder=False)
    assert {scorer.name for scorer in more} == {"surprisal", "intruder", "embedding", "example_embedding"}
    assert all(options == {"judge": "rule"} for options in without.values()) and set(without) < set(found)


def test_named_scorers_keep_their_order_and_are_taken_once():
    found, others = without_llm(["fuzzing", "intruder", "detection", "fuzzing"], has_embedder=False)
    assert list(found) == ["fuzzing", "detection"] and [scorer.name for scorer in others] == ["intruder"]
    with pytest.raises(ConfigError, match="there is no scorer 'fuzing'"):
        without_llm(["fuzing"], has_embedder=False)
