"""The explainers that look at the token itself, against cases worked by hand."""

from dataclasses import replace

import numpy as np
import pytest
from planted import ID, VOCABULARY, planted, resources, run

from autointerp.errors import ConfigError
from autointerp.explainers.lookup import Lookup, LookupConfig, outstanding, table
from autointerp.explainers.single_token import SingleToken, SingleTokenConfig, single_token
from autointerp.explainers.tokens import count, flat
from autointerp.jobs.methods import build_explainer
from autointerp.records import Examples
from autointerp.rules import Rule

CAT, SAT, THE, OF = ID[" cat"], ID[" sat"], ID[" the"], ID[" of"]


def block(*rows, width=4, positions=None):
    """Examples of rows of (token, activation) pairs; rows without activity are silent windows."""
    tokens = np.zeros((len(rows), width), np.uint32)
    activations = np.zeros((len(rows), width), np.float32)
    for i, row in enumerate(rows):
        for t, (token, activation) in enumerate(row):
            tokens[i, t], activations[i, t] = token, activation
    is_active = activations.any(axis=1)
    return Examples(
        tokens=tokens,
        activations=activations,
        lengths=np.array([len(row) for row in rows], np.int32),
        positions=np.arange(len(rows)) * width if positions is None else np.array(positions),
        documents=np.arange(len(rows)),
        quantiles=np.where(is_active, 0, -1).astype(np.int16),
        sources=tuple("positive" if active else "random" for active in is_active),
    )


def ranked(*tokens):
    """One window per activation, strongest first."""
    return block(*([(token, float(len(tokens) - i))] for i, token in enumerate(tokens)))


def row_of(explainer, examples):
    [row] = run(explainer.explain(replace(planted(), explain_statistics=examples), resources()))
    return row


# Counts -----------------------------------------------------------------------------------------------------------


def test_counts_by_hand():
    counts = count(block([(CAT, 2), (SAT, 0), (CAT, 0)], [(CAT, -1)], [(SAT, 0), (THE, 0)]))
    assert dict(zip(counts.ids.tolist(), counts.num.tolist(), strict=True)) == {CAT: 3, SAT: 2, THE: 1}
    assert dict(zip(counts.ids.tolist(), counts.num_active.tolist(), strict=True)) == {CAT: 2, SAT: 0, THE: 0}
    assert dict(zip(counts.ids.tolist(), counts.total.tolist(), strict=True)) == {CAT: 3, SAT: 0, THE: 0}


def test_padding_is_no_token_and_overlapping_windows_count_once():
    assert len(flat(block([(CAT, 1)], [(SAT, 1)]))[0]) == 2
    overlapping = block([(CAT, 1), (SAT, 2)], [(SAT, 2), (THE, 0)], positions=[10, 11])
    ids, strength, positions = flat(overlapping)
    assert (ids.tolist(), strength.tolist(), positions.tolist()) == ([CAT, SAT, THE], [1, 2, 0], [10, 11, 12])


# Single token -----------------------------------------------------------------------------------------------------


def test_names_the_token_and_gives_the_rule():
    examples = block(*[[(THE, 0), (CAT, 1 + i)] for i in range(30)], [(CAT, 0), (SAT, 0)], [(SAT, 0), (CAT, 0)])
    row = row_of(SingleToken(), examples)
    assert (row.status, row.text, row.num_examples, row.num_negatives) == ("ok", "the token ` cat`", 30, 2)
    rule = Rule.from_json(row.rule)
    tokens = np.array([[SAT, CAT, THE, CAT]], np.uint32)
    assert rule.predict(tokens, np.array([4]), VOCABULARY).tolist() == [[False, True, False, True]]
    assert rule.clauses[0].score == 30 / 32


def test_the_shares_are_strict_and_of_the_strongest():
    config = SingleTokenConfig(strength="weak", num_top=10, num_drawn=1000)
    # 9 of the 10 strongest is not more than 90%; the weaker ones, of which the half is drawn, are mixed.
    mixed = [SAT, THE, OF] * 30
    assert single_token(ranked(*[CAT] * 9, SAT, *mixed), config, seed=0) is None
    assert single_token(ranked(*[CAT] * 10, *mixed), config, seed=0) == CAT
    # The weakest are all one token and the strongest are not: delphi's order would say yes.
    assert single_token(ranked(*mixed, *[CAT] * 90), config, seed=0) is None


def test_totals_count_and_not_runs():
    # 92% of cats that no run of 46 cats holds.
    tokens = [CAT] * 100
    tokens[5::13] = [SAT] * 8
    assert single_token(ranked(*tokens), SingleTokenConfig(), seed=0) == CAT


def test_strong_needs_both_and_the_same_token():
    top_only = ranked(*[CAT] * 10, *[SAT, THE, OF] * 30)
    options = {"num_top": 10, "num_drawn": 1000}
    assert single_token(top_only, SingleTokenConfig(strength="weak", **options), seed=0) == CAT
    assert single_token(top_only, SingleTokenConfig(**options), seed=0) is None
    # The ten strongest are cats; 90 of the 100 in the stronger half are another token.
    other = ranked(*[CAT] * 10, *[SAT] * 190)
    assert single_token(other, SingleTokenConfig(**options), seed=0) is None
    assert single_token(other, SingleTokenConfig(strength="weak", **options), seed=0) == CAT


def test_the_draw_is_of_the_stronger_half_and_seeded():
    half = ranked(*[CAT, CAT, CAT, CAT, SAT] * 40, *[THE] * 200)
    config = SingleTokenConfig(strength="weak", num_drawn=1000)
    assert single_token(half, config, seed=0) == CAT  # 80% of the half; 40% of all
    few = SingleTokenConfig(strength="weak", num_drawn=4)
    assert {single_token(half, few, seed=seed) for seed in range(40)} == {CAT, None}
    assert single_token(half, few, seed=3) == single_token(half, few, seed=3)


def test_a_latent_of_several_tokens_is_not_applicable():
    row = row_of(SingleToken(), ranked(*[CAT, SAT] * 30))
    assert (row.status, row.text, row.rule) == ("not_applicable", None, None)
    silent = block([(CAT, 0)], [(SAT, 0)])
    assert row_of(SingleToken(), silent).status == row_of(SingleToken(), Examples.empty(4)).status == "not_applicable"


# Lookup -----------------------------------------------------------------------------------------------------------

TABLE = block(
    [(CAT, 4), (SAT, 0), (THE, 0)],
    [(CAT, 2), (SAT, 3), (THE, 0)],
    [(CAT, 0), (SAT, 0), (OF, 9)],
    [(SAT, 0), (THE, 0)],
)  # E: cat 6/3 = 2, sat 3/4, the 0, of 9/1; the mean over active tokens is 18/4 = 4.5


def test_the_table_by_hand():
    counts = count(TABLE)
    assert dict(zip(counts.ids.tolist(), table(counts).tolist(), strict=True)) == {CAT: 2, SAT: 0.75, THE: 0, OF: 9}


def test_tokens_above_the_threshold_by_total_activation():
    def named(**config):
        return outstanding(count(TABLE), LookupConfig(**config))

    assert named(threshold=0.44) == [CAT]  # 0.44 * 4.5 = 1.98 < 2; `of` occurs once
    assert named(threshold=0.45) == []
    assert named(threshold=0.44, min_count=1) == [OF, CAT]
    assert named(threshold=0.1) == [CAT, SAT]
    assert named(threshold=0.1, max_tokens=1) == [CAT]
    # A token on which the latent never fires is not named at any threshold.
    assert THE not in named(threshold=1e-9)


def test_silent_windows_count_against_a_token():
    active = [[(CAT, 1), (THE, 1)]] * 10
    silent = [[(THE, 0), (THE, 0), (THE, 0)]] * 10
    assert row_of(Lookup(), block(*active)).text == "the token ` the` or ` cat`"
    assert row_of(Lookup(), block(*active, *silent)).text == "the token ` cat`"


def test_text_and_rule_name_the_same_tokens():
    tokens = [t for t in range(len(VOCABULARY)) if t != THE]
    row = row_of(Lookup(), block(*[[(t, 1 + t), (t, 1 + t), (THE, 0)] for t in tokens]))
    rule = Rule.from_json(row.rule)
    # At most ten: those that carry most.
    assert [clause.conditions[0].value for clause in rule.clauses] == tokens[:-11:-1]
    assert row.text.count("`") == 20
    predicted = rule.predict(np.array([[tokens[-1], THE, tokens[0]]], np.uint32), np.array([3]), VOCABULARY)
    assert predicted.tolist() == [[True, False, False]]


def test_lookup_ignores_context():
    # `path` is active only after `os.`, and half of its occurrences in activating windows are not; the table cannot tell.
    row = run(Lookup(LookupConfig(threshold=0.1)).explain(planted(), resources()))[0]
    assert row.text == "the token `path`"


def test_nothing_outstanding_is_not_applicable():
    once = block(*[[(t, 1), (THE, 0)] for t in range(len(VOCABULARY)) if t != THE])
    for examples in (once, Examples.empty(4), block([(CAT, 0), (CAT, 0)])):
        row = row_of(Lookup(), examples)
        assert (row.status, row.text, row.rule) == ("not_applicable", None, None)


# Both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explainer", [SingleToken(), Lookup()], ids=["single_token", "lookup"])
def test_only_the_explain_statistics_are_read(explainer):
    latent = replace(planted(), explain_statistics=ranked(*[CAT] * 20))
    nothing = Examples.empty(16)
    other = replace(latent, explain=nothing, explain_negatives=nothing, positives=nothing, negatives=nothing)
    [row] = run(explainer.explain(latent, resources()))
    assert row.status == "ok" and [row] == run(explainer.explain(other, resources()))


@pytest.mark.parametrize("explainer", [SingleToken(), Lookup()], ids=["single_token", "lookup"])
def test_negative_activations_count_as_active(explainer):
    examples = ranked(*[CAT] * 20)
    mirrored = replace(examples, activations=-examples.activations)
    assert row_of(explainer, mirrored) == row_of(explainer, examples)


@pytest.mark.parametrize("name", ["single_token", "lookup"])
def test_asks_nobody_and_is_in_the_registry(name):
    explainer = build_explainer(name, {})
    assert explainer.name == name and not explainer.needs.engine
    assert explainer.requests(planted(), resources()) == []
    with pytest.raises(ConfigError, match="unknown"):
        build_explainer(name, {"colour": 1})
