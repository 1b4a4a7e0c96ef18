"""A planted latent with a validate pool, and a script that judges explanations by what they mean."""

import json
import re
from dataclasses import replace
from functools import lru_cache

from planted import planted, windows

from autointerp.llm.fake import FakeEngine

MEANINGS = {
    "path after os.": lambda text: "os.path" in text,
    "the word path": lambda text: "path" in text,  # in every window: a decoy
    "os.path, or a cat": lambda text: "os.path" in text or " cat" in text,
    "os.path, or a cat, or answers": lambda text: any(word in text for word in ("os.path", " cat", " answer")),
    "nothing": lambda text: False,
}
"""What a judge that knows the explanation says of a text."""

CHAIN = ["os.path, or a cat, or answers", "the word path", "os.path, or a cat", "path after os."]
"""What is said in rounds 0 to 3: the second is worse than the first."""


@lru_cache(maxsize=16)
def _validated(num, seed):
    return replace(
        planted(seed=seed),
        validate_positives=windows(num, active=True, seed=seed + 31, start=6000),
        validate_negatives=windows(num, active=False, seed=seed + 32, start=7000),
    )


def validated(num=20, *, seed=0, **changes):
    """The latent, with `num` windows of the validate pool on either side."""
    return replace(_validated(num, seed), **changes)


def is_judging(request):
    return any(content.startswith("Description: ") for _, content in request.prompt.messages)


def texts_of(request):
    """The explanation and the texts of a request to the judge."""
    last = [content for _, content in request.prompt.messages if content.startswith("Description: ")][-1]
    return last.partition("\n")[0].removeprefix("Description: "), re.findall(r"(?m)^Text \d+: (.*)$", last)


def judged(request):
    explanation, texts = texts_of(request)
    return json.dumps([int(MEANINGS[explanation](text)) for text in texts])


def is_reminder(request):
    """Whether a reply could not be read and is asked for again."""
    return request.prompt.messages[-1][1].startswith("That could not be read")


def key(text):
    """A window's text, whatever a prompt marks or parts in it."""
    return re.sub(r"[<> ]", "", text.replace("\n", "\\n"))


def engine(write, judge=judged, **options):
    """`write`: what the explainer's requests are answered with, given the request."""
    return FakeEngine(lambda request: judge(request) if is_judging(request) else write(request), **options)


def by_hand(explanation, latent):
    """Balanced accuracy of an explanation on the validate pool."""
    from planted import VOCABULARY

    rates = []
    for examples, truth in ((latent.validate_positives, True), (latent.validate_negatives, False)):
        says = [MEANINGS[explanation](VOCABULARY.text(row)) for row in examples.tokens]
        rates.append(sum(one == truth for one in says) / len(says))
    return sum(rates) / 2
