"""Scorers that a rule can judge in place of an LLM: what they ask is answered by the explanation's own rule."""

import numpy as np
import pytest
from planted import ID, VOCABULARY, explained, headline, planted, resources, run

from autointerp.jobs.methods import build_scorer
from autointerp.jobs.score_controls import by_rule
from autointerp.rules import Clause, Condition, Rule
from autointerp.scorers import REGISTRY

BY_RULE = ["detection", "fuzzing", "simulation", "saebench", "delphi_detection", "delphi_fuzzing"]


def rule_of(*clauses):
    """A rule from (score, {offset: word}) pairs."""
    return Rule(
        clauses=tuple(
            Clause(conditions=tuple(Condition(kind="word", offset=at, value=word) for at, word in words.items()), score=score)
            for score, words in clauses
        )
    )


TRUE = Rule(
    clauses=(
        Clause(
            conditions=(
                Condition(kind="word", offset=0, value="path"),
                Condition(kind="token", offset=-1, value=ID["."]),
                Condition(kind="word", offset=-2, value="os"),
            ),
            score=1.0,
        ),
    )
)
BROAD = rule_of((0.5, {0: "path"}))
WRONG = rule_of((1.0, {0: "instructions", -1: "all"}))


def scored(name, rule, **options):
    scorer = build_scorer(name, {"judge": "rule", **options})
    latent = planted(num=50, width=32)
    return run(scorer.score(latent, explained(rule=rule and rule.to_json()), resources())), latent


def test_these_and_no_others_have_a_judge_by_rule():
    found = [name for name in REGISTRY if by_rule(build_scorer(name, {})) is not None]
    assert sorted(found) == sorted(BY_RULE)
    for name in found:
        judge = by_rule(build_scorer(name, {}))
        assert judge.name == build_scorer(name, {}).name and not judge.needs.engine
        assert judge.identity() != build_scorer(name, {}).identity()
        assert judge.requests(planted(), explained(rule=TRUE.to_json()), resources()) == []


@pytest.mark.parametrize("name", BY_RULE)
def test_the_truth_is_above_the_wrong_and_an_explanation_without_a_rule_has_no_score(name):
    true, wrong = headline(scored(name, TRUE)[0]), headline(scored(name, WRONG)[0])
    assert true.judge == wrong.judge == "rule" and true.status == "ok"
    assert true.value > 0.95 and (wrong.value is None or wrong.value < true.value - 0.2)
    without = headline(scored(name, None)[0])
    assert without.status == "not_applicable" and without.value is None


def test_saebench_counts_the_windows_that_the_rule_gets_right():
    result, _ = scored("saebench", BROAD)
    verdicts = result.verdicts
    assert len(verdicts) == 14 and all(v.status == "ok" and v.probability in (0.0, 0.5) for v in verdicts)
    assert headline(result).value == pytest.approx(sum(v.answer == v.truth for v in verdicts) / 14)
    assert all(v.answer for v in verdicts if v.truth)
    # The decoy stands at the beginning of each silent window, and the cut about a random token has it or has it not.
    assert 0 < sum(v.answer for v in verdicts if not v.truth) < 10


@pytest.mark.parametrize(("rule", "level"), [(TRUE, 10.0), (BROAD, 5.0)])
def test_simulation_correlates_the_rules_scores_with_the_activations(rule, level):
    result, latent = scored("simulation", rule)
    tokens = np.concatenate([latent.positives.tokens, latent.negatives.tokens])
    truths = np.concatenate([latent.positives.activations, latent.negatives.activations])
    predicted = np.zeros(tokens.shape)
    for row, place in np.argwhere(tokens == ID["path"]):
        after_os = place > 1 and tokens[row, place - 1] == ID["."] and tokens[row, place - 2] == ID["os"]
        predicted[row, place] = level if after_os or rule is BROAD else 0
    assert [list(v.answers) for v in result.verdicts] == predicted.tolist()
    [all_windows] = [s for s in result.scores if s.metric == "correlation" and s.is_headline]
    assert all_windows.value == pytest.approx(np.corrcoef(predicted.ravel(), truths.ravel())[0, 1])
    assert all_windows.chance == 0 and result.verdicts[0].scorer == "simulation"
    assert VOCABULARY.text(tokens[0][predicted[0] > 0][:1]) == "path"


def test_a_rule_that_never_matches_predicts_nothing_to_correlate():
    never = rule_of((1.0, {0: "nowhere"}))
    assert headline(scored("simulation", never)[0]).status == "undefined"
    assert headline(scored("saebench", never)[0]).value == pytest.approx(10 / 14)
