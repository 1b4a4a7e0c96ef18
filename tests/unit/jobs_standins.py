"""Small stand-ins for what lies below the jobs: a store of made-up latents, an explainer and a scorer that ask an engine."""

import asyncio

import numpy as np

from autointerp.digest import generator, hash64
from autointerp.errors import LLMError
from autointerp.examples.selection import SelectionConfig, selection_id
from autointerp.jobs.latents import CoderStatistics
from autointerp.llm.fake import FakeEngine
from autointerp.protocols import Needs
from autointerp.records import Chat, Examples, Explanation, LatentExamples, Request, Score, ScoreResult, Verdict

WIDTH = 60
WINDOW = 8


class Vocabulary:
    def text(self, ids):
        return "".join(self.pieces(ids))

    def pieces(self, ids):
        return [f"t{int(i)} " for i in ids]

    def pieces_of(self, tokens, lengths):
        return [self.pieces(row[:length]) for row, length in zip(tokens, lengths, strict=True)]

    def is_special(self, ids):
        return np.zeros(len(ids), bool)

    def __len__(self):
        return 1000


def block(rng, rows, *, source, base):
    tokens = rng.integers(0, 1000, (rows, WINDOW)).astype(np.uint32)
    acts = np.zeros((rows, WINDOW), np.float32)
    if source == "positive":
        acts[np.arange(rows), rng.integers(0, WINDOW, rows)] = rng.random(rows) + 0.5
    return Examples(
        tokens=tokens,
        activations=acts,
        lengths=np.full(rows, WINDOW, np.int32),
        positions=base + WINDOW * np.arange(rows),
        documents=np.arange(rows),
        quantiles=np.arange(rows).astype(np.int16) if source == "positive" else np.full(rows, -1, np.int16),
        sources=(source,) * rows,
    )


class Source:
    """Latent 7 has too few examples; latents from 50 on are dead. Partner of i is i + 1 (mod 50)."""

    def __init__(self, *, store_id="store-1", coders=("a", "b"), selection=None):
        self.store_id, self.path = store_id, "somewhere"
        self.coder_ids = {name: f"coder-{name}" for name in coders}
        self.control_of, self.outgrown = {}, {}
        self.vocabulary = Vocabulary()
        self.selection = selection or SelectionConfig()
        self.num_selected = 0
        self.expected = []

    def statistics(self, coder):
        counts = np.where(np.arange(WIDTH) < 50, 100, 0)
        return CoderStatistics(coder=coder, counts=counts, density=counts * np.arange(1, WIDTH + 1) / 1e6)

    def partners(self, coder):
        return np.where(np.arange(WIDTH) < 50, (np.arange(WIDTH) + 1) % 50, -1)

    def expect(self, latents):
        self.expected += latents

    def select(self, coder, latent):
        self.num_selected += 1
        rng = generator("examples", coder, latent)
        is_ok = latent < 50 and latent != 7
        blocks = {
            name: block(rng, 4 if is_ok else 0, source=source, base=1000 * latent)
            for name, source in (
                ("explain", "positive"),
                ("explain_statistics", "positive"),
                ("explain_negatives", "random"),
                ("positives", "positive"),
                ("negatives", "random"),
            )
        }
        return LatentExamples(
            coder=coder,
            latent=latent,
            selection_id=selection_id(self.store_id, self.coder_ids[coder], self.selection),
            status="ok" if is_ok else "too_few_examples",
            disjoint="document",
            density=0.01,
            max_activation=1.5,
            **blocks,
        )


class Explainer:
    name = "asking"
    needs = Needs(engine=True)

    def __init__(self, version=1):
        self.version = version

    def identity(self):
        return {"version": self.version}

    def requests(self, latent, resources, /):
        text = f"explain {self.version} {latent.coder} {latent.latent} {resources.vocabulary.text(latent.explain.tokens[0])}"
        return [Request(prompt=Chat(messages=(("user", text),)), max_tokens=20)]

    async def explain(self, latent, resources, /):
        reply = await resources.engine.complete(self.requests(latent, resources)[0])
        return [
            Explanation(
                coder=latent.coder,
                latent=latent.latent,
                explainer="",
                explainer_id="",
                selection_id=latent.selection_id,
                status="ok",
                text=reply.text,
                model=resources.engine.id.model,
                num_examples=len(latent.explain),
                num_attempts=1,
                prompt_tokens=reply.usage.prompt_tokens,
                output_tokens=reply.usage.output_tokens,
            )
        ]


class Rules:
    """An explainer without an engine."""

    name = "rules"
    needs = Needs()

    def identity(self):
        return {}

    async def explain(self, latent, resources, /):
        return [
            Explanation(
                coder=latent.coder,
                latent=latent.latent,
                explainer="",
                explainer_id="",
                selection_id=latent.selection_id,
                status="ok",
                text=f"rule of {latent.latent}",
                rule="{}",
            )
        ]


class Scorer:
    """Two requests per latent, each over half of the examples."""

    headline = "accuracy"
    needs = Needs(engine=True)

    def __init__(self, name="judging"):
        self.name = name

    def identity(self):
        return {"name": self.name}

    def requests(self, latent, explanation, resources, /):
        return [self._request(explanation, resources, half) for half in self._halves(latent)]

    def _halves(self, latent):
        judged = [(latent.positives, i) for i in range(len(latent.positives))]
        judged += [(latent.negatives, i) for i in range(len(latent.negatives))]
        return [judged[::2], judged[1::2]]

    def _request(self, explanation, resources, half):
        shown = "|".join(resources.vocabulary.text(examples.tokens[i]) for examples, i in half)
        return Request(prompt=Chat(messages=(("user", f"score {self.name} {explanation.text} {shown}"),)), max_tokens=5)

    async def score(self, latent, explanation, resources, /, *, control=None):
        halves = self._halves(latent)
        answers = await asyncio.gather(*(self._ask(explanation, resources, half) for half in halves))
        verdicts = []
        for prompt_idx, (half, (status, answer, request_id)) in enumerate(zip(halves, answers, strict=True)):
            for block_, i in half:
                verdicts.append(
                    Verdict(
                        coder=latent.coder,
                        latent=latent.latent,
                        explanation_id=explanation.explanation_id,
                        scorer=self.name,
                        scorer_id="",
                        control=control,
                        example_idx=i + (len(latent.positives) if block_ is latent.negatives else 0),
                        position=int(block_.positions[i]),
                        document=int(block_.documents[i]),
                        source=block_.sources[i],
                        quantile=int(block_.quantiles[i]),
                        truth=block_ is latent.positives,
                        answer=answer,
                        probability=None,
                        status=status,
                        request_ids=(request_id,) if request_id else (),
                        prompt_idx=prompt_idx,
                    )
                )
        scored = [v for v in verdicts if v.status == "ok"]
        lost = {"no_reply": len(verdicts) - len(scored)} if len(scored) < len(verdicts) else {}
        value = sum(v.answer == v.truth for v in scored) / len(scored) if scored else None
        score = Score(
            coder=latent.coder,
            latent=latent.latent,
            explanation_id=explanation.explanation_id,
            scorer=self.name,
            scorer_id="",
            selection_id=latent.selection_id,
            control=control,
            judge=resources.engine.id.model,
            explainer=explanation.explainer,
            metric="accuracy",
            is_headline=True,
            negatives="random",
            quantile=None,
            status="ok" if scored else "undefined",
            value=value,
            ci_low=value,
            ci_high=value,
            ci_method="none",
            chance=0.5,
            disjoint=latent.disjoint,
            num_scored=len(scored),
            unscored=lost,
        )
        return ScoreResult(verdicts=tuple(verdicts), scores=(score,))

    async def _ask(self, explanation, resources, half):
        try:
            reply = await resources.engine.complete(self._request(explanation, resources, half))
        except LLMError:
            return "no_reply", None, None
        return "ok", reply.text.endswith("1"), reply.request_id


def script(request):
    """An answer that depends on the request alone."""
    text = request.prompt.messages[0][1]
    number = int(hash64(3, np.array([sum(text.encode()) * len(text)]))[0] % 100)
    return f"answer {number} {number % 2}"


def engine(**options):
    return FakeEngine(script, **options)
