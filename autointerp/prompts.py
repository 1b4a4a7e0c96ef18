"""Prompt files: one prompt per TOML file, strict keys, declared variables.

Only the last user message and the reminder have variables, written ``{{name}}``; system text and worked examples are sent as
they stand, so that every latent shares them as a prefix. Substituted text is never expanded again: what the corpus or a model
wrote is data, in which the marker of the answer is broken, so that a reply that repeats it answers nothing. Prompts are looked
up in the checkout's ``prompts/`` when the package lies in one, else in the package's own copy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from autointerp.config import Config, read_toml
from autointerp.digest import digest
from autointerp.errors import ConfigError, nearest
from autointerp.records import Chat

_VARIABLE = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")

AnswerForm = Literal["marked_line", "list", "label", "levels", "number", "numbers", "slots", "none"]
SILENT: frozenset[str] = frozenset({"slots", "none"})
"""Forms of prompts that nothing is written after: their own log-probabilities are read."""


def _trimmed(text: str) -> str:
    return text.strip("\n")


Message = Annotated[str, AfterValidator(_trimmed)]
"""Text of a message; line breaks around it are layout of the file and not sent."""


class Turn(Config):
    """One worked example."""

    user: Message
    """What is asked, in the form of the prompt's own `user`."""
    assistant: Message
    """The answer wanted."""


class PromptFile(Config):
    """The keys of a prompt file."""

    description: str
    """What the prompt is for; not part of its identity."""
    answer: AnswerForm
    """``marked_line``: a line that begins with `marker`; ``list``: a JSON array of 0 and 1; ``label``: 0 or 1; ``levels``: a
    JSON array of integers 0 to 10; ``number``: one number; ``numbers``: numbers parted by commas, or ``none``; ``slots``: lines
    of a token, a tab and a level, read without a reply; ``none``: plain text, read without a reply."""
    variables: tuple[str, ...]
    """Every variable that `user` and `reminder` use."""
    system: Message
    """First message; has no variables."""
    turns: tuple[Turn, ...] = ()
    """Worked examples; have no variables."""
    user: Message
    """Last message; may use the variables."""
    reminder: Message = ""
    """Sent after a reply that could not be read; may use the variables."""
    marker: str | None = None
    """For ``marked_line``: what the line with the answer begins with."""


class Prompt:
    """A prompt that can be filled in."""

    def __init__(self, file: PromptFile, *, where: str = "a prompt") -> None:
        """Check that the variables used are those declared.

        Raises: ConfigError naming the first that is not.
        """
        self.file, self.where = file, where
        used = {name for text in (file.user, file.reminder) for name in _VARIABLE.findall(text)}
        for name in sorted(used - set(file.variables)):
            raise ConfigError(
                f"{where} uses the variable {name!r}, which `variables` does not declare; {nearest(name, file.variables)}"
            )
        for name in sorted(set(file.variables) - used):
            raise ConfigError(
                f"{where} declares the variable {name!r} and never uses it; remove it or write {{{{{name}}}}} into `user`"
            )
        if (file.marker is None) == (file.answer == "marked_line"):
            raise ConfigError(
                f"{where} has answer = {file.answer!r} and marker = {file.marker!r}; a marker goes with 'marked_line'"
            )
        if (file.answer in SILENT) == bool(file.reminder):
            found = "a reminder" if file.reminder else "no reminder"
            raise ConfigError(
                f"{where} has answer = {file.answer!r} and {found}; a reminder goes with prompts that are answered"
            )
        self._marker = None if file.marker is None else marker_pattern(file.marker)
        self.prompt_id = digest({"prompt": 1, **file.model_dump(mode="json", exclude={"description", "variables"})})

    def require(self, answer: AnswerForm, variables: frozenset[str]) -> Prompt:
        """Return the prompt itself if a method that knows `variables` and reads answers of this form can use it.

        Raises: ConfigError naming what does not fit.
        """
        if self.file.answer != answer:
            raise ConfigError(f"{self.where} asks for answer = {self.file.answer!r}; {answer!r} is needed here")
        for name in sorted(set(self.file.variables) - variables):
            raise ConfigError(f"{self.where} has an unknown variable {name!r}; {nearest(name, variables)}")
        return self

    def chat(self, **values: str) -> Chat:
        """Return the conversation up to the question, variables filled in.

        Raises: ConfigError when a value is missing or none is declared for it.
        """
        turns = [
            (role, text) for turn in self.file.turns for role, text in (("user", turn.user), ("assistant", turn.assistant))
        ]
        return Chat(messages=(("system", self.file.system), *turns, ("user", self._filled(self.file.user, values))))

    def again(self, chat: Chat, reply: str, **values: str) -> Chat:
        """Return the conversation with a reply that could not be read, and the reminder of the form wanted."""
        # An empty assistant message is refused by some servers.
        turns = (("assistant", reply or "(empty)"), ("user", self._filled(self.file.reminder, values)))
        return Chat(messages=(*chat.messages, *turns))

    def _filled(self, text: str, values: Mapping[str, str]) -> str:
        return _VARIABLE.sub(lambda match: self._value(match[1], values), text)

    def _value(self, name: str, values: Mapping[str, str]) -> str:
        if name not in values:
            raise ConfigError(f"{self.where} needs a value for the variable {name!r}; {nearest(name, values)}")
        value = values[name]
        return value if self._marker is None else self._marker.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", value)


def marker_pattern(marker: str) -> re.Pattern[str]:
    """Return what finds a marker in text, also with bold marks about its colon."""
    decorated = re.escape(marker.removesuffix(":")) + (r"\*{0,2}:\*{0,2}" if marker.endswith(":") else "")
    return re.compile(decorated)


def parse_prompt(values: Mapping[str, Any], *, where: str) -> Prompt:
    """Return the prompt that a TOML table describes.

    Raises: ConfigError naming the first wrong key or variable.
    """
    for i, turn in enumerate(values.get("turns", ())):
        if isinstance(turn, Mapping):
            Turn.parse(turn, where=f"{where}, worked example {i + 1}")
    return Prompt(PromptFile.parse(values, where=where), where=where)


def load_prompt(name: str) -> Prompt:
    """Return a prompt by name, such as ``score/detection``, or by the path of a ``.toml`` file.

    Raises: ConfigError when there is none, or something in it is wrong.
    """
    path = prompt_path(name)
    return parse_prompt(read_toml(path), where=f"prompt {name!r}" if name != str(path) else f"prompt file {path}")


def prompt_path(name: str) -> Path:
    """Return the file of a prompt.

    Raises: ConfigError when there is none.
    """
    if name.endswith(".toml"):
        return Path(name)
    known = {
        path.relative_to(root).with_suffix("").as_posix(): path for root in reversed(_roots()) for path in root.rglob("*.toml")
    }
    if name not in known:
        raise ConfigError(f"there is no prompt {name!r}; {nearest(name, known)} (or the path of a .toml file)")
    return known[name]


def _roots() -> list[Path]:
    package = Path(__file__).parent
    checkout = package.parent / "prompts"
    # An editable install copies the packaged prompts once, and then they go stale: the checkout's own come first.
    in_checkout = [checkout] if (package.parent / "pyproject.toml").is_file() and checkout.is_dir() else []
    packaged = [package / "_prompts"] if (package / "_prompts").is_dir() else []
    return [*in_checkout, *packaged]
