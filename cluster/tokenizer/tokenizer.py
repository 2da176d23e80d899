"""One model's tokenizer, chat template and special tokens, as the router, the CLI and embedded use need
them. Imports neither torch nor the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from cluster.errors import ContextTooLong, InvalidRequest
from cluster.model_files.cache import Progress, no_progress
from cluster.model_files.source import ModelSource, resolve_model
from cluster.tokenizer.chat_template import ChatTemplate, Json
from cluster.tokenizer.detokenizer import IncrementalDetokenizer
from cluster.tokenizer.sources import TokenizerParts, read_parts
from cluster.tokenizer.token_bytes import byte_fallback_bytes, byte_level_bytes


class Tokenizer:
    """Text to token ids and back. Thread-safe."""

    def __init__(self, source: ModelSource, parts: TokenizerParts) -> None:
        self.source = source
        self.context_length = parts.context_length  # of the model; a deployment may allow less
        self.bos_token_id = parts.bos_token_id
        self.eos_token_ids = parts.eos_token_ids  # every id that ends an answer, the main one first
        self.special_token_names = parts.special_token_names  # "bos_token" -> "<s>", for templates
        self.backend: tokenizers.Tokenizer = parts.backend
        self.chat_template: ChatTemplate | None = None
        if parts.chat_template is not None:
            self.chat_template = ChatTemplate(parts.chat_template, parts.special_token_names)
        self.vocab_size = self.backend.get_vocab_size(with_added_tokens=True)
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._to_bytes = byte_level_bytes if parts.is_byte_level else byte_fallback_bytes
        self._bytes: dict[int, bytes] = {}
        self._longest_token = max((len(token.encode()) for token in self.backend.get_vocab()), default=1)

    @staticmethod
    def load(source: ModelSource | str | Path, progress: Progress = no_progress) -> Tokenizer:
        """From a GGUF file, a directory with tokenizer.json, a Hugging Face id or `demo`.

        Raises `ModelError` naming the file: missing, malformed, of an unsupported kind.
        """
        if not isinstance(source, ModelSource):
            source = resolve_model(source, progress, has_weights=False)
        return Tokenizer(source, read_parts(source))

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Token ids of `text`; special tokens written in it are recognised.

        Raises `ContextTooLong` naming both numbers if there are more than `max_tokens`; a text that
        cannot possibly fit is refused before any work is done on it. Raises `InvalidRequest` if the
        text holds lone surrogates.
        """
        try:
            num_bytes = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text is not valid Unicode: {error.reason}") from error
        if max_tokens is not None and num_bytes > max_tokens * self._longest_token:
            at_least = -(-num_bytes // self._longest_token)
            raise ContextTooLong(f"the text has at least {at_least} tokens, at most {max_tokens} fit")
        # `encode` holds the interpreter's lock, seconds for a long text; a batch, also of one, does not.
        [encoding] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        token_ids: list[int] = encoding.ids
        if max_tokens is not None and len(token_ids) > max_tokens:
            raise ContextTooLong(f"the text has {len(token_ids)} tokens, at most {max_tokens} fit")
        return token_ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence. Ids outside of the vocabulary stand for nothing."""
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; possibly part of a character. Empty for an unknown id."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self.backend.id_to_token(token_id)
            known = b"" if token is None else self._to_bytes(token)
            self._bytes[token_id] = known
        return known

    def token_text(self, token_id: int) -> str:
        """One token on its own, for people: half characters become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def detokenizer(self, *, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """A new incremental detokenizer for one output sequence."""
        return IncrementalDetokenizer(self.token_bytes, self.special_ids if skip_special_tokens else frozenset())

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Json]],
        *,
        tools: Sequence[Mapping[str, Json]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Json] | None = None,
    ) -> str:
        """The prompt for a conversation, from the model's own template. It brings its own special
        tokens, so encode it with `add_special_tokens=False`. Raises `InvalidRequest`."""
        if self.chat_template is None:
            raise InvalidRequest(f"the model {self.source.name!r} has no chat template; use completions instead")
        return self.chat_template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables
        )
