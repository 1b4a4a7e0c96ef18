"""Coverage of the intervals through the whole scoring path, with a judge whose errors are known.

For every seed a planted latent is selected, explained with its true explanation and scored by all that ``--scorer all`` runs
(prompts, parsing, reply log, verdicts, scores, parquet), with the judge and the embedder of `benchmarks.known_judge`. The seed
decides both which windows are drawn and where the judge errs. Counted is how often the 95% interval of the headline holds the
score that the errors imply. Run as ``python -m benchmarks.judge_coverage`` to print the table, and with ``--write`` to write it
to docs/judge_coverage.md. Leaves with exit code 1 when the coverage of a scorer is below 0.90, or over all scorers outside 0.92
to 0.98 at a rate above 0; a scorer of the registry whose implied score is not known stops it.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from autointerp import stats
from autointerp.examples.render import plain
from autointerp.examples.selection import SelectionConfig
from autointerp.jobs.explain import ExplainConfig, aexplain
from autointerp.jobs.methods import build_scorer
from autointerp.jobs.score import ALL, ScoreConfig, build_scorers, score_from, usable
from autointerp.jobs.session import StoreSource
from autointerp.protocols import Scorer
from autointerp.records import Capabilities, LatentExamples
from autointerp.results.load import load_explanations, load_scores
from autointerp.scorers import REGISTRY
from autointerp.scorers.saebench import SAEBench
from autointerp.store import open_store
from autointerp.studies.plant import EXACT, Noise, plant_store
from benchmarks.known_judge import IMPLIED, Errors, Implied, KnownJudge, Truth, right_share, simulated

DOC = Path(__file__).parent.parent / "docs" / "judge_coverage.md"
RATES = (0.0, 0.05, 0.2)
LATENTS = (6, 12, 38)
SEEDS = 200
TOKENS = 262_144
RATES_TOO = ("tpr", "tnr", "tpr_by_activation")
"""Metrics beside the headline whose implied score is known: one minus the rate."""
LOW, BAND = 0.90, (0.92, 0.98)
INTRO = """# Intervals through the whole scoring path

How often the 95% interval of each scorer holds the score that a judge of known errors implies. Written by
`python -m benchmarks.judge_coverage --write`; the intervals themselves are in [intervals.md](intervals.md).

For each of {seeds} seeds a planted latent ({latents} take turns) is selected, explained and scored by everything that
`--scorer all` runs, with 50 + 50 windows, through prompts, parsing, reply log, verdicts, scores and parquet. The seed decides
which windows are drawn and where the judge errs. An answer is wrong with the given rate, whatever the window
(`benchmarks/known_judge.py`):

- detection, fuzzing, delphi_detection, delphi_fuzzing, saebench: the other answer. Rates, balanced accuracy and accuracy are
  1 - rate.
- intruder: one of the other four texts. The accuracy is 1 - rate.
- surprisal, embedding, example_embedding: log-probabilities and vectors that are scripted so that a window reads as activating or
  as silent; one that reads as activating always ranks above one that reads as silent, and within either ranks are random. The
  AUROC is (1 - rate)^2 + rate (1 - rate) = 1 - rate. In example_embedding the windows that queries are compared with are read
  wrongly at the same rate.
- simulation: all levels of a window are its activations, or, wrong, a level of 5 at a random token and none elsewhere. The
  correlation follows from the store.

**What is estimated.** The score over all windows that the selection could draw for this latent and over all draws of the judge's
errors. Errors do not depend on the window, so all scores but the correlation are 1 - rate for every draw of windows. The
correlation depends on which windows are drawn: the implied one is that of sums over every window of the store, activating and
silent ones with half of the weight each, in expectation over the errors, by code that shares nothing with the scorer. It is not
the score of the windows at hand: a seed draws other documents.

**At a rate of 0** every score is 1, the bound. An interval holds it when its upper limit is 1 (but for rounding), and one without
limits holds nothing; so coverage is 1 or something is wrong. How wide an interval is there says how much so few examples can
promise. A correlation of exactly 1 is treated as a rate of right documents (`wilson_document`).

An interval that has no limits, or a score with no value, counts as a miss everywhere. Bounds: each scorer 0.90, all scorers 0.92
to 0.98 at each rate above 0."""
OVER_NOTE = """A coverage above 0.98 means an interval wider than it need be. Errors are independent here and the intervals do not know it:
design effects are estimated from few clusters, by prompts and by documents, and never taken below 1."""
TOGETHER_NOTE = """## Errors that come together in what a scorer's answers share

Half of the answers hang on one draw for their cluster: a prompt (detection, fuzzing, delphi_detection, delphi_fuzzing, saebench),
the tasks of one quantile (intruder), a document (the others). The implied scores stay. For half of the seeds. The documents here
are long, so that a latent's 100 windows come from about 20 to 30; quantiles are 10. The fourteen answers of saebench stand in one
prompt, so nothing tells that they come together: no interval could allow for it, its method is called `wilson_one_prompt`, and it
is not bound."""
BY_DOCUMENT_NOTE = """## Errors that come together in documents

Half of the answers of every scorer hang on one draw for the document of the window, whatever prompt it stands in; in intruder that
of the silent window. For half of the seeds. (For simulation, surprisal, embedding and example_embedding that is a second draw of
what stands above.)"""
VARIANTS_NOTE = """## Variants

Other settings than `--scorer all` runs, for half of the seeds. The levels of `simulation, list` are rounded, so that its
correlation is below 1 without errors; where no window was read wrongly its interval knows of the rounding alone."""


@dataclass(frozen=True)
class Variant:
    """A scorer with other settings than ``--scorer all`` gives it."""

    scorer: str
    options: Mapping[str, Any]
    implied: Implied = right_share


VARIANTS = {
    "simulation, list": Variant("simulation", {"mode": "list"}, partial(simulated, is_rounded=True)),
    "detection, labels": Variant("detection", {"mode": "labels"}),
    "fuzzing, active": Variant("fuzzing", {"variant": "active"}),
}
UNBOUND = {("saebench", "0.2, 50% together")}
"""All fourteen answers stand in one prompt: nothing in them tells that they come together."""
KINDS = tuple(Errors(rate) for rate in RATES)
TOGETHER = Errors(0.2, shared=0.5)
BY_DOCUMENT = Errors(0.2, shared=0.5, by_document=True)


class Kept(StoreSource):
    """A store whose examples are read once."""

    def select(self, coder: str, latent: int) -> LatentExamples:
        kept: dict[tuple[str, int], LatentExamples] = self.__dict__.setdefault("kept", {})
        if (coder, latent) not in kept:
            kept[coder, latent] = super().select(coder, latent)
        return kept[coder, latent]


def all_scorers() -> list[Scorer]:
    """Return what ``--scorer all`` runs with an engine and an embedder that can do everything.

    Raises: AssertionError when one is left out, or has no implied score.
    """
    config = ScoreConfig(results=Path(), scorers=(ALL,), embedder="known")
    found, left_out = usable(config, build_scorers(config), Capabilities())
    assert not left_out, left_out
    unknown = sorted(set(REGISTRY) ^ set(IMPLIED))
    assert not unknown, f"no implied score is known for {', '.join(unknown)}: add it to benchmarks/known_judge.py"
    return found


def truth_of(source: StoreSource, scorers: Sequence[Scorer], folder: Path) -> Truth:
    """Return what is true of every window of a selection, and of what the scorers cut out of windows or mark elsewhere."""
    truth = Truth(source.vocabulary)
    for row in load_explanations(folder).itertuples():
        latent, text = source.select(str(row.coder), int(row.latent)), str(row.text)
        truth.add(latent, text)
        for scorer in scorers:
            if isinstance(scorer, SAEBench) or scorer.name == "fuzzing_active":
                judged = scorer.judged(latent, None, source.selection.seed)
                items = scorer.items(judged, source.selection.seed)
                render = getattr(scorer, "render", lambda item, vocabulary: plain(vocabulary, item.tokens))
                asked = [item for item in items if item.is_asked]
                truth.show(text, ((render(item, source.vocabulary), item.truth, item.document) for item in asked))
    return truth


def scored(
    store: Path, folder: Path, seed: int, kinds: Sequence[Errors], variants: Mapping[str, Variant], latent: int
) -> pd.DataFrame:
    """Return the rows of one seed: a new selection, and a judge of its own for each kind of error."""
    selection = SelectionConfig(seed=seed)
    explainer = "autointerp.studies.planted:PlantedExplanations"
    options = {"role": "true", "store": str(store)}
    source = Kept(store, selection)
    frames = []
    labelled: list[tuple[str, list[Scorer]]] = [("", all_scorers())]
    labelled += [(label, [build_scorer(variant.scorer, variant.options)]) for label, variant in variants.items()]
    results = folder / f"explained-{seed}"
    explained = ExplainConfig(
        store=store, results=results, explainer=explainer, options=options, latents=(latent,), selection=selection
    )
    asyncio.run(aexplain(explained, progress=False))
    truth = truth_of(source, [scorer for _, scorers in labelled for scorer in scorers], results)
    for label, scorers in labelled:
        copy = folder / f"scored-{seed}"
        shutil.copytree(results, copy)
        for errors in kinds:
            judge = KnownJudge(truth, errors, seed)
            config = ScoreConfig(results=copy, explainer="true", scorers=tuple(scorer.name for scorer in scorers))
            asyncio.run(score_from(config, source, scorers, judge.engine(), embedder=judge.embedder(), progress=False))
        frame = load_scores(copy)
        errors_of = {KnownJudge(truth, errors, seed).name: errors for errors in kinds}
        frame["errors"] = [errors_of[name].label for name in frame["judge"]]
        frame["rate"] = [errors_of[name].rate for name in frame["judge"]]
        frame["shared"] = [errors_of[name].shared for name in frame["judge"]]
        frame["label"] = label or frame["scorer"]
        frames.append(frame[frame["quantile"].isna()])
        shutil.rmtree(copy)
    shutil.rmtree(results)
    joined = pd.concat(frames, ignore_index=True)
    return joined[
        ["label", "errors", "rate", "shared", "latent", "metric", "is_headline", "value", "ci_low", "ci_high"]
    ].assign(seed=seed)


def implied_of(store: Path, labels: Mapping[str, Implied], rates: Sequence[float], latents: Sequence[int]) -> pd.DataFrame:
    """Return the headline score that each rate of errors implies, by label, rate and latent."""
    opened = open_store(store)
    rows = [
        (label, rate, latent, implied(opened, EXACT, latent, rate))
        for label, implied in labels.items()
        for rate in rates
        for latent in latents
    ]
    return pd.DataFrame(rows, columns=["label", "rate", "latent", "implied"])


def coverage(
    folder: Path,
    *,
    seeds: int,
    kinds: Sequence[Errors] = KINDS,
    variants: Mapping[str, Variant] = VARIANTS,
    together: bool = True,
    num_tokens: int = TOKENS,
    latents: Sequence[int] = LATENTS,
    workers: int = 1,
) -> pd.DataFrame:
    """Return one row per interval: scorer, kind of error, latent, seed, value, limits and the score that is implied.

    The `latents` take turns, one for each seed. In every other turn, so that all latents have part in them, `variants` run too,
    and with `together` also errors that come together, in either way. Rows are headlines, and the rates that balanced accuracy is
    made of.
    """
    store = plant_store(folder / "store", num_tokens=num_tokens, levels=[Noise(kind="moved", share=0)])
    jobs: list[tuple[int, Sequence[Errors], Mapping[str, Variant], int]] = []
    for seed in range(seeds):
        is_extra = seed // len(latents) % 2 == 0
        more = [TOGETHER, BY_DOCUMENT] if together and is_extra else []
        jobs.append((seed, [*kinds, *more], variants if is_extra else {}, latents[seed % len(latents)]))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_quiet) as pool:
        running = [pool.submit(scored, store, folder, *job) for job in jobs]
        frames = []
        for number, job in enumerate(running, start=1):
            frames.append(job.result())
            if number % 10 == 0:
                print(f"{number} of {seeds} seeds", file=sys.stderr, flush=True)
    labels = dict(IMPLIED) | {label: variant.implied for label, variant in variants.items()}
    frame = pd.concat(frames, ignore_index=True)
    frame = frame[frame["is_headline"] | frame["metric"].isin(RATES_TOO)]
    rates = sorted(set(frame["rate"]))
    frame = frame.merge(implied_of(store, labels, rates, latents), on=["label", "rate", "latent"], how="left")
    # Without limits an interval holds nothing.
    frame["held"] = (frame["ci_low"] <= frame["implied"] + 1e-9) & (frame["implied"] - 1e-9 <= frame["ci_high"])
    return frame


def _quiet() -> None:
    logging.disable(logging.INFO)


def table_of(frame: pd.DataFrame) -> pd.DataFrame:
    """Return coverage, its own 95% interval, value and width by label, metric and kind of error."""
    rows = []
    for (label, metric, errors), group in frame.groupby(["label", "metric", "errors"], sort=False):
        own = stats.wilson(float(group["held"].sum()), len(group))
        rows.append(
            {
                "label": label,
                "metric": metric,
                "errors": errors,
                "rate": float(group["rate"].iloc[0]),
                "is_headline": bool(group["is_headline"].iloc[0]),
                "is_main": label in IMPLIED and not float(group["shared"].iloc[0]),
                "implied": float(group["implied"].mean()),
                "value": float(group["value"].mean()),
                "coverage": own.value,
                "low": own.low,
                "high": own.high,
                "width": float((group["ci_high"] - group["ci_low"]).mean()),
                "num": len(group),
            }
        )
    order = {label: i for i, label in enumerate([*IMPLIED, *VARIANTS])}
    return pd.DataFrame(rows).sort_values(["label", "metric", "errors"], key=lambda c: c.map(order) if c.name == "label" else c)


def overall(table: pd.DataFrame) -> pd.DataFrame:
    """Return the coverage over all scorers at each rate above 0; every scorer has the same weight."""
    main = table[table["is_main"] & table["is_headline"] & (table["rate"] > 0)]
    return main.groupby("rate", as_index=False).agg(coverage=("coverage", "mean"), scorers=("label", "nunique"))


def failures(table: pd.DataFrame) -> list[str]:
    """Return a sentence for each bound that is broken, of headlines.

    Without errors every interval must hold. A scorer, and a variant or errors that come together as far as fewer intervals
    tell, must be at `LOW`; all scorers within `BAND`.
    """
    found = []
    for row in table[table["is_headline"]].itertuples():
        what = f"{row.label} at error rate {row.errors}: coverage {row.coverage:.3f}"
        if row.is_main and row.rate == 0 and row.coverage < 1:
            found.append(f"{what} of intervals at the bound, where every one must hold")
        elif (row.coverage if row.is_main else row.high) < LOW and (row.label, row.errors) not in UNBOUND:
            found.append(f"{what} is below {LOW}")
    for row in overall(table).itertuples():
        if not BAND[0] <= row.coverage <= BAND[1]:
            found.append(
                f"all scorers at error rate {row.rate:g}: coverage {row.coverage:.3f} is outside {BAND[0]} to {BAND[1]}"
            )
    return found


HEAD = "| scorer | metric | error rate | implied | mean score | coverage | 95% of coverage | mean width | intervals |"


def _lines(table: pd.DataFrame) -> list[str]:
    return [HEAD, "|---" * 9 + "|"] + [
        f"| {row.label} | {row.metric} | {row.errors} | {row.implied:.3f} | {row.value:.3f} | {row.coverage:.3f} "
        f"| {row.low:.3f} to {row.high:.3f} | {row.width:.3f} | {row.num} |"
        for row in table.itertuples()
    ]


def markdown(table: pd.DataFrame, *, seeds: int) -> str:
    extra = table[~table["is_main"] & table["is_headline"]]
    together = extra["label"].isin(list(IMPLIED))
    parts = [
        INTRO.format(seeds=seeds, latents=len(LATENTS)),
        "## Headline of every scorer",
        "\n".join(_lines(table[table["is_main"] & table["is_headline"]])),
        "\n".join(
            f"All {row.scorers} scorers at an error rate of {row.rate:g}: **{row.coverage:.3f}**  "
            for row in overall(table).itertuples()
        ),
        OVER_NOTE,
        TOGETHER_NOTE,
        "\n".join(_lines(extra[together & (extra["errors"] == TOGETHER.label)])),
        BY_DOCUMENT_NOTE,
        "\n".join(_lines(extra[together & (extra["errors"] == BY_DOCUMENT.label)])),
        VARIANTS_NOTE,
        "\n".join(_lines(extra[~together])),
        "## Rates that the headlines are made of",
        "\n".join(_lines(table[table["is_main"] & ~table["is_headline"]])),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    _quiet()
    seeds = int(sys.argv[sys.argv.index("--seeds") + 1]) if "--seeds" in sys.argv else SEEDS
    with tempfile.TemporaryDirectory() as folder:
        table = table_of(coverage(Path(folder), seeds=seeds, workers=min(os.cpu_count() or 1, 8)))
    text = markdown(table, seeds=seeds)
    print(text)
    if "--write" in sys.argv:
        DOC.write_text(text)
    found = failures(table)
    for sentence in found:
        print(sentence, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
