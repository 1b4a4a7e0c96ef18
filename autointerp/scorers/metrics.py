"""The metrics of classifiers over one latent: from verdicts to scores with intervals.

Balanced accuracy, AUROC and TNR are computed for each source of negatives apart, never pooled; TPR, also by quantile, concerns
positives only (``negatives = "none"``). Examples that shared a prompt are not independent: numbers of examples are divided by
the design effect, and the method name ends in ``_clustered``. A metric whose class is empty is ``undefined``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from autointerp import stats
from autointerp.records import UNSCORED, Explanation, LatentExamples, Score, Status, Verdict

CHANCE = 0.5


def scores_of(
    verdicts: Sequence[Verdict], *, latent: LatentExamples, explanation: Explanation, judge: str, headline: str
) -> tuple[Score, ...]:
    """Return the scores of one (latent, explanation, scorer, control); the headline is one row per source of negatives.

    `verdicts` of examples that were not asked about (``not_applicable``) count nowhere.
    """
    asked = [verdict for verdict in verdicts if verdict.status != "not_applicable"]
    positives = [verdict for verdict in asked if verdict.truth]
    sources = list(dict.fromkeys(verdict.source for verdict in asked if not verdict.truth)) or ["none"]
    quantiles = sorted({verdict.quantile for verdict in positives})
    made = _Maker(latent, explanation, judge, headline, verdicts[0] if verdicts else None)
    rows: list[Score] = []
    for source in sources:
        negatives = [verdict for verdict in asked if not verdict.truth and verdict.source == source]
        rows.append(made.row("balanced_accuracy", [*positives, *negatives], _balanced(positives, negatives), source))
        if headline == "auroc" or any(verdict.probability is not None for verdict in asked):
            rows.append(made.row("auroc", [*positives, *negatives], _auroc(positives, negatives), source))
        rows.append(made.row("tnr", negatives, _rate(negatives), source))
    rows.append(made.row("tpr", positives, _rate(positives), "none"))
    for quantile in quantiles:
        some = [verdict for verdict in positives if verdict.quantile == quantile]
        rows.append(made.row("tpr", some, _rate(some), "none", quantile))
    return tuple(rows)


def not_applicable(latent: LatentExamples, explanation: Explanation, *, judge: str, headline: str) -> tuple[Score, ...]:
    """Return the headline rows of an explanation that this scorer cannot judge."""
    made = _Maker(latent, explanation, judge, headline, None)
    sources = list(dict.fromkeys(latent.negatives.sources)) or ["none"]
    return tuple(made.row(headline, [], None, source, status="not_applicable") for source in sources)


class _Maker:
    """Fills in what all rows share."""

    def __init__(
        self, latent: LatentExamples, explanation: Explanation, judge: str, headline: str, verdict: Verdict | None
    ) -> None:
        self._latent, self._explanation, self._judge, self._headline, self._verdict = (
            latent,
            explanation,
            judge,
            headline,
            verdict,
        )

    def row(
        self,
        metric: str,
        verdicts: Sequence[Verdict],
        interval: stats.Interval | None,
        negatives: str,
        quantile: int | None = None,
        *,
        status: Status = "undefined",
    ) -> Score:
        counts: Counter[str] = Counter(verdict.status for verdict in verdicts)
        return Score(
            coder=self._latent.coder,
            latent=self._latent.latent,
            explanation_id=self._explanation.explanation_id,
            scorer=self._verdict.scorer if self._verdict else "",
            scorer_id="",
            selection_id=self._latent.selection_id,
            control=self._verdict.control if self._verdict else None,
            judge=self._judge,
            explainer=self._explanation.explainer,
            metric=metric,
            is_headline=metric == self._headline,
            negatives=negatives,
            quantile=quantile,
            status="ok" if interval is not None else status,
            value=interval.value if interval is not None else None,
            ci_low=interval.low if interval is not None else None,
            ci_high=interval.high if interval is not None else None,
            ci_method=interval.method if interval is not None else "none",
            chance=CHANCE if metric in ("balanced_accuracy", "auroc") else None,
            disjoint=self._latent.disjoint,
            num_scored=counts["ok"],
            unscored={reason: counts[reason] for reason in UNSCORED if counts[reason]},
        )


def _answered(verdicts: Sequence[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.status == "ok"]


def _right(verdicts: Sequence[Verdict]) -> tuple[list[float], list[int]]:
    """Return whether each answer is right, and which prompt it shares."""
    answered = _answered(verdicts)
    return [float(verdict.answer == verdict.truth) for verdict in answered], [verdict.prompt_idx for verdict in answered]


def _rate(verdicts: Sequence[Verdict]) -> stats.Interval | None:
    """Return the share of answers that are right; None without answers."""
    right, prompts = _right(verdicts)
    if not right:
        return None
    interval = stats.wilson(sum(right), len(right), deff=stats.design_effect(right, prompts))
    return _named(interval, prompts)


def _balanced(positives: Sequence[Verdict], negatives: Sequence[Verdict]) -> stats.Interval | None:
    p, n = _right(positives), _right(negatives)
    return _named(stats.clustered_accuracy(p, n), [*p[1], *n[1]]) if p[0] and n[0] else None


def _auroc(positives: Sequence[Verdict], negatives: Sequence[Verdict]) -> stats.Interval | None:
    p = [(verdict.probability, verdict.prompt_idx) for verdict in _answered(positives) if verdict.probability is not None]
    n = [(verdict.probability, verdict.prompt_idx) for verdict in _answered(negatives) if verdict.probability is not None]
    if not p or not n:
        return None
    value = stats.auroc([x for x, _ in p], [x for x, _ in n])
    deff = max(stats.design_effect([x for x, _ in side], [i for _, i in side]) for side in (p, n))
    return _named(stats.auroc_newcombe(value, len(p), len(n), deff=deff), [i for _, i in (*p, *n)])


def _named(interval: stats.Interval, prompts: Sequence[int]) -> stats.Interval:
    is_clustered = len(set(prompts)) < len(prompts)
    method = interval.method + "_clustered" * is_clustered
    return stats.Interval(value=interval.value, low=interval.low, high=interval.high, method=method)
