"""Joining the bytes of a text's tokens gives the text, for every kind of tokenizer."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from autointerp.subject.vocabulary import token_bytes
from tests.tiny import TEXTS, tiny_tokenizer

SAMPLES = [
    "hello, world", "    indented\n\t\ttabs  and   runs\n", "Gr\u00fc\u00dfe aus K\u00f6ln", "\u4f60\u597d\uff0c\u4e16\u754c",
    "\U0001f600\U0001f9d1\u200d\U0001f680!",
    "def f(x):\n        return x\r\n", "a\u0301\u00a0b\ufeff", "\x00\x7f",
]  # fmt: skip


def sentencepiece_bpe(*, prepend):
    """As Llama 2 (with a prepended space) and Gemma (without)."""
    text = " ".join(TEXTS)
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    steps = [normalizers.Prepend("\u2581")] if prepend else []
    trained.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator([text], trainers.BpeTrainer(vocab_size=450, special_tokens=special, show_progress=False))
    state = trained.get_vocab()
    merges = __import__("json").loads(trained.to_str())["model"]["merges"]
    backend = Tokenizer(models.BPE(vocab=state, merges=[tuple(pair) for pair in merges], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = trained.normalizer
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if prepend else [])])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


def unigram():
    """As T5: a metaspace and no byte fallback."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def joined(tokenizer, text):
    pieces, special = token_bytes(tokenizer)
    assert len(pieces) == len(special) == max(tokenizer.get_vocab().values()) + 1
    return b"".join(pieces[index] for index in tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("text", SAMPLES)
def test_byte_level(text):
    assert joined(tiny_tokenizer(), text) == text.encode()


@pytest.mark.parametrize("text", SAMPLES)
@pytest.mark.parametrize("prepend", [True, False])
def test_metaspace_with_byte_fallback(text, prepend):
    assert joined(sentencepiece_bpe(prepend=prepend), text) == (" " * prepend + text).encode()


@pytest.mark.parametrize("text", ["The quick brown fox", "import os for name in os"])
def test_metaspace_without_bytes(text):
    assert joined(unigram(), text) == b" " + text.encode()


def test_added_tokens_are_text_as_it_is():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["  \u00fc\u2581"])
    assert joined(tokenizer, "a  \u00fc\u2581b") == "a  \u00fc\u2581b".encode()
    pieces, special = token_bytes(tokenizer)
    assert pieces[0] == b"<|bos|>" and special[:5] == [True] * 5 and not any(special[5:])


def test_ids_that_are_not_used_have_no_bytes():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 3}, unk_token="a"))
    pieces, special = token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert pieces == [b"a", b"", b"", b"b"] and special == [False] * 4
