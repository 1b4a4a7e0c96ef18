"""Good answers for the scripted server: what a model that keeps to the form would say."""

import json
import random
import re
from collections import Counter

from tests.scripted_server import digest, obedient

_DRAWN: Counter = Counter()
WORDS = "names verbs numbers brackets imports errors strings quotes loops classes".split()


def answer(body):
    """A list of the length asked for, a choice, or an explanation; the same for the same request."""
    rng = random.Random(digest(body))
    constrained = obedient(body, rng)
    if constrained is not None:
        return constrained
    last = body["messages"][-1]["content"] if "messages" in body else ""
    texts = re.findall(r"^Text \d+:", last, re.MULTILINE)
    if texts:
        return json.dumps([rng.randint(0, 1) for _ in texts])
    return f"EXPLANATION: Tokens of {rng.choice(WORDS)} near {rng.choice(WORDS)}."


def reader(body):
    """What an attentive model says of a latent that fires on one word: at the second draw of a prompt, or when asked to revise.

    As a judge it does what the explanation says: `Everything` is in every text, `Nothing` in none, a word in those that have it.
    """
    messages = [message["content"] for message in body["messages"]]
    last = messages[-1]
    if last.startswith("Description: "):
        said = re.findall(r"word\d+", last.partition("\n")[0])
        texts = re.findall(r"(?m)^Text \d+: (.*)$", last)
        everything = "Everything" in last.partition("\n")[0]
        return json.dumps([int(everything or (bool(said) and said[0] in text.split())) for text in texts])
    marked = Counter(re.findall(r"<< ?(word\d+)", last)).most_common(1)
    truth = marked[0][0] if marked else "no word"
    if last.startswith("STRONGEST TOKENS:"):
        return "LABEL: say " + re.findall(r'PROMOTED TOKENS: " (\w+)"', last)[0]
    if last.startswith("The explanation so far:"):
        return f"EXPLANATION: The word {truth}."
    name = digest(body)
    _DRAWN[name] += 1
    return "EXPLANATION: " + {1: "Everything.", 2: f"The word {truth}."}.get(_DRAWN[name], "Nothing.")
