"""Intruder: can a judge tell which of five windows is not the latent's? (arXiv 2507.08473).

Measures the latent and the judge, not an explanation. For each silent window: four activating windows of one quantile (the
quantiles take turns) and the silent one among them at a random place, all with highlights; the judge names the place of the
one that does not belong. The silent window is lent the pattern of an activating one, so marks alone tell nothing. Chance is
1 in 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from pydantic import Field

from autointerp.digest import generator
from autointerp.examples.render import highlight
from autointerp.prompts import load_prompt
from autointerp.protocols import Needs, Resources
from autointerp.records import Explanation, LatentExamples, Score, Verdict
from autointerp.scorers.highlights import dealt_anew, shown_masks
from autointerp.scorers.items import Answer, Item, item_of
from autointerp.scorers.metrics import Rows, not_applicable, rate
from autointerp.scorers.parse import read_number
from autointerp.scorers.prompted import OneQuestion, PromptedConfig, Question


class IntruderConfig(PromptedConfig):
    """How the question is made."""

    num_shown: int = Field(default=5, ge=3, le=20)
    """Windows in a question, the intruder included; chance is 1 in so many."""
    threshold: float = Field(default=0.3, ge=0, lt=1)
    """Tokens above this share of their window's greatest activation are highlighted."""


@dataclass(frozen=True, kw_only=True)
class Task(Item):
    """A question: the intruder, and the windows it stands among."""

    shown: tuple[Item, ...]
    """All windows in the order in which they are shown, the intruder included."""
    place: int
    """Where the intruder stands, from 0."""


class Intruder(OneQuestion):
    """Asks which window does not belong to the others."""

    Config = IntruderConfig
    name = "intruder"
    headline = "accuracy"
    config: IntruderConfig

    def __init__(self, config: IntruderConfig | None = None) -> None:
        """Load the prompt.

        Raises: ConfigError when it cannot be used.
        """
        self.config = config or IntruderConfig()
        self.needs = Needs(engine=True, explanation=False, constraints=self.config.constraint == "required")
        prompt = load_prompt(self.config.prompt or "score/intruder")
        self._prompt = prompt.require("number", frozenset({"examples", "count"}))

    def judged(self, latent: LatentExamples, control: str | None, seed: int) -> LatentExamples:
        if control is None:
            return latent
        return dealt_anew(latent, generator("intruder control", seed, latent.coder, latent.latent))

    def items(self, latent: LatentExamples, seed: int) -> list[Task]:
        """Return one task per silent window; none where there are too few activating ones."""
        positives, negatives, num = latent.positives, latent.negatives, self.config.num_shown - 1
        if len(positives) < num:
            return []
        random = generator("intruder", seed, latent.coder, latent.latent)
        masks, negative_masks = shown_masks(latent, self.config.threshold, random)
        quantiles = np.unique(positives.quantiles)
        tasks = []
        for i in range(len(negatives)):
            quantile = int(quantiles[i % len(quantiles)])
            # Of this quantile; where it has too few, of the nearest ones.
            distance = np.abs(positives.quantiles.astype(int) - quantile)
            rows = np.lexsort((random.random(len(positives)), distance))[:num]
            others = [item_of(positives, int(row), example_idx=i, truth=True, mask=masks[row]) for row in rows]
            intruder = item_of(negatives, i, example_idx=i, truth=False, mask=negative_masks[i])
            place = int(random.integers(num + 1))
            values = {field.name: getattr(intruder, field.name) for field in fields(intruder)} | {"quantile": quantile}
            tasks.append(Task(**values, shown=(*others[:place], intruder, *others[place:]), place=place))
        return tasks

    def question(self, batch: Sequence[Item], explanation: Explanation, resources: Resources) -> Question:
        [task] = batch
        assert isinstance(task, Task)
        num = len(task.shown)
        lines = []
        for i, item in enumerate(task.shown, start=1):
            assert item.mask is not None
            lines.append(f"Text {i}: {highlight(resources.vocabulary, item.tokens, item.mask)}")

        def read(text: str) -> list[Answer]:
            chosen = read_number(text, num) - 1
            places = [tuple(float(i == place) for i in range(num)) for place in (task.place, chosen)]
            # The intruder is found when the judge says that the latent does not fire there.
            return [Answer(status="ok", answer=chosen != task.place, truths=places[0], answers=places[1])]

        return self.chat_question(
            {"examples": "\n".join(lines), "count": str(num)},
            read,
            resources,
            max_tokens=16,
            schema={"type": "integer", "minimum": 1, "maximum": num},
        )

    def scores(
        self, verdicts: Sequence[Verdict], latent: LatentExamples, explanation: Explanation, judge: str
    ) -> tuple[Score, ...]:
        made = Rows(latent, explanation, judge, self.headline, verdicts)
        chance = 1 / self.config.num_shown
        if len(latent.positives) < self.config.num_shown - 1:
            reason = f"{len(latent.positives)} activating windows are too few to make a question of"
            lost = not_applicable(latent, explanation, judge=judge, headline=self.headline, reason=reason)
            return tuple(replace(row, chance=chance) for row in lost)
        rows = made.absent(chance=chance)
        for source, tasks in made.by_source().items():
            # Tasks of one quantile share activating windows.
            rows.append(made.row("accuracy", tasks, rate(tasks, by_quantile=True), source, chance=chance))
            for quantile in sorted({task.quantile for task in tasks}):
                some = [task for task in tasks if task.quantile == quantile]
                rows.append(made.row("accuracy", some, rate(some), source, quantile, chance=chance))
        return tuple(rows)
