"""Special token ids of a GGUF file, as both the tokenizer and the engine need them."""

from __future__ import annotations

import msgspec

from cluster.model_files.gguf_header import GGUFHeader

# End of text, and the ends of a turn or a message that chat models stop at.
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


class SpecialTokens(msgspec.Struct, frozen=True):
    """`eos_token_ids` holds every id that ends an answer, the model's main one first."""

    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    unknown_token_id: int | None
    padding_token_id: int | None


def special_tokens(header: GGUFHeader) -> SpecialTokens:
    """Raises `ModelError` if an id is not a number."""
    ends = [token_id for key in _END_KEYS if (token_id := _token_id(header, key)) is not None]
    return SpecialTokens(
        bos_token_id=_token_id(header, "bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(ends)),
        unknown_token_id=_token_id(header, "unknown_token_id"),
        padding_token_id=_token_id(header, "padding_token_id"),
    )


def _token_id(header: GGUFHeader, key: str) -> int | None:
    full_key = f"tokenizer.ggml.{key}"
    return header.require(full_key, int) if full_key in header.metadata else None
