import numpy as np
import pytest
from planted import ID, VOCABULARY, explained, headline, planted, resources, run

from autointerp.rules import Clause, Condition, Rule
from autointerp.scorers.detection import Detection, DetectionConfig
from autointerp.scorers.fuzzing import Fuzzing, FuzzingConfig
from autointerp.scorers.items import Item
from autointerp.scorers.rule_judge import judge_by_rule

TRUE = Rule(
    clauses=(
        Clause(
            conditions=(
                Condition(kind="token", offset=0, value=ID["path"]),
                Condition(kind="token", offset=-1, value=ID["."]),
                Condition(kind="token", offset=-2, value=ID["os"]),
            ),
            score=0.9,
        ),
    )
)
OTHER = Rule(clauses=(Clause(conditions=(Condition(kind="token", offset=0, value=ID[" cat"]),), score=0.9),))


def item(words, mask=None):
    tokens = np.array([ID[word] for word in words], np.uint32)
    mask = None if mask is None else np.array(mask, bool)
    return Item(
        example_idx=0,
        truth=True,
        position=0,
        document=0,
        source="positive",
        quantile=0,
        padded=tokens,
        length=len(words),
        mask=mask,
    )


def judged(rule, *args):
    [answer] = judge_by_rule(rule, [item(*args)], VOCABULARY)
    return answer.answer, answer.probability


def test_detection_takes_any_token_and_its_greatest_score():
    assert judged(TRUE, ["os", ".", "path", " the"]) == (True, pytest.approx(0.9))
    assert judged(TRUE, ["os", " the", "path", " the"]) == (False, 0.0)


def test_fuzzing_takes_half_of_the_highlighted_tokens():
    words = ["os", ".", "path", " the"]
    assert judged(TRUE, words, [0, 0, 1, 0]) == (True, pytest.approx(0.9))
    assert judged(TRUE, words, [0, 1, 1, 0]) == (True, pytest.approx(0.45))
    assert judged(TRUE, words, [1, 1, 1, 0]) == (False, pytest.approx(0.3))
    assert judged(TRUE, words, [0, 0, 0, 1]) == (False, 0.0)


SCORERS = [
    Detection(DetectionConfig(judge="rule")),
    Fuzzing(FuzzingConfig(judge="rule")),
    Fuzzing(FuzzingConfig(judge="rule", variant="active")),
]


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda s: s.name)
def test_the_true_rule_scores_one_and_another_chance(scorer):
    assert not scorer.needs.engine
    right = run(scorer.score(planted(), explained(rule=TRUE.to_json()), resources()))
    wrong = run(scorer.score(planted(), explained(rule=OTHER.to_json()), resources(), control="shuffled"))
    assert headline(right).value == 1.0
    assert headline(right).judge == "rule"
    assert abs(headline(wrong).value - 0.5) < 0.1
    assert {v.control for v in wrong.verdicts} == {"shuffled"}
    assert all(v.status == "ok" and v.probability is not None for v in right.verdicts)


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda s: s.name)
def test_an_explanation_without_a_rule_is_not_applicable(scorer):
    result = run(scorer.score(planted(), explained(), resources()))
    assert result.verdicts == ()
    assert [(row.status, row.is_headline) for row in result.scores] == [("not_applicable", True)]
    assert scorer.requests(planted(), explained(), resources()) == []
