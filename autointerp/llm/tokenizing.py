"""Prompts and labels as token ids, for engines that have the tokenizer at hand (one of transformers)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autointerp.digest import digest, digest_file
from autointerp.errors import ConfigError, Permanent
from autointerp.records import Chat, Text, TokenIds

_SPACES = ("", " ", "\n", "\t", "  ", "\u2581")


def candidates(label: str) -> tuple[str, ...]:
    """Return the texts to tokenize where a vocabulary cannot be listed: the label with the space that tokens usually carry."""
    return tuple(dict.fromkeys([*(space + label for space in _SPACES), label + " ", label + "\n"]))


def local_identity(name: str) -> tuple[str, str | None]:
    """Return a model's name and, for a folder, the digest of its weights: a path identifies nothing."""
    folder = Path(name)
    if not folder.is_dir():
        return name, None
    files = sorted(path for pattern in ("*.safetensors", "*.bin", "config.json") for path in folder.glob(pattern))
    return folder.resolve().name, digest([[path.name, digest_file(path)] for path in files])


class PromptTokenizer:
    """Turns prompts into ids and labels into the tokens that stand for them."""

    def __init__(self, tokenizer: Any, extra_body: Mapping[str, Any]) -> None:
        """`extra_body`: of the engine's settings; only ``chat_template_kwargs`` means something in this process.

        Raises: ConfigError on any other key.
        """
        unknown = sorted(set(extra_body) - {"chat_template_kwargs"})
        if unknown:
            raise ConfigError(
                f"extra_body.{unknown[0]} has no meaning for a model in this process; known: chat_template_kwargs"
            )
        self.tokenizer = tokenizer
        self._template_settings = dict(extra_body.get("chat_template_kwargs", {}))
        self._by_text: dict[str, list[int]] | None = None

    @property
    def template_digest(self) -> str | None:
        """Digest of the chat template, or None when there is none."""
        template = getattr(self.tokenizer, "chat_template", None)
        return digest(template) if template else None

    def ids(self, prompt: Chat | Text | TokenIds) -> list[int]:
        """Return a prompt's token ids.

        Raises: Permanent when the prompt is empty, or a conversation that the tokenizer has no template for.
        """
        if isinstance(prompt, TokenIds):
            ids = list(prompt.ids)
        elif isinstance(prompt, Text):
            ids = list(self.tokenizer(prompt.text)["input_ids"])
        else:
            ids = list(self.tokenizer(self._conversation(prompt), add_special_tokens=False)["input_ids"])
        if not ids:
            raise Permanent("the prompt is empty: it has no tokens")
        return ids

    def _conversation(self, prompt: Chat) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise Permanent(f"{self.tokenizer.name_or_path} has no chat template; use an instruction-tuned model")
        from jinja2.exceptions import TemplateError

        messages = [{"role": role, "content": content} for role, content in prompt.messages]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **self._template_settings
            )
        except TemplateError as error:
            raise Permanent(f"the chat template of {self.tokenizer.name_or_path} refuses the conversation: {error}") from None
        return str(text)

    def plain(self, text: str) -> tuple[int, ...]:
        """Return the ids of `text` without special tokens."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, ids: list[int]) -> str:
        """Return the text of generated ids; special tokens have none."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def piece(self, token_id: int) -> str:
        """Return one token as text, special tokens as they are written."""
        return str(self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))

    def label_ids(self, labels: tuple[str, ...]) -> dict[int, int]:
        """Return token id -> index of the label that it is, with or without space around it.

        Raises: Permanent when a label is no single token.
        """
        if self._by_text is None:
            by_text: dict[str, list[int]] = defaultdict(list)
            # Special tokens decode to nothing, so none of them is ever a label.
            for token_id in range(len(self.tokenizer)):
                by_text[self.text([token_id]).strip()].append(token_id)
            self._by_text = dict(by_text)
        found = {}
        for index, label in enumerate(labels):
            ids = self._by_text.get(label) if label else None
            if not ids:
                raise Permanent(
                    f"the label {label!r} is no single token of {self.tokenizer.name_or_path}; choose a shorter word"
                )
            found.update(dict.fromkeys(ids, index))
        return found
