"""Rules: machine-readable explanations that predict a latent's activity from a token and the tokens around it.

A rule is a disjunction of at most ten clauses; a clause is a conjunction of conditions, each on the token at one offset (0 is
the token itself, -1 the one before). Token identity, token text without case and space, the character class of a token, and a
token's presence among the few before are all a condition can see. What a condition cannot see, for the window ends there, does
not match.

A clause carries the probability that a token it matches is active, as counted where the rule was learned, so that a rule also
ranks.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import numpy as np
import orjson

from autointerp.digest import canonical_json
from autointerp.errors import InputError, nearest
from autointerp.protocols import Vocabulary

# Shapes: E examples, W tokens of a window.

MAX_CLAUSES = 10
Kind = Literal["token", "word", "class", "recent", "line", "quoted", "column", "seen"]
KINDS: tuple[str, ...] = get_args(Kind)


def _matches(pattern: str) -> Callable[[str], bool]:
    compiled = re.compile(pattern)
    return lambda text: compiled.fullmatch(text) is not None


CLASSES: dict[str, tuple[str, Callable[[str], bool]]] = {
    "digits": ("digits", _matches(r"\s*[0-9]+")),
    "hex": ("hexadecimal digits", _matches(r"\s*(?=[0-9a-fA-F]*[0-9])[0-9a-fA-F]+|\s*[a-fA-F]{1,2}")),
    "newline": ("a line break", _matches(r"(?s).*\n.*")),
    "indent": ("indentation", _matches(r"(?s)\n*[ \t]{2,}")),
    "space_first": ("a token that begins with a space", _matches(r"(?s) \S.*")),
    "letters": ("letters without a space before them", _matches(r"[^\W\d_]+")),
    "lower": ("a lower-case word", _matches(r"\s?[a-z]+")),
    "capitalised": ("a capitalised word", _matches(r"\s?[A-Z][a-z]+")),
    "upper": ("capital letters", _matches(r"\s?[A-Z]+")),
    "underscore": ("a token with an underscore", _matches(r"(?s).*_.*")),
    "opening": ("an opening bracket", _matches(r"(?s)\s*.*[(\[{]")),
    "closing": ("a closing bracket", _matches(r"(?s)\s*[)\]}].*")),
    "quote": ("a quotation mark", _matches(r"(?s).*[\"'`].*")),
    "operator": ("an operator", _matches(r"\s*[-+*/%=<>!&|^~@]+\s*")),
    "punctuation": ("punctuation", _matches(r"\s*[.,:;?]+\s*")),
    "wide": ("a character outside ASCII", _matches(r"(?s).*[^\x00-\x7f].*")),
}
"""Character classes of tokens: name -> (how a sentence calls it, test of the token's text)."""

_ONLY_VALUE = {"quoted": "line", "seen": "same"}
_APOSTROPHE = re.compile(r"'[a-z]+")

_CLASS_BIT = {name: np.uint32(1 << i) for i, name in enumerate(CLASSES)}
_UNKNOWN = np.uint32(1 << 31)


class TokenTexts:
    """What rules know of the tokens of one vocabulary: filled in as tokens are met, kept as long as the vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        # Not kept: it would hold its own key of the cache below alive.
        self._lock = threading.Lock()
        size = len(vocabulary)
        self._bits = np.full(size, _UNKNOWN, np.uint32)
        self._words = np.full(size, -1, np.int32)
        self._word_number: dict[str, int] = {"": 0}
        self._word_list = [""]
        self._texts: dict[int, str] = {}

    def classes(self, vocabulary: Vocabulary, ids: np.ndarray) -> np.ndarray:
        """Return the uint32 class bits of each token, same shape."""
        self._learn(vocabulary, ids)
        return np.asarray(self._bits[ids])

    def words(self, vocabulary: Vocabulary, ids: np.ndarray) -> np.ndarray:
        """Return the int32 number of each token's word, same shape; 0 for tokens that have none."""
        self._learn(vocabulary, ids)
        return np.asarray(self._words[ids])

    def number_of(self, word: str) -> int:
        """Return the number of a word; -1 when no token met so far has it."""
        return self._word_number.get(word, -1)

    def word(self, number: int) -> str:
        """Return the word of a number."""
        return self._word_list[number]

    def text(self, vocabulary: Vocabulary, token: int) -> str:
        """Return the text of one token."""
        self._learn(vocabulary, np.array([token]))
        return self._texts[token]

    def _learn(self, vocabulary: Vocabulary, ids: np.ndarray) -> None:
        new = np.unique(ids[self._bits[ids] == _UNKNOWN])
        if len(new) == 0:
            return
        with self._lock:
            for token in new.tolist():
                text = self._texts[token] = vocabulary.text(np.array([token], np.uint32))
                word = word_of(text)
                if word not in self._word_number:
                    self._word_number[word] = len(self._word_list)
                    self._word_list.append(word)
                self._words[token] = self._word_number[word]
                # Last, since its bits say that all of a token is known.
                self._bits[token] = sum(_CLASS_BIT[name] for name, (_, test) in CLASSES.items() if test(text))


_CACHE: WeakKeyDictionary[Vocabulary, TokenTexts] = WeakKeyDictionary()


def token_texts(vocabulary: Vocabulary) -> TokenTexts:
    """Return what is known of a vocabulary's tokens, shared by all rules."""
    found = _CACHE.get(vocabulary)
    if found is None:
        found = _CACHE.setdefault(vocabulary, TokenTexts(vocabulary))
    return found


def word_of(text: str) -> str:
    """Return a token's word: its text without case and surrounding space, or "" where no letter or digit is left."""
    word = text.strip().casefold()
    return word if any(char.isalnum() for char in word) else ""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One condition of a clause."""

    kind: Kind
    offset: int
    """Which token: 0 the one itself, negative before it, positive after. For ``recent`` and ``seen``: how many tokens back to
    look; 0 for kinds that concern the line."""
    value: int | str
    """``token`` and ``recent``: a token id; ``word``: text; ``class``: a name of `CLASSES`; ``line``: what an earlier token of
    the same line says, without surrounding space; ``quoted``: ``line``, a quotation mark before it in the line is still open;
    ``column``: tokens since the line's break, 0 the first; ``seen``: ``same``, the same token came before."""

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "offset": self.offset, "value": self.value}


@dataclass(frozen=True, kw_only=True)
class Clause:
    """Conditions that must all hold."""

    conditions: tuple[Condition, ...]
    score: float
    """Probability that a token which matches is active, 0..1."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A token is predicted active when any clause matches it."""

    clauses: tuple[Clause, ...]

    def scores(self, tokens: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Return float32 [E, W]: the greatest score of the clauses that match each token, 0 where none does."""
        view = Windows(tokens, lengths, vocabulary)
        result = np.zeros(tokens.shape, np.float32)
        for clause in self.clauses:
            matched = view.inside.copy()
            for condition in clause.conditions:
                matched &= view.match(condition)
            np.maximum(result, np.where(matched, np.float32(max(clause.score, 1e-6)), np.float32(0)), out=result)
        return result

    def predict(self, tokens: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Return bool [E, W]: which tokens are predicted active."""
        return self.scores(tokens, lengths, vocabulary) > 0

    def to_json(self) -> str:
        """Return canonical JSON."""
        clauses = [
            {"all": [condition.to_json() for condition in clause.conditions], "score": clause.score} for clause in self.clauses
        ]
        return canonical_json({"rule": 1, "any": clauses}).decode()

    @staticmethod
    def from_json(text: str) -> Rule:
        """Return the rule of :meth:`to_json`.

        Raises: InputError saying what is wrong with it.
        """
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise InputError(f"a rule is not valid JSON ({error}); expected what Rule.to_json wrote") from None
        if not isinstance(value, Mapping) or value.get("rule") != 1 or not isinstance(value.get("any"), list):
            raise InputError(f'a rule reads {text[:80]!r}; expected {{"rule": 1, "any": [...]}} of this release')
        if len(value["any"]) > MAX_CLAUSES:
            raise InputError(f"a rule has {len(value['any'])} clauses; at most {MAX_CLAUSES} are allowed")
        return Rule(clauses=tuple(_clause(item) for item in value["any"]))


def _clause(value: Any) -> Clause:
    if (
        not isinstance(value, Mapping)
        or set(value) != {"all", "score"}
        or not isinstance(value["all"], list)
        or not value["all"]
    ):
        raise InputError(f'a clause of a rule reads {str(value)[:80]!r}; expected {{"all": [conditions], "score": number}}')
    score = value["score"]
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise InputError(f"a clause of a rule has score {score!r}; expected a number from 0 to 1")
    return Clause(conditions=tuple(_condition(item) for item in value["all"]), score=float(score))


def _condition(value: Any) -> Condition:
    if not isinstance(value, Mapping) or set(value) != {"kind", "offset", "value"}:
        raise InputError(f"a condition of a rule reads {str(value)[:80]!r}; expected the keys kind, offset and value")
    kind, offset, wanted = value["kind"], value["offset"], value["value"]
    if kind not in KINDS:
        raise InputError(f"a condition of a rule has the kind {kind!r}; {nearest(str(kind), KINDS)}")
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise InputError(f"a condition of a rule has offset {offset!r}; expected an integer, negative for tokens before")
    if kind in ("recent", "seen") and offset < 1:
        raise InputError(f"a condition of kind {kind!r} has offset {offset}; expected how many tokens back to look, 1 or more")
    if kind in ("line", "quoted", "column") and offset != 0:
        raise InputError(f"a condition of kind {kind!r} has offset {offset}; expected 0, since it concerns the token's line")
    is_number = kind in ("token", "recent", "column")
    if isinstance(wanted, bool) or not isinstance(wanted, int if is_number else str):
        what = "a number of tokens" if kind == "column" else "a token id" if is_number else "text"
        raise InputError(f"a condition of kind {kind!r} has value {wanted!r}; expected {what}")
    if kind in _ONLY_VALUE and wanted != _ONLY_VALUE[kind]:
        raise InputError(f"a condition of kind {kind!r} has value {wanted!r}; expected {_ONLY_VALUE[kind]!r}")
    if kind == "class" and wanted not in CLASSES:
        raise InputError(f"a condition of a rule names the class {wanted!r}; {nearest(str(wanted), CLASSES)}")
    return Condition(kind=kind, offset=offset, value=wanted)


class Windows:
    """Tokens as rules see them: answers, for each token of a block, whether a condition holds."""

    def __init__(self, tokens: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary) -> None:
        self.tokens = tokens
        self.inside = np.arange(tokens.shape[1])[None, :] < np.asarray(lengths)[:, None]
        """bool [E, W]: not padding."""
        self._texts = token_texts(vocabulary)
        self._vocabulary = vocabulary
        self._classes: np.ndarray | None = None
        self._words: np.ndarray | None = None

    @property
    def classes(self) -> np.ndarray:
        """uint32 [E, W], class bits."""
        if self._classes is None:
            self._classes = self._texts.classes(self._vocabulary, self.tokens)
        return self._classes

    @property
    def words(self) -> np.ndarray:
        """int32 [E, W], numbers of words."""
        if self._words is None:
            self._words = self._texts.words(self._vocabulary, self.tokens)
        return self._words

    def word(self, number: int) -> str:
        """Return the word of a number in `words`."""
        return self._texts.word(number)

    def match(self, condition: Condition) -> np.ndarray:
        """Return bool [E, W]: where `condition` holds; padding never does."""
        if condition.kind in ("line", "quoted", "column"):
            return self._match_line(condition)
        if condition.kind == "seen":
            return self._match_seen(condition.offset)
        if condition.kind == "recent":
            here = (self.tokens == condition.value) & self.inside
            found = np.zeros_like(here)
            for back in range(1, min(condition.offset, here.shape[1] - 1) + 1):
                found[:, back:] |= here[:, :-back]
            return np.asarray(found & self.inside)
        if condition.kind == "token":
            here = self.tokens == condition.value
        elif condition.kind == "word":
            here = self.words == self._texts.number_of(str(condition.value))
        else:
            here = (self.classes & _CLASS_BIT[str(condition.value)]) != 0
        return np.asarray(shifted(here & self.inside, condition.offset) & self.inside)

    def _match_seen(self, back: int) -> np.ndarray:
        found = np.zeros_like(self.inside)
        for step in range(1, min(back, self.tokens.shape[1] - 1) + 1):
            found[:, step:] |= self.tokens[:, step:] == self.tokens[:, :-step]
        return np.asarray(found & self.inside)

    def _match_line(self, condition: Condition) -> np.ndarray:
        """Match what concerns the token's line: what of it lies before the window counts as absent."""
        place = np.arange(self.tokens.shape[1])[None, :]
        is_break = (self.classes & _CLASS_BIT["newline"]) != 0
        last_break = np.maximum.accumulate(np.where(is_break, place, -1), axis=1)
        if condition.kind == "column":
            # A token before the first break has no known place in its line.
            return np.asarray((place - last_break - 1 == condition.value) & (last_break >= 0) & ~is_break & self.inside)
        if condition.kind == "line":
            here = self._where(lambda text: text.strip() == condition.value)
            last = np.maximum.accumulate(np.where(here, place, -1), axis=1)
            return np.asarray(shifted(last, -1, fill=-1) > last_break) & self.inside
        marks = np.cumsum(self._where(_opens_or_closes), axis=1)
        before = shifted(marks, -1)
        at_break = np.where(last_break >= 0, np.take_along_axis(marks, np.maximum(last_break, 0), axis=1), 0)
        return np.asarray(((before - at_break) % 2 == 1) & ~is_break & self.inside)

    def _where(self, test: Callable[[str], bool]) -> np.ndarray:
        """Return bool [E, W]: where the token's text passes `test`."""
        ids = np.unique(self.tokens[self.inside])
        self._texts.classes(self._vocabulary, ids)
        wanted = [token for token in ids.tolist() if test(self._texts.text(self._vocabulary, token))]
        return np.asarray(np.isin(self.tokens, wanted) & self.inside)


def _opens_or_closes(text: str) -> bool:
    """Return whether a token holds an odd number of quotation marks; an apostrophe in a word is none."""
    return (text.count('"') + text.count("'")) % 2 == 1 and _APOSTROPHE.fullmatch(text) is None


def shifted(here: np.ndarray, offset: int, *, fill: int = 0) -> np.ndarray:
    """Return [E, W] of the same type: `here` at `offset` from each token; False, or `fill`, beyond the window's ends."""
    if offset == 0:
        return here
    found = np.full_like(here, fill)
    if abs(offset) >= here.shape[1]:
        return found
    if offset < 0:
        found[:, -offset:] = here[:, :offset]
    else:
        found[:, :-offset] = here[:, offset:]
    return found


def describe(rule: Rule, vocabulary: Vocabulary) -> str:
    """Return a sentence for people: each clause in words, clauses that differ in one token joined."""
    merged: dict[tuple[tuple[str, int, str], ...], list[str]] = {}
    for clause in rule.clauses:
        parts = {_place(condition): _value(condition, vocabulary) for condition in clause.conditions}
        _merge(merged, parts)
    phrases = [_phrase(dict(zip((key[:2] for key in context), (key[2] for key in context), strict=True)), own)
               for context, own in merged.items()]  # fmt: skip
    return "; or ".join(dict.fromkeys(phrases))


def _place(condition: Condition) -> tuple[str, int]:
    is_at = condition.kind in ("token", "word", "class")
    return ("at" if is_at else condition.kind, condition.offset)


def _value(condition: Condition, vocabulary: Vocabulary) -> str:
    if condition.kind == "class":
        return CLASSES[str(condition.value)][0]
    if condition.kind in ("word", "line"):
        return f"`{condition.value}`"
    if condition.kind in ("quoted", "seen"):
        return "it" if condition.kind == "seen" else "quotation marks"
    if condition.kind == "column":
        return str(int(condition.value) + 1)
    return quoted(token_texts(vocabulary).text(vocabulary, int(condition.value)))


def quoted(text: str) -> str:
    """Return a token's text in back quotes, its line breaks and other control characters written out."""
    shown = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return f"`{shown}`"


def _merge(merged: dict[tuple[tuple[str, int, str], ...], list[str]], parts: Mapping[tuple[str, int], str]) -> None:
    own = parts.get(("at", 0), "")
    context = tuple(sorted((kind, offset, text) for (kind, offset), text in parts.items() if (kind, offset) != ("at", 0)))
    values = merged.setdefault(context, [])
    if own not in values:
        values.append(own)


def _phrase(context: Mapping[tuple[str, int], str], own: Sequence[str]) -> str:
    named = [text for text in own if text]
    phrase = _either(named) if named and len(named) == len(own) else "any token"
    if set(context) >= {("at", -1), ("at", -2)}:
        before, last = context["at", -2], context["at", -1]
        phrase += f" after {_joined(before, last)}"
    elif ("at", -1) in context:
        phrase += f" after {context['at', -1]}"
    elif ("at", -2) in context:
        phrase += f" two tokens after {context['at', -2]}"
    for (kind, offset), text in context.items():
        if kind in ("recent", "seen"):
            phrase += f" within {offset} tokens after {text}" + " came before" * (kind == "seen")
        elif kind == "line":
            phrase += f" after {text} in the same line"
        elif kind == "quoted":
            phrase += f" inside {text}"
        elif kind == "column":
            phrase += f" as token {text} of a line"
        elif offset > 0:
            phrase += f" before {text}" if offset == 1 else f" {offset} tokens before {text}"
        elif offset < -2:
            phrase += f" {-offset} tokens after {text}"
    return phrase


def _joined(before: str, last: str) -> str:
    if before.startswith("`") and last.startswith("`"):
        return before[:-1] + last[1:]
    return f"{before} and then {last}"


def _either(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else ", ".join(values[:-1]) + " or " + values[-1]
