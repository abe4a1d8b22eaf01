"""What each token of a vocabulary adds to a decoded text, in bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastalign.config import ConfigError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """By token id, the bytes of each token behind others; special tokens have none.

    Joined and read as UTF-8 they are the text that the tokenizer decodes behind a prompt: some
    tokenizers drop a space at the very start of a text, which the first token of a completion is
    not.  Ids without a token have no bytes.

    Raises:
        ConfigError: the tokenizer is not a fast one, or neither byte-level (GPT-2 and after) nor
            of SentencePiece's kind (metaspaces, bytes as <0x0A>).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"stop: {type(tokenizer).__name__} is not a fast tokenizer: strings are matched in "
            "the text that its tokens decode to; use stop token ids, or a fast tokenizer"
        )
    read = _reader(json.loads(backend.decoder.__getstate__()) if backend.decoder else {})
    ids = backend.get_vocab(with_added_tokens=True).values()
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    table = [b""] * (max(ids) + 1)
    for index in ids:
        if index not in special:
            # Not the vocabulary's own key: added tokens are decoded from their normalised form.
            table[index] = read(backend.id_to_token(index))
    return table


def _reader(decoder: dict[str, Any]) -> Callable[[str], bytes]:
    parts = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    kinds = [part.get("type", "none") for part in parts]
    if kinds == ["ByteLevel"]:
        return _byte_level
    if kinds == ["Metaspace"] and parts[0]["replacement"] == _SPACE:
        return _metaspace
    # Fuse joins tokens, and Strip concerns the start of the text alone.
    if all(map(_is_of_sentencepiece, parts)) and "Replace" in kinds:
        return _byte_fallback if "ByteFallback" in kinds else _metaspace
    raise ConfigError(
        f"stop: the tokenizer decodes by {', '.join(kinds)}: strings are matched in the text of "
        "byte-level and SentencePiece tokenizers alone; leave stop out"
    )


def _is_of_sentencepiece(part: dict[str, Any]) -> bool:
    if part.get("type") == "Replace":
        return (part["pattern"], part["content"]) == ({"String": _SPACE}, " ")
    if part.get("type") == "Strip":
        return (part["content"], part["stop"]) == (" ", 0)
    return part.get("type") in ("ByteFallback", "Fuse")


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()  # added to the vocabulary as text


def _byte_fallback(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else _metaspace(token)


def _metaspace(token: str) -> bytes:
    return token.replace(_SPACE, " ").encode()


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others the characters from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_BYTE_OF_CHARACTER = _bytes_of_characters()
