"""The metrics of scorers over one latent: from verdicts to scores with intervals.

Balanced accuracy, accuracy, AUROC, correlation and TNR are computed for each source of negatives apart, never pooled; what
concerns positives only, also by quantile, has ``negatives = "none"``. Examples of one prompt or of one document are not
independent: numbers of examples are divided by the design effect of both, and the method name ends in ``_clustered``; where
every example is judged alone, only documents are clusters. What all examples share can be seen in none: the name then ends in
``_one_prompt`` or ``_one_document``, and errors that come together there are not allowed for. ``tpr_by_activation`` weights
each positive by its greatest |activation|. A metric whose class is empty is ``undefined``; where not one answer could be used,
the status is the commonest reason. A source of negatives that was wanted and of which the latent has no windows has a headline
row saying so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from autointerp import stats
from autointerp.records import UNSCORED, Explanation, LatentExamples, Score, Status, Verdict

CHANCE: Mapping[str, float] = {
    "balanced_accuracy": 0.5,
    "auroc": 0.5,
    "correlation": 0.0,
    "explained_squares": 0.0,
    "explained_absolute": 0.0,
    "calibrated_r2": 0.0,
}
"""Chance level by metric, where it does not depend on the scorer."""


class Rows:
    """Makes rows of one (latent, explanation, scorer, control); fills in what they share."""

    def __init__(
        self, latent: LatentExamples, explanation: Explanation, judge: str, headline: str, verdicts: Sequence[Verdict] = ()
    ) -> None:
        self._latent, self._explanation, self._judge, self._headline = latent, explanation, judge, headline
        self._verdict = verdicts[0] if verdicts else None
        self._drawn = {verdict.source for verdict in verdicts if not verdict.truth}
        self.asked = [verdict for verdict in verdicts if verdict.status != "not_applicable"]
        """Verdicts that count; what was not asked about counts nowhere."""
        self.positives = [verdict for verdict in self.asked if verdict.truth]

    def by_source(self) -> dict[str, list[Verdict]]:
        """Return the negatives by source; ``none`` where there are none and none were wanted."""
        negatives = [verdict for verdict in self.asked if not verdict.truth]
        sources = list(dict.fromkeys(verdict.source for verdict in negatives))
        if not sources and not self._latent.negative_sources:
            sources = ["none"]
        return {source: [verdict for verdict in negatives if verdict.source == source] for source in sources}

    def absent(self, *, chance: float | None = None) -> list[Score]:
        """Return the headline row of each source that was wanted and has no negatives, with why."""
        rows = []
        found = self.by_source()
        for source in self._latent.negative_sources:
            if source in found:
                continue
            status: Status = "not_applicable" if source in self._drawn else "too_few_examples"
            reason = "none of the windows could be asked about" if source in self._drawn else "the latent has no such windows"
            reason = f"{source} negatives: {reason}"
            rows.append(self.row(self._headline, [], None, source, chance=chance, status=status, reason=reason))
        return rows

    def by_quantile(self) -> dict[int, list[Verdict]]:
        """Return the positives by quantile, the strongest first."""
        quantiles = sorted({verdict.quantile for verdict in self.positives})
        return {q: [verdict for verdict in self.positives if verdict.quantile == q] for q in quantiles}

    def row(
        self,
        metric: str,
        verdicts: Sequence[Verdict],
        interval: stats.Interval | None,
        negatives: str = "none",
        quantile: int | None = None,
        *,
        chance: float | None = None,
        status: Status = "undefined",
        reason: str | None = None,
    ) -> Score:
        """Return a row over `verdicts`; `status` and `reason` are for no `interval`, `chance` where it is the scorer's own.

        When no verdict has an answer, the commonest reason takes the place of ``undefined``.
        """
        counts: Counter[str] = Counter(verdict.status for verdict in verdicts)
        lost: list[Status] = [name for name in UNSCORED if counts[name]]
        if status == "undefined" and lost and not counts["ok"]:
            status = max(lost, key=lambda name: counts[name])
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
            is_headline=metric == self._headline and (quantile is None),
            negatives=negatives,
            quantile=quantile,
            status="ok" if interval is not None else status,
            value=interval.value if interval is not None else None,
            ci_low=_finite(interval.low) if interval is not None else None,
            ci_high=_finite(interval.high) if interval is not None else None,
            ci_method=interval.method if interval is not None else "none",
            chance=CHANCE.get(metric) if chance is None else chance,
            disjoint=self._latent.disjoint,
            num_scored=counts["ok"],
            unscored={name: counts[name] for name in lost},
            reason=reason if interval is None else None,
        )


def scores_of(
    verdicts: Sequence[Verdict], *, latent: LatentExamples, explanation: Explanation, judge: str, headline: str
) -> tuple[Score, ...]:
    """Return the scores of a classifier; the headline is one row per source of negatives that was asked for.

    `verdicts` of examples that were not asked about (``not_applicable``) count nowhere.
    """
    made = Rows(latent, explanation, judge, headline, verdicts)
    rows = made.absent()
    for source, negatives in made.by_source().items():
        both = [*made.positives, *negatives]
        rows.append(made.row("balanced_accuracy", both, _balanced(made.positives, negatives), source))
        if headline == "accuracy":
            rows.append(made.row("accuracy", both, rate(both), source, chance=_majority(made.positives, negatives)))
        if headline == "auroc" or any(verdict.probability is not None for verdict in made.asked):
            rows.append(made.row("auroc", both, _auroc(made.positives, negatives), source))
            rows.append(_precision_row(made, negatives, source))
        rows.append(made.row("tnr", negatives, rate(negatives), source))
    rows.append(made.row("tpr", made.positives, rate(made.positives)))
    rows.append(made.row("tpr_by_activation", made.positives, _weighted_rate(made.positives, latent)))
    rows += [made.row("tpr", some, rate(some), quantile=q) for q, some in made.by_quantile().items()]
    return tuple(rows)


def ranked_scores(
    verdicts: Sequence[Verdict], *, latent: LatentExamples, explanation: Explanation, judge: str
) -> tuple[Score, ...]:
    """Return the AUROC of `Verdict.value` for each source of negatives, of all positives (the headline) and by quantile.

    Beside it the average precision of all positives.
    """
    made = Rows(latent, explanation, judge, "auroc", verdicts)
    rows = made.absent()
    for source, negatives in made.by_source().items():
        for quantile, some in [(None, made.positives), *made.by_quantile().items()]:
            rows.append(made.row("auroc", [*some, *negatives], _auroc(some, negatives, by_value=True), source, quantile))
        rows.append(_precision_row(made, negatives, source, by_value=True))
    return tuple(rows)


def not_applicable(
    latent: LatentExamples, explanation: Explanation, *, judge: str, headline: str, reason: str | None = None
) -> tuple[Score, ...]:
    """Return the headline rows of an explanation that this scorer cannot judge, and why."""
    if judge == "rule":
        reason = reason or "the explanation carries no rule to judge by"
    made = Rows(latent, explanation, judge, headline)
    sources = latent.negative_sources or tuple(dict.fromkeys(latent.negatives.sources)) or ("none",)
    return tuple(made.row(headline, [], None, source, status="not_applicable", reason=reason) for source in sources)


def _precision_row(made: Rows, negatives: Sequence[Verdict], source: str, *, by_value: bool = False) -> Score:
    positives = made.positives
    value, chance = _average_precision(positives, negatives, by_value), _share(positives, negatives, by_value)
    return made.row("average_precision", [*positives, *negatives], value, source, chance=chance)


def _share(positives: Sequence[Verdict], negatives: Sequence[Verdict], by_value: bool) -> float:
    """Return average precision by chance: the share of positives among those that are ranked, or of all without any."""
    p, n = (len(_ranked(side, by_value)) for side in (positives, negatives))
    return p / (p + n) if p + n else len(positives) / max(len(positives) + len(negatives), 1)


def _average_precision(positives: Sequence[Verdict], negatives: Sequence[Verdict], by_value: bool) -> stats.Interval | None:
    p, n = _ranked(positives, by_value), _ranked(negatives, by_value)
    if not p or not n:
        return None
    value = stats.average_precision([x for _, x in p], [x for _, x in n])
    deff, clusterings = _deff(p, n)
    return _named(stats.average_precision_wilson(value, len(p), deff=deff), clusterings)


def _weighted_rate(positives: Sequence[Verdict], latent: LatentExamples) -> stats.Interval | None:
    """Return the TPR with each window weighted by its greatest |activation|."""
    answered = _answered(positives)
    strength = np.abs(latent.positives.activations).max(axis=1, initial=0)
    weights = np.array(
        [strength[verdict.example_idx] for verdict in answered if verdict.example_idx < len(strength)], np.float64
    )
    right = _right(answered)
    if len(weights) < len(right) or not weights.sum() > 0:
        return None
    clusterings = _clusterings(answered)
    value = np.average(right, weights=weights)
    deff = stats.design_effect(weights * (right - value), *clusterings.values())
    return _named(stats.weighted_rate(right, weights, deff=deff), clusterings)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _majority(positives: Sequence[Verdict], negatives: Sequence[Verdict]) -> float:
    """Return the accuracy of the better of the two constant answers."""
    return max(len(positives), len(negatives)) / max(len(positives) + len(negatives), 1)


def _answered(verdicts: Sequence[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.status == "ok"]


def _right(answered: Sequence[Verdict]) -> np.ndarray:
    """Return 1 for each answer that is right, 0 for the others."""
    return np.array([verdict.answer == verdict.truth for verdict in answered], np.float64)


def _clusterings(answered: Sequence[Verdict], first: str = "prompt") -> dict[str, list[int]]:
    """Return the prompt and the document of each answer, or another attribute of verdicts in place of the prompt."""
    name = "prompt_idx" if first == "prompt" else first
    return {first: [getattr(verdict, name) for verdict in answered], "document": [verdict.document for verdict in answered]}


def rate(verdicts: Sequence[Verdict], *, by_quantile: bool = False) -> stats.Interval | None:
    """Return the share of answers that are right; None without answers.

    Clusters are prompts, or quantiles on demand, and documents.
    """
    answered = _answered(verdicts)
    if not answered:
        return None
    right, clusterings = _right(answered), _clusterings(answered, "quantile" if by_quantile else "prompt")
    deff = stats.design_effect(right, *clusterings.values())
    return _named(stats.wilson(float(right.sum()), len(right), deff=deff), clusterings)


def _balanced(positives: Sequence[Verdict], negatives: Sequence[Verdict]) -> stats.Interval | None:
    p, n = _answered(positives), _answered(negatives)
    if not p or not n:
        return None
    clusterings = _clusterings([*p, *n])
    return _named(stats.clustered_accuracy(_right(p), _right(n), *clusterings.values()), clusterings)


def _auroc(positives: Sequence[Verdict], negatives: Sequence[Verdict], *, by_value: bool = False) -> stats.Interval | None:
    p, n = _ranked(positives, by_value), _ranked(negatives, by_value)
    if not p or not n:
        return None
    value = stats.auroc([x for _, x in p], [x for _, x in n])
    deff, clusterings = _deff(p, n)
    return _named(stats.auroc_newcombe(value, len(p), len(n), deff=deff), clusterings)


def _deff(p: Sequence[tuple[Verdict, float]], n: Sequence[tuple[Verdict, float]]) -> tuple[float, dict[str, list[int]]]:
    """Return the design effect of the AUROC of answers with what they are ranked by, and the clusters of both classes."""
    clusterings = _clusterings([verdict for verdict, _ in (*p, *n)])
    return stats.auroc_design_effect([x for _, x in p], [x for _, x in n], *clusterings.values()), clusterings


def _ranked(verdicts: Sequence[Verdict], by_value: bool) -> list[tuple[Verdict, float]]:
    """Return the answers that have something to be ranked by, and that."""
    ranked = ((verdict, verdict.value if by_value else verdict.probability) for verdict in _answered(verdicts))
    return [(verdict, x) for verdict, x in ranked if x is not None]


def _named(interval: stats.Interval, clusterings: Mapping[str, Sequence[int]]) -> stats.Interval:
    """Return the interval with a method name that says what is known of clusters; `clusterings` by name."""
    sizes = {name: (len(set(clusters)), len(clusters)) for name, clusters in clusterings.items()}
    # A single cluster tells nothing of what clustering does.
    suffix = next((f"_one_{name}" for name, (k, n) in sizes.items() if k == 1 < n), "")
    if not suffix and any(1 < k < n for k, n in sizes.values()):
        suffix = "_clustered"
    return replace(interval, method=interval.method + suffix)
