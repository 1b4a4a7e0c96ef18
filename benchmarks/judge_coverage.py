"""Coverage of the intervals through the whole scoring path, with a judge whose errors are known.

The judge knows which window is active and answers wrongly with a given rate, so the score it implies is known: TPR, TNR, balanced
accuracy and AUROC are all 1 minus that rate. Planted latents are scored by the score stage (prompts, parsing, reply log,
verdicts, scores, parquet) once for each seed of the judge; counted is how often the 95% interval of the headline holds the
implied score. Every registered scorer takes part that asks about single examples. Run as ``python -m benchmarks.judge_coverage``
to print the table, and with ``--write`` to write it to docs/judge_coverage.md. Leaves with exit code 1 when the coverage of a scorer
is below 0.90, or over all scorers outside 0.92 to 0.98 at a rate above 0.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from autointerp.digest import seed_of
from autointerp.jobs.explain import ExplainConfig, explain
from autointerp.jobs.methods import build_scorer
from autointerp.jobs.score import ScoreConfig, score_from
from autointerp.jobs.session import StoreSource
from autointerp.llm.fake import FakeEngine
from autointerp.protocols import Scorer
from autointerp.records import Chat, LatentExamples, Request
from autointerp.results.load import load_explanations, load_scores
from autointerp.scorers import REGISTRY
from autointerp.studies.plant import Noise, plant_store

DOC = Path(__file__).parent.parent / "docs" / "judge_coverage.md"
RATES = (0.0, 0.05, 0.2)
LATENTS = (0, 12, 26, 38)
SEEDS = 200
TOKENS = 262_144
INTRO = """# Intervals through the whole scoring path

A scripted judge that errs at a known rate answers the prompts of the score stage, so the score it implies is known: one minus
the rate, for every metric below. Coverage is over {seeds} seeds of the judge (a fifth of that for variants of a scorer) and
{latents} planted latents with 50 + 50 examples. At a rate of 0 every score is 1 and every interval holds it. *By prompt*: that
share of the answers hangs on one draw per prompt, as when a judge misreads a whole prompt. Written by
`python -m benchmarks.judge_coverage --write`; the intervals themselves are in [intervals.md](intervals.md).

| scorer | error rate | metric | coverage | mean score | mean width | intervals |
|---|---|---|---|---|---|---|
"""
LOW, BAND = 0.90, (0.92, 0.98)
_TEXT = re.compile(r"(?m)^Text(?: \d+)?: (.*)$")


@dataclass(frozen=True)
class Errors:
    """How a judge errs."""

    rate: float
    """Of all answers, 0..1."""
    shared: float = 0.0
    """Share of answers that hang on their prompt's luck, not on their own: errors come in prompts."""

    @property
    def label(self) -> str:
        return f"{self.rate:g}" + (f", {self.shared:.0%} by prompt" if self.shared else "")


class KnownJudge:
    """Answers by the truth, with errors."""

    def __init__(self, truth: Mapping[tuple[str, str], bool], errors: Errors, seed: int) -> None:
        """`truth`: whether an example is a positive, by (explanation, text as rendered)."""
        self._truth, self._errors, self._seed = truth, errors, seed
        self._explanations = {explanation for explanation, _ in truth}

    def engine(self) -> FakeEngine:
        return FakeEngine(self.answer, model=f"known-{self._errors.label}-{self._seed}")

    def answer(self, request: Request) -> str:
        assert isinstance(request.prompt, Chat)
        question = request.prompt.messages[-1][1]
        texts = _TEXT.findall(question)
        explanation = next(name for name in self._explanations if name in question)
        answers = [int(self._truth[explanation, text] != self._errs(question, text)) for text in texts]
        return str(answers[0]) if request.labels else json.dumps(answers)

    def _errs(self, question: str, text: str) -> bool:
        is_shared = self._errors.shared > 0 and _uniform(self._seed, question, text, "whole") < self._errors.shared
        luck = _uniform(self._seed, question) if is_shared else _uniform(self._seed, question, text)
        return luck < self._errors.rate


def _uniform(*parts: str | int) -> float:
    return seed_of("judge", *parts) * 2.0**-64


class Kept(StoreSource):
    """A store whose examples are read once."""

    def select(self, coder: str, latent: int) -> LatentExamples:
        kept: dict[tuple[str, int], LatentExamples] = self.__dict__.setdefault("kept", {})
        if (coder, latent) not in kept:
            kept[coder, latent] = super().select(coder, latent)
        return kept[coder, latent]


def scorers(names: Mapping[str, dict[str, str]]) -> dict[str, Scorer]:
    """Return the registered scorers that ask about single examples, and named variants of them."""
    found = {}
    for name in REGISTRY:
        scorer = build_scorer(name, {})
        if hasattr(scorer, "items") and hasattr(scorer, "render") and scorer.needs.engine:
            found[name] = scorer
    return found | {label: build_scorer(label.partition(",")[0], options) for label, options in names.items()}


def truth_of(source: StoreSource, scorer: Scorer, folder: Path) -> dict[tuple[str, str], bool]:
    """Return what is true of every example as the scorer shows it. A text that is shown as both is left out of the study."""
    known: dict[tuple[str, str], bool] = {}
    for row in load_explanations(folder).itertuples():
        latent = source.select(str(row.coder), int(row.latent))
        for item in scorer.items(latent, source.selection.seed):  # type: ignore[attr-defined]
            key = (str(row.text), scorer.render(item, source.vocabulary))  # type: ignore[attr-defined]
            assert known.setdefault(key, item.truth) == item.truth, key
    return known


def coverage(
    folder: Path, *, seeds: int, kinds: tuple[Errors, ...], variants: Mapping[str, dict[str, str]], num_tokens: int = TOKENS
) -> pd.DataFrame:
    """Return one row per scorer, kind of error and metric: coverage over (seed, latent), and the mean width."""
    store = plant_store(folder / "store", num_tokens=num_tokens, levels=[Noise(kind="moved", share=0)])
    results = folder / "explained"
    planted = {"role": "true", "store": str(store)}
    explainer = "autointerp.studies.planted:PlantedExplanations"
    explain(ExplainConfig(store=store, results=results, explainer=explainer, options=planted, latents=LATENTS), progress=False)
    source = Kept(store, ExplainConfig(store=store, results=results).selection)
    rows = []
    for label, scorer in scorers(variants).items():
        truth = truth_of(source, scorer, results)
        for errors in kinds:
            if errors.shared and scorer.needs.labels:
                continue  # each prompt holds one example
            copy = folder / "scored"
            shutil.copytree(results, copy)
            config = ScoreConfig(results=copy, explainer="true", scorers=(scorer.name,))
            # Variants take part with fewer seeds: one of them asks about every example alone.
            for seed in range(-(-seeds // 5) if label in variants else seeds):
                engine = KnownJudge(truth, errors, seed).engine()
                asyncio.run(score_from(config, source, [scorer], engine, progress=False))
            rows += _rows(label, errors, load_scores(copy))
            shutil.rmtree(copy)
            print(label, errors.label, flush=True, file=sys.stderr)
    return pd.DataFrame(rows)


def _rows(label: str, errors: Errors, frame: pd.DataFrame) -> list[dict[str, object]]:
    frame = frame[frame["quantile"].isna() & (frame["status"] == "ok")]
    rows: list[dict[str, object]] = []
    for metric, group in frame.groupby("metric"):
        if metric not in ("balanced_accuracy", "auroc", "tpr", "tnr"):
            continue
        implied = 1 - errors.rate
        held = (group["ci_low"] <= implied + 1e-12) & (implied - 1e-12 <= group["ci_high"])
        rows.append(
            {
                "scorer": label,
                "errors": errors.label,
                "metric": metric,
                "is_headline": bool(group["is_headline"].any()),
                "rate": errors.rate,
                "shared": errors.shared,
                "coverage": float(held.mean()),
                "value": float(group["value"].mean()),
                "width": float((group["ci_high"] - group["ci_low"]).mean()),
                "num": len(group),
            }
        )
    return rows


def markdown(frame: pd.DataFrame, *, seeds: int) -> str:
    lines = []
    for row in frame.itertuples():
        star = " (headline)" if row.is_headline else ""
        lines.append(
            f"| {row.scorer} | {row.errors} | {row.metric}{star} | {row.coverage:.3f} | {row.value:.3f} | {row.width:.3f} | {row.num} |"
        )
    return INTRO.format(seeds=seeds, latents=len(LATENTS)) + "\n".join(lines) + "\n"


KINDS = (*(Errors(rate) for rate in RATES), Errors(0.2, shared=0.5))
VARIANTS = {"detection, labels": {"mode": "labels"}, "fuzzing, active": {"variant": "active"}}


def failures(frame: pd.DataFrame) -> list[str]:
    """Return a sentence for each bound that is broken, of headline metrics."""
    found = []
    headline = frame[frame["is_headline"]]
    for row in headline.itertuples():
        if row.coverage < LOW:
            found.append(f"{row.scorer} at error rate {row.errors}: coverage {row.coverage:.3f} is below {LOW}")
    for errors, rows in headline[(headline["rate"] > 0) & (headline["shared"] == 0)].groupby("errors"):
        mean = float(np.average(rows["coverage"], weights=rows["num"]))
        if not BAND[0] <= mean <= BAND[1]:
            found.append(f"all scorers at error rate {errors}: coverage {mean:.3f} is outside {BAND[0]} to {BAND[1]}")
    return found


def main() -> int:
    logging.disable(logging.INFO)
    seeds = int(sys.argv[sys.argv.index("--seeds") + 1]) if "--seeds" in sys.argv else SEEDS
    with tempfile.TemporaryDirectory() as folder:
        frame = coverage(Path(folder), seeds=seeds, kinds=KINDS, variants=VARIANTS)
    text = markdown(frame, seeds=seeds)
    print(text)
    if "--write" in sys.argv:
        DOC.write_text(text)
    found = failures(frame)
    for sentence in found:
        print(sentence, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
