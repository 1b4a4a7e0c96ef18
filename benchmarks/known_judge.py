"""A judge and an embedder that know the truth and err at a known rate, for every scorer, and the scores that this implies.

They are told which windows of a selection are activating and see what any judge sees: prompts, token ids, texts. An answer is
wrong with probability `rate`, whatever the window:

- yes-or-no questions: the other answer; the intruder: one of the other texts;
- simulation: a window's levels are its activations, or one level of 5 at a random token and none elsewhere;
- log-probabilities and embeddings: a window reads as activating or as silent. One that reads as activating always ranks above
  one that reads as silent; within either, ranks are random.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autointerp.digest import seed_of
from autointerp.examples.render import neutralise, plain
from autointerp.llm.fake import FakeEngine
from autointerp.protocols import Vocabulary
from autointerp.records import Examples, JsonSchema, LatentExamples, Reply, Request, Text, TokenIds, TokenLogprob
from autointerp.store import Store

WRONG_LEVEL = 5.0
_TEXT = re.compile(r"(?m)^Text(?: \d+)?: (.*)$")
_DESCRIPTION = re.compile(r"(?m)^Description: (.*)$")
_UNSEEN, _ESCAPED = re.compile(r"[<>\s\ufffd]"), re.compile(r"\\[nrt]")
_PIECE = re.compile(r"[\t\n]|[^\t\n]+")


@dataclass(frozen=True)
class Errors:
    """How a judge errs."""

    rate: float
    """Of all answers, 0..1."""
    shared: float = 0.0
    """Share of answers that hang on their cluster's luck, not on their own: errors come together."""
    by_document: bool = False
    """Clusters are documents for every scorer, else what the answers of a scorer share: a prompt, a quantile, a document."""

    @property
    def label(self) -> str:
        together = "by document" if self.by_document else "together"
        return f"{self.rate:g}" + (f", {self.shared:.0%} {together}" if self.shared else "")


@dataclass(frozen=True)
class Window:
    """What is true of one window for one latent."""

    is_active: bool
    document: int
    quantile: int
    levels: tuple[float, ...]
    """Activation of each token."""


class Truth:
    """What is true of every window of a selection."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.windows: dict[int, dict[str, Window]] = {}
        """By latent and by text without what rendering changes."""
        self.shown: dict[str, dict[str, tuple[bool, int]]] = {}
        """Texts that are no whole windows, by explanation: whether they are to be called active, and their document."""
        self.latent_of: dict[str, int] = {}
        """By explanation, as a prompt shows it."""

    def add(self, latent: LatentExamples, explanation: str) -> None:
        self.latent_of[neutralise(explanation)] = latent.latent
        known = self.windows.setdefault(latent.latent, {})
        for block in (latent.explain, latent.explain_statistics, latent.positives, latent.explain_negatives, latent.negatives):
            for row in range(len(block)):
                window = _window(block, row)
                text = bare(plain(self._vocabulary, block.tokens[row, : block.lengths[row]]))
                before = known.setdefault(text, window)
                assert before.is_active == window.is_active, f"{text!r} is both active and silent"

    def show(self, explanation: str, texts: Iterable[tuple[str, bool, int]]) -> None:
        known = self.shown.setdefault(neutralise(explanation), {})
        for text, is_active, document in texts:
            before, _ = known.setdefault(text, (is_active, document))
            assert before == is_active, f"{text!r} is both active and silent"

    def of(self, explanation: str, text: str) -> tuple[bool, int]:
        """Return whether a text is active, and its document."""
        shown = self.shown.get(explanation, {}).get(text)
        if shown is not None:
            return shown
        window = self.windows[self.latent_of[explanation]][bare(text)]
        return window.is_active, window.document


def _window(block: Examples, row: int) -> Window:
    is_active = block.sources[row] == "positive"
    levels = block.activations[row, : block.lengths[row]] if is_active else np.zeros(block.lengths[row])
    return Window(is_active, int(block.documents[row]), int(block.quantiles[row]), tuple(levels.tolist()))


def bare(text: str) -> str:
    """Return a text without marks, spaces and line breaks: the same however it was rendered."""
    # Marks first: one may stand inside what then reads as an escaped line break.
    return _ESCAPED.sub("", _UNSEEN.sub("", text))


class KnownJudge:
    """Answers by the truth, with errors."""

    def __init__(self, truth: Truth, errors: Errors, seed: int) -> None:
        self._truth, self._errors, self._seed = truth, errors, seed
        self._ids: dict[str, int] = {}
        self._pieces: list[str] = []
        self.name = f"known-{errors.label}-{seed}"

    def engine(self) -> FakeEngine:
        engine = FakeEngine(self._answer, model=self.name)
        engine.tokenize = self._tokenize  # type: ignore[method-assign]
        return engine

    def errs(self, unit: Sequence[str | int], document: Sequence[str | int], cluster: Sequence[str | int] = ()) -> bool:
        """Return whether the answer `unit` is wrong; `document`, or `cluster` where there is one, names whose luck it may share."""
        is_shared = self._errors.shared > 0 and self._uniform("whole", *unit) < self._errors.shared
        if self._errors.by_document or not cluster:
            cluster = ("document", *document)
        return self._uniform("luck", *(cluster if is_shared else unit)) < self._errors.rate

    def _uniform(self, *parts: str | int) -> float:
        return seed_of("judge", self._seed, *parts) * 2.0**-64

    # Chat ---------------------------------------------------------------------------------------------------------

    def _answer(self, request: Request) -> str | Reply:
        prompt = request.prompt
        if isinstance(prompt, Text):
            return self._shown(request, [self._id(piece) for piece in _PIECE.findall(prompt.text)])
        if isinstance(prompt, TokenIds):
            return self._simulated(request, prompt) if request.prompt_logprobs.top else self._surprised(request, prompt)  # type: ignore[union-attr]
        question = prompt.messages[-1][1]
        texts = _TEXT.findall(question)
        if isinstance(request.constraint, JsonSchema):
            schema = json.loads(request.constraint.schema)
            if schema["type"] == "integer":
                return str(self._intruder(question, texts))
            if "enum" not in schema["items"]:
                return self._listed(question)
        explanation = _DESCRIPTION.findall(question)[-1]
        latent, asked = self._truth.latent_of[explanation], prompt.messages[0][1]
        answers = []
        for i, text in enumerate(texts):
            is_active, document = self._truth.of(explanation, text)
            answers.append(is_active != self.errs((question, text, i), (asked, latent, document), (question,)))
        if request.labels:
            return str(int(answers[0]))
        if request.constraint is not None:
            return json.dumps([int(answer) for answer in answers])
        return ", ".join(str(i) for i, answer in enumerate(answers, start=1) if answer) or "none"

    def _intruder(self, question: str, texts: Sequence[str]) -> int:
        keys = [bare(text) for text in texts]
        places: set[tuple[int, int, int, int]] = set()
        for latent, known in self._truth.windows.items():
            found = [known.get(key) for key in keys]
            silent = [i for i, window in enumerate(found) if window is not None and not window.is_active]
            if None not in found and len(silent) == 1:
                quantile = min(window.quantile for window in found if window is not None and window.is_active)
                places.add((silent[0], latent, quantile, known[keys[silent[0]]].document))
        assert len({place for place, *_ in places}) == 1, f"{len(places)} texts are intruders of {texts}"
        place, latent, quantile, document = min(places)
        if self.errs((question,), ("intruder", latent, document), ("intruder", latent, quantile)):
            place = (place + 1 + int(self._uniform("other", question) * (len(texts) - 1))) % len(texts)
        return place + 1

    def _listed(self, question: str) -> str:
        pieces = json.loads(re.findall(r"(?m)^Tokens \(\d+\): (.*)$", question)[-1])
        return json.dumps([round(level) for level in self._levels(_DESCRIPTION.findall(question)[-1], pieces)])

    def _levels(self, explanation: str, pieces: Sequence[str]) -> list[float]:
        latent, key = self._truth.latent_of[explanation], bare("".join(pieces))
        window = self._truth.windows[latent][key]
        assert len(window.levels) == len(pieces)
        if not self.errs(("levels", latent, key), ("levels", latent, window.document)):
            return list(window.levels)
        levels = [0.0] * len(pieces)
        levels[int(self._uniform("place", latent, key) * len(pieces))] = WRONG_LEVEL
        return levels

    # Prompts as token ids: a line, a tab and a line break are a token each ------------------------------------------

    async def _tokenize(self, text: str, /) -> tuple[int, ...]:
        return tuple(self._id(piece) for piece in _PIECE.findall(text))

    def _id(self, piece: str) -> int:
        if piece not in self._ids:
            self._ids[piece] = len(self._pieces)
            self._pieces.append(piece)
        return self._ids[piece]

    def _text(self, ids: Iterable[int]) -> str:
        return "".join(self._pieces[i] for i in ids)

    def _shown(self, request: Request, ids: Sequence[int], top: Mapping[int, float] | None = None, each: float = -1.0) -> Reply:
        assert request.prompt_logprobs is not None
        tokens = tuple(
            TokenLogprob(
                token=self._pieces[ids[i]],
                token_id=ids[i],
                logprob=each,
                top=_between(top[i]) if top and i in top else (),
            )
            for i in range(request.prompt_logprobs.start, len(ids))
        )
        return Reply(text="", finish="length", prompt_tokens=tokens, served_model=self.name)

    def _simulated(self, request: Request, prompt: TokenIds) -> Reply:
        assert request.prompt_logprobs is not None
        slots, ids = request.prompt_logprobs.at, prompt.ids
        pieces = [self._pieces[ids[slot - 2]] for slot in slots]
        levels = self._levels(_DESCRIPTION.findall(self._text(ids[: slots[0] - 2]))[-1], pieces)
        return self._shown(request, ids, dict(zip(slots, levels, strict=True)))

    def _surprised(self, request: Request, prompt: TokenIds) -> Reply:
        assert request.prompt_logprobs is not None
        start, ids = request.prompt_logprobs.start, prompt.ids
        explanation, text = _DESCRIPTION.findall(self._text(ids[:start]))[-1], self._text(ids[start:])
        gain = 0.0
        if explanation in self._truth.latent_of:
            gain = math.sin(self.angle("surprisal", self._truth.latent_of[explanation], text))
        return self._shown(request, ids, each=(gain - 40.0) / (len(ids) - start))

    # Embeddings -----------------------------------------------------------------------------------------------------

    def angle(self, kind: str, latent: int, text: str) -> float:
        """Return the angle at which a text lies: above 0 what reads as activating, below what reads as silent; 0 unknown."""
        key = bare(text)
        window = self._truth.windows[latent].get(key)
        if window is None:
            return 0.0
        side = window.is_active != self.errs((kind, latent, key), (kind, latent, window.document))
        return (1 if side else -1) * math.pi / 4 + (self._uniform("angle", kind, latent, text) - 0.5) * math.pi / 8

    def embedder(self) -> KnownEmbedder:
        return KnownEmbedder(self, self._truth)


class KnownEmbedder:
    """Embeds texts so that cosines are known: each latent has a plane of its own, in which explanations point upwards."""

    def __init__(self, judge: KnownJudge, truth: Truth) -> None:
        self.id = judge.name
        self._judge, self._truth = judge, truth

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        latents = sorted(self._truth.windows)
        vectors = np.zeros((len(texts), len(latents), 2))
        explained = {bare(text): latent for text, latent in self._truth.latent_of.items()}
        for i, text in enumerate(texts):
            own = explained.get(bare(text))
            for j, latent in enumerate(latents):
                if own is None:
                    angle = self._judge.angle("embedding", latent, text)
                    vectors[i, j] = (math.cos(angle), math.sin(angle))
                else:
                    vectors[i, j] = (0, float(latent == own))
        flat = vectors.reshape(len(texts), -1)
        return np.asarray(flat / np.linalg.norm(flat, axis=1, keepdims=True), np.float32)


def _between(level: float) -> tuple[tuple[str, float], ...]:
    """Return the two levels around `level` with the log-probabilities that make it the expected one."""
    low = min(math.floor(level), 9)
    above = level - low
    return tuple((str(n), math.log(p)) for n, p in ((low, 1 - above), (low + 1, above)) if p > 0)


# The scores that errors imply -------------------------------------------------------------------------------------------

Implied = Callable[[Store, str, int, float], float]
"""(store, coder, latent, rate) -> the headline score."""


def right_share(store: Store, coder: str, latent: int, rate: float) -> float:
    """Of yes-or-no answers and of choices: rates, their mean and the accuracy are 1 - rate.

    So is the AUROC: a pair of a positive and a negative is ranked right when both are read right, wrong when both are read
    wrong, and by chance when one is, (1 - rate)^2 + rate (1 - rate).
    """
    return 1 - rate


def simulated(store: Store, coder: str, latent: int, rate: float, *, is_rounded: bool = False) -> float:
    """Return the correlation over all windows that could be drawn, half of the weight on activating ones, half on silent ones.

    Written against the store alone: sums of tokens over all windows, in expectation over the judge's errors.
    """
    positions, values = store.coder(coder).activations(latent)
    activation = np.zeros(len(store.tokens))
    activation[positions] = values
    sums = {True: np.zeros(6), False: np.zeros(6)}
    count = {True: 0, False: 0}
    seen = set()
    segments = store.segments
    for begin, stop in zip(segments.start.tolist(), segments.stop.tolist(), strict=True):
        for start in range(begin, stop, 32):
            tokens = store.tokens[start : min(start + 32, stop)]
            if len(tokens) < 8 or tokens.tobytes() in seen:
                continue
            seen.add(tokens.tobytes())
            a = activation[start : start + len(tokens)]
            s = np.round(a) if is_rounded else a
            # Of (1, truth, prediction, truth^2, prediction^2, truth * prediction).
            right = np.array([len(a), a.sum(), s.sum(), (a * a).sum(), (s * s).sum(), (a * s).sum()])
            wrong = np.array([len(a), a.sum(), WRONG_LEVEL, (a * a).sum(), WRONG_LEVEL**2, WRONG_LEVEL * a.mean()])
            sums[bool(a.any())] += (1 - rate) * right + rate * wrong
            count[bool(a.any())] += 1
    # As many windows of either kind, or as many as the selection finds.
    n, x, y, xx, yy, xy = sums[True] / count[True] + sums[False] / count[False]
    return float((xy - x * y / n) / math.sqrt((xx - x * x / n) * (yy - y * y / n)))


IMPLIED: Mapping[str, Implied] = {
    "detection": right_share,
    "fuzzing": right_share,
    "simulation": simulated,
    "surprisal": right_share,
    "embedding": right_share,
    "intruder": right_share,
    "example_embedding": right_share,
    "saebench": right_share,
    "delphi_detection": right_share,
    "delphi_fuzzing": right_share,
}
"""The headline score of every scorer that ``--scorer all`` runs."""
