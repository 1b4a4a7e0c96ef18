from dataclasses import replace

import numpy as np
import pytest
from planted import ID, VOCABULARY, WORDS, planted, resources, run, windows

from autointerp.errors import ConfigError
from autointerp.explainers.lexical import Lexical, LexicalConfig, learn
from autointerp.records import Examples
from autointerp.rules import MAX_CLAUSES, Rule


def explain(latent, **config):
    [row] = run(Lexical(LexicalConfig(**config)).explain(latent, resources()))
    return row


def fires_where(where, *, num=100, width=16, seed=0):
    """Explain statistics of a latent that fires where `where(tokens)` says."""
    tokens = np.random.default_rng(seed).integers(0, len(WORDS), (6 * num, width)).astype(np.uint32)
    activations = where(tokens).astype(np.float32)
    is_active = activations.any(axis=1)
    rows = np.concatenate([np.flatnonzero(is_active)[:num], np.flatnonzero(~is_active)[:num]])
    num_active = min(num, int(is_active.sum()))
    return Examples(
        tokens=tokens[rows],
        activations=activations[rows],
        lengths=np.full(len(rows), width, np.int32),
        positions=rows * width,
        documents=rows,
        quantiles=np.zeros(len(rows), np.int16),
        sources=("positive",) * num_active + ("random",) * (len(rows) - num_active),
    )


def agreement(rule, where, *, seed=99):
    """Balanced accuracy per token on fresh windows."""
    examples = fires_where(where, seed=seed)
    truth = examples.activations > 0
    found = rule.predict(examples.tokens, examples.lengths, VOCABULARY)
    return (found[truth].mean() + (~found[~truth]).mean()) / 2


def test_finds_a_token_after_two_others():
    row = explain(planted())
    assert row.status == "ok"
    assert row.text.startswith("`path` after ")
    block = windows(200, active=True, seed=123)
    found = Rule.from_json(row.rule).predict(block.tokens, block.lengths, VOCABULARY)
    assert (found == (block.activations > 0)).mean() > 0.99
    assert (row.explainer, row.num_examples, row.num_negatives, row.model) == ("lexical", 100, 100, None)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (lambda t: t == ID[" cat"], "` cat`"),
        (lambda t: np.isin(t, [ID[" 1"], ID[" 23"]]), "digits"),
        (lambda t: np.isin(t, [ID[" Name"], ID[" NAME"]]), "`name`"),
        (lambda t: np.roll(t, 1, axis=1) == ID["("], "after `(`"),
        (lambda t: np.isin(t, [ID["os"], ID[")"], ID[" raise"], ID[" x"]]), "` raise`"),
    ],
    ids=["token", "class", "word", "previous", "union"],
)
def test_finds_rules_of_every_kind(where, words):
    examples = fires_where(where)
    # np.roll wraps: the first token of a window has no neighbour that counts.
    examples.activations[:, 0] = np.where(examples.tokens[:, 0] == 10_000, 1, examples.activations[:, 0])
    rule = learn(examples, VOCABULARY, LexicalConfig())
    assert agreement(rule, where) > 0.9
    row = explain(replace(planted(), explain_statistics=examples))
    assert words in row.text or words.strip("`") in row.text


def test_prefers_the_context_over_the_token_alone():
    rule = Rule.from_json(explain(planted()).rule)
    alone = np.array([[ID[" the"], ID["path"], ID[" cat"]]], np.uint32)
    assert not rule.predict(alone, np.array([3]), VOCABULARY).any()


def test_scores_are_shares_of_the_explain_pool():
    rule = Rule.from_json(explain(planted()).rule)
    assert all(0 < clause.score <= 1 for clause in rule.clauses)
    assert max(clause.score for clause in rule.clauses) > 0.9


def test_bounds_hold_on_noise():
    random = np.random.default_rng(3)
    examples = fires_where(lambda t: random.random(t.shape) < 0.02)
    rule = learn(examples, VOCABULARY, LexicalConfig())
    assert 1 <= len(rule.clauses) <= MAX_CLAUSES
    assert all(len(clause.conditions) <= 3 for clause in rule.clauses)
    small = learn(examples, VOCABULARY, LexicalConfig(max_clauses=2, max_conditions=1))
    assert len(small.clauses) <= 2
    assert all(len(clause.conditions) == 1 for clause in small.clauses)


def test_only_the_explain_statistics_are_read():
    latent = planted()
    other = replace(latent, explain=Examples.empty(16), positives=Examples.empty(16), negatives=Examples.empty(16))
    assert explain(latent) == explain(other)


def test_the_same_examples_give_the_same_rule():
    assert explain(planted()) == explain(planted())


@pytest.mark.parametrize("width", [5, 64, 100])
def test_windows_of_any_width(width):
    where = lambda t: t == ID[" of"]  # noqa: E731  a rule reads best as an expression
    rule = learn(fires_where(where, width=width, num=30), VOCABULARY, LexicalConfig())
    assert agreement(rule, where) > 0.95


def test_negative_activations_count_as_active():
    latent = planted()
    statistics = latent.explain_statistics
    mirrored = replace(latent, explain_statistics=replace(statistics, activations=-statistics.activations))
    assert explain(mirrored).rule == explain(latent).rule


def test_without_silent_windows_and_without_activity():
    latent = planted()
    only = latent.explain_statistics.take(range(100))
    assert explain(replace(latent, explain_statistics=only)).status == "ok"
    silent = latent.explain_statistics.take(range(100, 200))
    row = explain(replace(latent, explain_statistics=silent))
    assert (row.status, row.text, row.rule) == ("not_applicable", None, None)


def test_asks_nobody():
    lexical = Lexical()
    assert not lexical.needs.engine
    assert lexical.requests(planted(), resources()) == []
    assert lexical.identity() == Lexical(LexicalConfig()).identity() != Lexical(LexicalConfig(recent=4)).identity()


def test_unknown_options_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'max_clauses'"):
        LexicalConfig.parse({"max_clause": 3})
