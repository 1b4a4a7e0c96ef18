"""Coverage of every interval of `autointerp.stats`: how often a nominal 95% interval holds the truth.

Rates and balanced accuracy are computed exactly, over all outcomes; the others are simulated with a fixed seed. Run as
``python -m benchmarks.interval_coverage`` to print the tables, and with ``--write`` to write them to docs/intervals.md. Leaves
with exit code 1 when an interval covers less than 0.90 of a case with n of 50 or more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import betaincinv, ndtri
from scipy.stats import betabinom, binom

from autointerp import stats

DOC = Path(__file__).parent.parent / "docs" / "intervals.md"
SIZES = (10, 50, 100)
RATES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 1.0)
PAIRS = ((0.5, 0.5), (0.7, 0.9), (0.9, 0.9), (0.95, 0.99), (0.99, 0.99), (1.0, 0.9), (1.0, 0.99), (1.0, 0.998), (1.0, 1.0))
AUROCS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
LEAST, FROM = 0.90, 50


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[str, list[float]]]
    sizes: tuple[int, ...]
    """Size of each column, for the bound."""

    def worst(self) -> float:
        """Return the least coverage among columns of at least `FROM`."""
        return min(v for _, values in self.rows for v, size in zip(values, self.sizes, strict=True) if size >= FROM)

    def markdown(self) -> str:
        lines = [
            f"## {self.title}",
            "",
            self.note,
            "",
            "| | " + " | ".join(self.columns) + " |",
            "|---" * (len(self.columns) + 1) + "|",
        ]
        lines += [f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |" for name, values in self.rows]
        return "\n".join(lines)


def limits(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rate, low and high for every number of successes."""
    found = [stats.wilson(x, n) for x in range(n + 1)]
    return tuple(np.array([getattr(i, name) for i in found]) for name in ("value", "low", "high"))  # type: ignore[return-value]


def rates() -> Table:
    rows = []
    for rate in RATES:
        values = []
        for n in SIZES:
            _, low, high = limits(n)
            values.append(float(binom.pmf(np.arange(n + 1), n, rate)[(low <= rate) & (rate <= high)].sum()))
        rows.append((f"rate {rate}", values))
    return Table("Rates: `wilson`", "Exact.", tuple(f"n = {n}" for n in SIZES), rows, SIZES)


def worst_rate() -> Table:
    grid = np.linspace(0.5, 1, 5001)
    values = []
    for n in SIZES:
        _, low, high = limits(n)
        pmf = binom.pmf(np.arange(n + 1)[:, None], n, grid)
        values.append(float((pmf * ((low[:, None] <= grid) & (grid <= high[:, None]))).sum(axis=0).min()))
    note = "Exact; the least over 5001 rates from 0.5 to 1. Wilson's own interval falls to 0.84 just below 1."
    return Table("Rates: the worst case", note, tuple(f"n = {n}" for n in SIZES), [("any rate", values)], SIZES)


def balanced() -> Table:
    rows = []
    for tpr, tnr in PAIRS:
        values = []
        for n in SIZES:
            value, low, high = limits(n)
            down = np.hypot((value - low)[:, None], (value - low)[None]) / 2
            up = np.hypot((high - value)[:, None], (high - value)[None]) / 2
            middle = (value[:, None] + value[None]) / 2
            truth = (tpr + tnr) / 2
            weight = np.outer(binom.pmf(np.arange(n + 1), n, tpr), binom.pmf(np.arange(n + 1), n, tnr))
            held = (np.maximum(middle - down, 0) <= truth + 1e-12) & (truth - 1e-12 <= np.minimum(middle + up, 1))
            values.append(float(weight[held].sum()))
        rows.append((f"TPR {tpr}, TNR {tnr}", values))
    note = "Exact, with n positives and n negatives."
    return Table("Balanced accuracy: `mover_wilson`", note, tuple(f"n = {n} + {n}" for n in SIZES), rows, SIZES)


def bootstrap(reps: int, random: np.random.Generator) -> Table:
    rows = []
    for tpr, tnr in PAIRS:
        values = []
        for n in SIZES:
            x, y = random.binomial(n, tpr, reps), random.binomial(n, tnr, reps)
            again = (random.binomial(n, x / n, (1000, reps)) + random.binomial(n, y / n, (1000, reps))) / (2 * n)
            low, high = np.percentile(again, [2.5, 97.5], axis=0)
            truth = (tpr + tnr) / 2
            values.append(float(np.mean((low <= truth + 1e-12) & (truth - 1e-12 <= high))))
        rows.append((f"TPR {tpr}, TNR {tnr}", values))
    note = f"What the above replaces; {reps} draws, 1000 resamples. Not bound by the rule."
    return Table("For comparison: the percentile bootstrap", note, tuple(f"n = {n} + {n}" for n in SIZES), rows, (0, 0, 0))


def binormal(area: float, n: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    shift = 40.0 if area == 1 else float(np.sqrt(2) * ndtri(area))
    return random.normal(shift, 1, n), random.normal(0, 1, n)


def exponential(area: float, n: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    # Pr(a > b) of exponentials with means s and 1 is s / (s + 1).
    scale = 1e30 if area == 1 else area / (1 - area)
    return random.exponential(scale, n), random.exponential(1, n)


def levels(area: float, n: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    # Two values only, as from a judge that always says 0.98 or 0.02: AUROC = 1/2 + (p - q) / 2 with p = 1 - q.
    return random.binomial(1, area, n).astype(float), random.binomial(1, 1 - area, n).astype(float)


def areas(
    draw: Callable[[float, int, np.random.Generator], tuple[np.ndarray, np.ndarray]], what: str, reps: int, seed: int
) -> Table:
    rows = []
    for area in AUROCS:
        values = []
        for n in SIZES:
            random = np.random.default_rng([seed, n, int(1000 * area)])
            held = 0
            for _ in range(reps):
                positives, negatives = draw(area, n, random)
                interval = stats.auroc_newcombe(stats.auroc(positives, negatives), n, n)
                held += interval.low <= area <= interval.high
            values.append(held / reps)
        rows.append((f"AUROC {area}", values))
    return Table(f"AUROC: `newcombe_auroc`, {what}", f"{reps} draws each.", tuple(f"n = {n} + {n}" for n in SIZES), rows, SIZES)


def prompts_of_five(
    rates: tuple[float, float], correlation: float, n: int, random: np.random.Generator, *, shared: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return right or wrong of n positives and of n negatives, and the prompt of each, shuffled into prompts of five.

    The chance of a right answer varies between prompts; `shared`: alike for both classes, else for each apart.
    """
    prompts = random.permutation(np.repeat(np.arange(-(-2 * n // 5)), 5)[: 2 * n])
    drawn = random.random((2, len(prompts)))
    quantile = np.stack([drawn[0], drawn[0] if shared else drawn[1]])
    classes = []
    for rate, position, own in zip(rates, quantile, (prompts[:n], prompts[n:]), strict=True):
        chance = np.full(len(position), rate)
        if correlation > 0 and rate < 1:
            strength = 1 / correlation - 1
            chance = betaincinv(rate * strength, (1 - rate) * strength, position)
        classes.append((random.random(n) < chance[own]).astype(float))
    return classes[0], classes[1], prompts


def clustered(reps: int, *, with_effect: bool, sizes: tuple[int, ...] = (50, 100)) -> Table:
    rows = []
    for shared in (False, True):
        for correlation in (0.0, 0.1, 0.3, 0.5):
            for tpr, tnr in ((0.7, 0.7), (0.9, 0.9), (0.95, 0.99), (1.0, 0.9)):
                values = []
                for n in sizes:
                    random = np.random.default_rng([7, n, int(100 * correlation), int(100 * tpr), shared])
                    held = 0
                    for _ in range(reps):
                        p, q, prompts = prompts_of_five((tpr, tnr), correlation, n, random, shared=shared)
                        if with_effect:
                            interval = stats.clustered_accuracy(p, q, prompts)
                        else:
                            interval = stats.balanced_accuracy(stats.wilson(p.sum(), n), stats.wilson(q.sum(), n))
                        held += interval.low <= (tpr + tnr) / 2 <= interval.high
                    values.append(held / reps)
                rows.append((f"TPR {tpr}, TNR {tnr}, correlation {correlation}" + ", both classes alike" * shared, values))
    what = "`mover_wilson_clustered`" if with_effect else "without the design effect, for comparison"
    note = f"Answers in one prompt are correlated (beta-binomial); {reps} draws each." + " Not bound by the rule." * (
        not with_effect
    )
    title = f"Balanced accuracy, five examples per prompt: {what}"
    return Table(title, note, tuple(f"n = {n} + {n}" for n in sizes), rows, sizes if with_effect else (0,) * len(sizes))


DOCUMENTS = (8, 15, 25, 50)


def shared_luck(
    n: int, num_documents: int, size: int, rate: float, shared: tuple[float, float], random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return right or wrong of n positives and then n negatives, their prompts of `size` examples, and their documents.

    `shared`: of the answers, how many hang on one draw for their prompt, and how many on one for their document.
    """
    prompts = random.permutation(np.repeat(np.arange(-(-2 * n // size)), size)[: 2 * n])
    documents = random.integers(0, num_documents, 2 * n)
    draws = np.stack([random.random(2 * n)[prompts], random.random(2 * n)[documents], random.random(2 * n)])
    kind = np.searchsorted(np.cumsum(shared), random.random(2 * n), side="right")
    return draws[kind, np.arange(2 * n)] >= rate, prompts, documents


def documents(reps: int, *, what: str) -> Table:
    """Coverage of balanced accuracy in prompts of five, or of the AUROC of examples that are judged alone."""
    cases = {
        "nothing": (0.0, 0.0),
        "prompt 50%": (0.5, 0.0),
        "document 50%": (0.0, 0.5),
        "prompt 30%, document 30%": (0.3, 0.3),
    }
    is_list, n = what == "balanced accuracy", 50
    rows = []
    for rate in (0.05, 0.2):
        for name, shared in cases.items():
            if shared[0] and not is_list:
                continue
            values = []
            for num in DOCUMENTS:
                random = np.random.default_rng([17, is_list, num, int(100 * rate), *(int(100 * share) for share in shared)])
                held = 0
                for _ in range(reps):
                    right, prompts, docs = shared_luck(n, num, 5 if is_list else 1, rate, shared, random)
                    if is_list:
                        interval = stats.clustered_accuracy(right[:n], right[n:], prompts, docs)
                    else:
                        # One that reads as activating ranks above one that reads as silent; within either ranks are random.
                        values_of = (right == (np.arange(2 * n) < n)) + 0.5 * random.random(2 * n)
                        p, q = values_of[:n], values_of[n:]
                        deff = stats.auroc_design_effect(p, q, prompts, docs)
                        interval = stats.auroc_newcombe(stats.auroc(p, q), n, n, deff=deff)
                    held += interval.low - 1e-12 <= 1 - rate <= interval.high + 1e-12
                values.append(held / reps)
            rows.append((f"error rate {rate}, shared: {name}", values))
    title = (
        "Balanced accuracy, prompts of five from few documents: `mover_wilson_clustered`"
        if is_list
        else "AUROC, examples judged alone from few documents: `newcombe_auroc_clustered`"
    )
    note = (
        f"{n} + {n} examples. A share of the answers hangs on one draw for their prompt or their document, whose examples of both "
        f"classes it holds alike; {reps} draws each."
    )
    return Table(title, note, tuple(f"{num} documents" for num in DOCUMENTS), rows, (n,) * len(DOCUMENTS))


def predictions(
    documents: int, random: np.random.Generator, *, is_graded: bool = False, windows: float = 0.0, whole: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return predicted levels, activations and the document of each token: four windows of 32 a document, half of them silent.

    `is_graded`: predictions are noisy and saturate, else they are the activations. Shares of windows, and of whole documents,
    have one level of 2 at a random token instead.
    """
    num = 4 * documents
    y = np.zeros((num, 32))
    fires = random.random(num) < 0.5
    y[np.flatnonzero(fires), random.integers(0, 32, int(fires.sum()))] = random.gamma(2, 1, int(fires.sum()))
    x = np.minimum(y, 4) + 0.5 * random.gamma(0.5, 1, (num, 32)) if is_graded else y.copy()
    wrong = (random.random(num) < windows) | np.repeat(random.random(documents) < whole, 4)
    x[wrong] = 0
    x[np.flatnonzero(wrong), random.integers(0, 32, int(wrong.sum()))] = 2
    return x.ravel(), y.ravel(), np.repeat(np.arange(documents), 4 * 32)


def correlations(reps: int) -> Table:
    cases: dict[str, dict[str, float | bool]] = {
        "all right": {},
        "noisy levels": {"is_graded": True},
        "1% of windows wrong": {"windows": 0.01},
        "5% of windows wrong": {"windows": 0.05},
        "20% of windows wrong": {"windows": 0.2},
        "50% of windows wrong": {"windows": 0.5},
        "noisy levels, 20% of windows wrong": {"is_graded": True, "windows": 0.2},
        "5% of documents wrong": {"whole": 0.05},
        "20% of documents wrong": {"whole": 0.2},
    }
    rows = []
    for number, (name, case) in enumerate(cases.items()):
        x, y, _ = predictions(20_000, np.random.default_rng([13, number]), **case)  # type: ignore[arg-type]
        truth = float(np.corrcoef(x, y)[0, 1])
        values = []
        for n in SIZES:
            random = np.random.default_rng([13, number, n])
            held = 0
            for _ in range(reps):
                interval = stats.correlation(*predictions(n, random, **case))  # type: ignore[arg-type]
                held += interval is not None and interval.low - 1e-9 <= truth <= interval.high + 1e-9
            values.append(held / reps)
        rows.append((name, values))
    note = (
        f"Sparse activations, four windows a document, half of them silent; {reps} draws each. Where at most one document is "
        "wrong the method is `wilson_document`. An interval without limits counts as a miss."
    )
    columns = tuple(f"{n} documents" for n in SIZES)
    return Table("Correlation: `jackknife_document`", note, columns, rows, SIZES)


def summaries(reps: int) -> Table:
    """Latents drawn from a skewed population of balanced accuracies, each measured on 50 + 50 examples."""
    rows: dict[str, list[float]] = {"mean: `t`": [], "median: `order_statistic`": [], "mean by firing rate: `t_weighted`": []}
    population = np.random.default_rng(0)
    truth_values = np.round(0.5 + betabinom.rvs(100, 1.2, 2.5, size=400_000, random_state=population) / 200, 4)
    weights = population.lognormal(0, 1.0, len(truth_values)) * truth_values
    truth = [truth_values.mean(), np.median(truth_values), np.average(truth_values, weights=weights)]
    for n in SIZES:
        random = np.random.default_rng([11, n])
        held = np.zeros(3)
        for _ in range(reps):
            rows_drawn = random.integers(0, len(truth_values), n)
            summary = stats.summarise(truth_values[rows_drawn], weights=weights[rows_drawn])
            for k, interval in enumerate((summary.mean, summary.median, summary.weighted_mean)):
                assert interval is not None
                held[k] += interval.low - 1e-9 <= truth[k] <= interval.high + 1e-9
        for name, value in zip(rows, held / reps, strict=True):
            rows[name].append(float(value))
    note = "Latents drawn from a skewed population; weights are log-normal (sigma 1) and correlated with the score; "
    note += f"{reps} draws each."
    return Table("Across latents", note, tuple(f"{n} latents" for n in SIZES), list(rows.items()), SIZES)


def tables(reps: int) -> list[Table]:
    return [
        rates(),
        worst_rate(),
        balanced(),
        bootstrap(reps, np.random.default_rng(5)),
        areas(binormal, "normal scores", reps, 1),
        areas(exponential, "exponential scores", reps, 2),
        areas(levels, "scores with two values", reps, 3),
        clustered(reps, with_effect=True),
        clustered(reps, with_effect=False),
        documents(reps // 2, what="balanced accuracy"),
        documents(reps // 2, what="AUROC"),
        correlations(reps // 4),
        summaries(reps),
    ]


INTRO = """# Coverage of the intervals

How often a nominal 95% interval holds the truth. The rule: at least 0.90 wherever n is 50 or more, rates of 1.0 included.
Written by `python -m benchmarks.interval_coverage --write`; the formulas and the papers they come from are in
`autointerp/stats.py`.

`n` is examples of one class. A latent is scored on 50 + 50 by default. At n = 10 (a quantile's TPR has about 5) intervals are
so wide that they say little, but they still say it honestly.

Examples of one prompt or of one document are not independent: numbers of examples are divided by a design effect, estimated from
the answers by prompts and by documents together. It is never below 1, never above what it would be if all examples of a cluster
were alike, and its t quantile counts the clusters that it was estimated from, so that intervals are wide where clusters are few.

What `ci_method` says, as it is put together:

| name | meaning |
|---|---|
| `wilson`, `wilson_weighted` | a rate; with weights |
| `mover_wilson` | balanced accuracy: of two rates |
| `newcombe_auroc` | AUROC |
| `wilson_average_precision` | average precision |
| `jackknife_document` | correlation, leaving out one document at a time; the upper limit of sides that never meet allows for meetings not seen |
| `wilson_document` | correlation where at most one document is wrong: a rate of right documents |
| `none` | no interval |
| `..._clustered` | some examples share a prompt (for intruder: a quantile) or a document, and the interval allows for it |
| `..._one_prompt` | all examples stood in one prompt (saebench). Whether errors come together there cannot be told from the answers: this is not allowed for, while shared documents are |
| `..._one_document`, `..._one_quantile` | likewise |
"""


def main() -> int:
    reps = 4000
    found = tables(reps)
    text = INTRO + "\n" + "\n\n".join(table.markdown() for table in found) + "\n"
    print(text)
    if "--write" in sys.argv:
        DOC.parent.mkdir(exist_ok=True)
        DOC.write_text(text)
    low = [(table.title, table.worst()) for table in found if max(table.sizes) >= FROM and table.worst() < LEAST]
    for title, value in low:
        print(f"below {LEAST}: {title}: {value:.3f}", file=sys.stderr)
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
