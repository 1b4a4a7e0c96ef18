from dataclasses import replace

import numpy as np
import pytest
from planted import explained, planted

from autointerp import stats
from autointerp.records import Verdict
from autointerp.scorers.metrics import not_applicable, ranked_scores, scores_of


def verdict(i, truth, answer, *, source=None, probability=None, status="ok", prompt=None, quantile=None, document=None):
    return Verdict(
        coder="sae",
        latent=7,
        explanation_id="sha256:explanation",
        scorer="detection",
        scorer_id="",
        control=None,
        example_idx=i,
        position=i,
        document=i if document is None else document,
        source=source or ("positive" if truth else "random"),
        quantile=quantile if quantile is not None else (0 if truth else -1),
        truth=truth,
        answer=answer if status == "ok" else None,
        probability=probability,
        status=status,
        prompt_idx=i if prompt is None else prompt,
    )


def scores(verdicts, headline="balanced_accuracy"):
    return scores_of(verdicts, latent=planted(num=1), explanation=explained(), judge="fake", headline=headline)


def find(rows, metric, negatives="random", quantile=None):
    [row] = [r for r in rows if (r.metric, r.negatives, r.quantile) == (metric, negatives, quantile)]
    return row


def many(truth, right, wrong, start, **changes):
    return [verdict(start + i, truth, truth if i < right else not truth, **changes) for i in range(right + wrong)]


def test_balanced_accuracy_and_rates_by_hand():
    rows = scores([*many(True, 8, 2, 0), *many(False, 15, 5, 100)])
    assert find(rows, "tpr", "none").value == pytest.approx(0.8)  # 8 / 10
    assert find(rows, "tnr").value == pytest.approx(0.75)  # 15 / 20
    headline = find(rows, "balanced_accuracy")
    assert headline.value == pytest.approx(0.775)  # (0.8 + 0.75) / 2; accuracy would be 23 / 30
    expected = stats.balanced_accuracy(stats.wilson(8, 10), stats.wilson(15, 20))
    assert (headline.ci_low, headline.ci_high) == pytest.approx((expected.low, expected.high))
    assert (headline.is_headline, headline.chance, headline.ci_method) == (True, 0.5, "mover_wilson")
    assert find(rows, "tpr", "none").chance is None
    assert sum(row.is_headline for row in rows) == 1


def test_sources_of_negatives_are_never_pooled():
    rows = scores([*many(True, 10, 0, 0), *many(False, 10, 0, 100), *many(False, 0, 10, 200, source="same_token")])
    assert find(rows, "balanced_accuracy", "random").value == 1.0
    assert find(rows, "balanced_accuracy", "same_token").value == 0.5
    assert {row.negatives for row in rows} == {"random", "same_token", "none"}


def test_tpr_by_quantile():
    rows = scores([*many(True, 3, 1, 0, quantile=0), *many(True, 1, 3, 10, quantile=9), *many(False, 4, 0, 100)])
    assert find(rows, "tpr", "none", 0).value == 0.75
    assert find(rows, "tpr", "none", 9).value == 0.25
    assert find(rows, "tpr", "none").value == 0.5


def test_auroc_only_where_probabilities_exist():
    verdicts = [verdict(i, i < 4, True, probability=p) for i, p in enumerate([0.9, 0.8, 0.4, 0.4, 0.4, 0.3, 0.2, 0.1])]
    # Pairs: 0.9 and 0.8 win 4 each, each 0.4 wins 3 and ties 1: (8 + 2 * 3.5) / 16.
    row = find(scores(verdicts, headline="auroc"), "auroc")
    assert row.value == pytest.approx(15 / 16)
    assert (row.is_headline, row.ci_method, row.chance) == (True, "newcombe_auroc", 0.5)
    assert not [row for row in scores([verdict(0, True, True), verdict(1, False, False)]) if row.metric == "auroc"]


def test_average_precision_stands_beside_auroc():
    verdicts = [verdict(i, i in (0, 2, 3), True, probability=p) for i, p in enumerate([0.9, 0.8, 0.4, 0.3, 0.1])]
    # Ranked + - + + -: (1 + 2/3 + 3/4) / 3; by chance 3 of 5.
    row = find(scores(verdicts, headline="auroc"), "average_precision")
    value = (1 + 2 / 3 + 3 / 4) / 3
    assert row.value == pytest.approx(value) and row.chance == pytest.approx(0.6)
    expected = stats.average_precision_wilson(value, 3)
    assert (row.ci_low, row.ci_high) == pytest.approx(
        (expected.low, expected.high)
    ) and row.ci_method == "wilson_average_precision"
    assert not row.is_headline


def test_tpr_by_activation_weights_windows_by_their_strongest_token():
    latent = planted(num=4)
    latent.positives.activations[:] = 0
    latent.positives.activations[np.arange(4), 3] = [4, 3, -2, 1]
    verdicts = [
        verdict(0, True, True),
        verdict(1, True, False),
        verdict(2, True, True),
        verdict(3, True, None, status="refused"),
    ]
    rows = scores_of(
        [*verdicts, verdict(4, False, False)], latent=latent, explanation=explained(), judge="j", headline="balanced_accuracy"
    )
    row = find(rows, "tpr_by_activation", "none")
    assert row.value == pytest.approx((4 + 2) / (4 + 3 + 2)) and row.num_scored == 3 and row.unscored == {"refused": 1}
    # Kish: 9^2 / (16 + 9 + 4).
    n = 81 / 29
    expected = stats.wilson(row.value * n, n)
    assert (row.ci_low, row.ci_high) == pytest.approx((expected.low, expected.high))
    assert find(rows, "tpr", "none").value == pytest.approx(2 / 3)


def test_scored_and_unscored_sum_to_what_was_asked():
    unscored = ["unparseable", "refused", "truncated", "no_reply", "too_long"]
    verdicts = [*many(True, 5, 5, 0), *many(False, 6, 4, 100)]
    verdicts += [verdict(200 + i, i % 2 == 0, None, status=status) for i, status in enumerate(unscored)]
    row = find(scores(verdicts), "balanced_accuracy")
    assert row.num_scored == 20
    assert row.unscored == dict.fromkeys(unscored, 1)
    assert row.num_scored + sum(row.unscored.values()) == len(verdicts)
    assert row.value == pytest.approx(0.55)  # (5/10 + 6/10) / 2: failures are no wrong answers
    assert find(scores(verdicts), "tpr", "none").unscored == {"unparseable": 1, "truncated": 1, "too_long": 1}


def test_not_applicable_examples_were_not_asked():
    verdicts = [*many(True, 5, 0, 0), *many(False, 5, 0, 100), verdict(300, False, None, status="not_applicable")]
    row = find(scores(verdicts), "balanced_accuracy")
    assert (row.num_scored, dict(row.unscored)) == (10, {})


@pytest.mark.parametrize("empty", [True, False])
def test_an_empty_class_is_undefined(empty):
    verdicts = [*many(not empty, 5, 0, 0), *many(empty, 0, 5, 100)]
    lost = [verdict(v.example_idx, v.truth, None, status="no_reply") if v.truth == empty else v for v in verdicts]
    row = find(scores(lost), "balanced_accuracy")
    assert (row.status, row.value, row.ci_low, row.ci_method) == ("undefined", None, None, "none")
    assert (row.num_scored, row.unscored) == (5, {"no_reply": 5})
    assert find(scores(lost, headline="auroc"), "auroc").status == "undefined"


def test_where_no_answer_can_be_used_the_status_is_the_commonest_reason():
    lost = ["refused", "unparseable", "refused", "no_reply"]
    verdicts = [verdict(i, i % 2 == 0, None, status=status) for i, status in enumerate(lost)]
    rows = scores(verdicts, headline="auroc")
    assert {row.metric: row.status for row in rows if row.quantile is None} == {
        "balanced_accuracy": "refused",
        "auroc": "refused",
        "average_precision": "refused",
        "tnr": "unparseable",  # one of each: in the order in which reasons are counted
        "tpr": "refused",
        "tpr_by_activation": "refused",
    }
    assert find(rows, "auroc").unscored == {"refused": 2, "unparseable": 1, "no_reply": 1}


def test_a_source_without_negatives_has_a_headline_row_that_says_so():
    verdicts = [*many(True, 8, 2, 0), *many(False, 15, 5, 100)]
    verdicts += many(False, 0, 3, 200, source="neighbour_decoder", status="not_applicable")
    latent = replace(planted(num=1), negative_sources=("random", "same_token", "neighbour_decoder"))
    given = {"latent": latent, "explanation": explained(), "judge": "j"}
    for rows in (scores_of(verdicts, **given, headline="balanced_accuracy"), ranked_scores(verdicts, **given)):
        heads = {row.negatives: row for row in rows if row.is_headline and row.negatives != "random"}
        assert {source: (row.status, row.value, row.num_scored) for source, row in heads.items()} == {
            "same_token": ("too_few_examples", None, 0),
            "neighbour_decoder": ("not_applicable", None, 0),
        }
        assert "no such windows" in heads["same_token"].reason and "asked about" in heads["neighbour_decoder"].reason
        assert [row.metric for row in rows if row.negatives == "same_token"] == [heads["same_token"].metric]
    none = scores_of(many(True, 8, 2, 0), **given, headline="balanced_accuracy")
    assert [row.negatives for row in none if row.is_headline] == ["random", "same_token", "neighbour_decoder"]


def test_examples_that_share_a_prompt_widen_the_interval():
    # Prompts of 5 that are all right or all wrong: 50 answers are worth 10.
    alone = find(scores([*many(True, 25, 25, 0), *many(False, 50, 0, 100)]), "tpr", "none")
    shared = [verdict(i, True, (i // 5) % 2 == 0, prompt=i // 5) for i in range(50)] + many(False, 50, 0, 100)
    together = find(scores(shared), "tpr", "none")
    assert together.value == alone.value
    expected = stats.wilson(25, 50, deff=5)
    assert (together.ci_low, together.ci_high) == pytest.approx((expected.low, expected.high), abs=1e-4)
    assert (alone.ci_method, together.ci_method) == ("wilson", "wilson_clustered")


def drawn(documents, size, random, *, rate=0.2, shared=0.5, num=50):
    """Verdicts of a judge of which that share of the answers hangs on one draw for their document; prompts of `size`."""
    document, prompt = random.integers(0, documents, 2 * num), random.permutation(2 * num) // size
    luck = np.where(random.random(2 * num) < shared, random.random(documents)[document], random.random(2 * num))
    right = luck >= rate
    return [
        verdict(
            i,
            i < num,
            bool(right[i] == (i < num)),
            probability=(random.random() + (right[i] == (i < num))) / 2,
            prompt=int(prompt[i]),
            document=int(document[i]),
        )
        for i in range(2 * num)
    ]


@pytest.mark.parametrize(("metric", "size"), [("auroc", 1), ("balanced_accuracy", 5)])
def test_intervals_hold_where_errors_come_together_in_documents(metric, size):
    # 15 documents: 0.81 to 0.86 where prompts alone are clusters. Two standard errors of 60 draws at 0.94 are 0.06.
    random = np.random.default_rng(3)
    rows = [find(scores(drawn(15, size, random), metric), metric) for _ in range(60)]
    assert np.mean([row.value for row in rows]) == pytest.approx(0.8, abs=0.03)
    assert np.mean([row.ci_low <= 0.8 <= row.ci_high for row in rows]) >= 0.88
    assert {row.ci_method.removeprefix("mover_wilson").removeprefix("newcombe_auroc") for row in rows} == {"_clustered"}


def test_prompts_and_documents_add_up():
    """Pairs of one prompt and pairs of one document are correlated; one that is both counts once."""
    # Ten prompts and ten documents that cross: wrong are half of prompt 0 and half of document 0.
    grid = [(i // 10, i % 10) for i in range(100)]
    verdicts = [verdict(i, True, 0 not in at or max(at) > 4, prompt=at[0], document=at[1]) for i, at in enumerate(grid)]
    widths = []
    for keep in ("prompt_idx", "document", None):
        alone = [
            v if keep is None else replace(v, **{k: v.example_idx for k in ("prompt_idx", "document") if k != keep})
            for v in verdicts
        ]
        row = find(scores([*alone, *many(False, 10, 0, 100)]), "tpr", "none")
        widths.append(row.ci_high - row.ci_low)
    assert widths[0] == pytest.approx(widths[1]) and widths[2] > 1.1 * widths[0]


def test_what_all_share_is_named():
    cases = {
        "wilson_one_prompt": [verdict(i, True, i > 2, prompt=0) for i in range(10)],
        "wilson_one_document": [verdict(i, True, i > 2, document=0, prompt=i // 5) for i in range(10)],
        "wilson_clustered": [verdict(i, True, i > 2, document=i // 2) for i in range(10)],
        "wilson": [verdict(i, True, i > 2) for i in range(10)],
    }
    rows = {name: find(scores([*verdicts, *many(False, 4, 0, 100)]), "tpr", "none") for name, verdicts in cases.items()}
    assert {name: row.ci_method for name, row in rows.items()} == {name: name for name in cases}
    # Nothing can be learned of what happens within a single cluster.
    assert rows["wilson_one_prompt"].ci_low == rows["wilson"].ci_low
    [one] = [verdict(0, True, True, prompt=0)]
    assert find(scores([one, *many(False, 4, 0, 100)]), "tpr", "none").ci_method == "wilson"


def test_what_cannot_be_judged_has_one_headline_row_per_source():
    wanted = replace(planted(num=3), negative_sources=("random", "same_token"))
    rows = not_applicable(wanted, explained(), judge="rule", headline="balanced_accuracy")
    assert [row.negatives for row in rows] == ["random", "same_token"]
    [row] = not_applicable(planted(num=3), explained(), judge="rule", headline="balanced_accuracy")
    assert (row.status, row.value, row.negatives, row.num_scored, row.is_headline) == (
        "not_applicable",
        None,
        "random",
        0,
        True,
    )
