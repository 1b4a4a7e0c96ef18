"""The bytes of every token, so that readers of a store need no tokenizer.

Joining the bytes of a run of tokens and decoding them once gives its text, also where characters are split over tokens.
"""

from __future__ import annotations

import json
import re
from typing import Any

from autointerp.errors import InputError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\u2581"


def load_tokenizer(source: str) -> Any:
    """Return the tokenizer in a folder or on the hub.

    Raises: InputError when there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).strip().split("\n")[0].split())[:300] or type(error).__name__
        raise InputError(
            f"no tokenizer {source}: no such folder here, and the hub did not give it ({reason}); name another with --tokenizer"
        ) from error


def token_bytes(tokenizer: Any) -> tuple[list[bytes], list[bool]]:
    """Return (bytes, whether special) of each token id from 0 to the largest; ids that are not used have no bytes.

    Byte-level BPE (GPT-2, Llama 3, Qwen), SentencePiece with metaspace and byte fallback (Llama 2, Gemma, T5) and WordPiece are
    told apart by the tokenizer's own decoder.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    size = max(vocabulary.values(), default=-1) + 1
    added = {index: token for index, token in tokenizer.added_tokens_decoder.items() if index < size}
    specials = set(tokenizer.all_special_ids)
    is_special = [index in specials or (index in added and bool(added[index].special)) for index in range(size)]
    decode = _DECODERS[_kind(tokenizer, vocabulary)]
    pieces = [b""] * size
    for token, index in vocabulary.items():
        if index in added:
            content = str(added[index].content)
            is_spaced = not is_special[index] and decode is _metaspace
            pieces[index] = (content.replace(_METASPACE, " ") if is_spaced else content).encode("utf-8", "surrogatepass")
        else:
            pieces[index] = decode(token)
    return pieces, is_special


def _kind(tokenizer: Any, vocabulary: dict[str, int]) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    names = _decoder_types(json.loads(decoder.__getstate__())) if decoder is not None else set()
    if "ByteLevel" in names:
        return "byte_level"
    if names & {"Metaspace", "ByteFallback"} or "Replace" in names:
        return "metaspace"
    if "WordPiece" in names:
        return "word_piece"
    # Slow tokenizers have no decoder to ask.
    if any(token.startswith(_METASPACE) for token in vocabulary):
        return "metaspace"
    return "byte_level" if "\u0120" in vocabulary or any(token.startswith("\u0120") for token in vocabulary) else "plain"


def _decoder_types(state: dict[str, Any]) -> set[str]:
    inner = [name for part in state.get("decoders", []) for name in _decoder_types(part)]
    return {str(state.get("type")), *inner}


def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's map: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTES = _byte_of_character()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:  # a token that is not in the byte alphabet is text as it is
        return token.encode("utf-8", "surrogatepass")


def _metaspace(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace(_METASPACE, " ").encode("utf-8", "surrogatepass")


def _word_piece(token: str) -> bytes:
    return (token[2:] if token.startswith("##") else " " + token).encode("utf-8", "surrogatepass")


def _plain(token: str) -> bytes:
    return token.encode("utf-8", "surrogatepass")


_DECODERS = {"byte_level": _byte_level, "metaspace": _metaspace, "word_piece": _word_piece, "plain": _plain}
