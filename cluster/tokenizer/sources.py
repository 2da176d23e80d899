"""Where a tokenizer's parts come from: GGUF metadata, or the JSON files of a directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import tokenizers

from cluster.errors import ModelError
from cluster.model_files.gguf_header import GGUFHeader, read_gguf_header
from cluster.model_files.gguf_special_tokens import special_tokens
from cluster.model_files.huggingface import GenerationDefaults, decode_json_file
from cluster.model_files.source import ModelSource, SourceKind
from cluster.tokenizer.ends import Token, with_ends
from cluster.tokenizer.gguf_tokenizer import tokenizer_from_gguf

_MAX_TEMPLATE_BYTES = 4 << 20
_TOLD_OF_ENDS = ("LlamaTokenizer", "LlamaTokenizerFast")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    """What a `Tokenizer` is made of, whatever the files look like."""

    backend: tokenizers.Tokenizer
    is_byte_level: bool  # else SentencePiece-like with single-byte tokens
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    special_token_names: dict[str, str]  # "bos_token", "eos_token", "unk_token", "pad_token" as far as known
    chat_template: str | None
    context_length: int


def read_parts(source: ModelSource) -> TokenizerParts:
    """Raises `ModelError` naming the file."""
    match source.kind:
        case SourceKind.GGUF:
            return _from_gguf(read_gguf_header(source.path))
        case SourceKind.DIRECTORY:
            return _from_directory(source.path)


def _from_gguf(header: GGUFHeader) -> TokenizerParts:
    special = special_tokens(header)
    backend = tokenizer_from_gguf(header)
    ids = {
        "bos_token": special.bos_token_id,
        "eos_token": special.eos_token_ids[0] if special.eos_token_ids else None,
        "unk_token": special.unknown_token_id,
        "pad_token": special.padding_token_id,
    }
    names: dict[str, str] = {}
    for name, token_id in ids.items():
        if token_id is None:
            continue
        token = backend.id_to_token(token_id)
        if token is None:
            raise ModelError(f"{header.path}: {name} is id {token_id}, outside of the vocabulary")
        names[name] = token
    return TokenizerParts(
        backend=backend,
        is_byte_level=True,
        bos_token_id=special.bos_token_id,
        eos_token_ids=special.eos_token_ids,
        special_token_names=names,
        chat_template=header.get("tokenizer.chat_template", str, "") or None,
        context_length=header.require(f"{header.architecture}.context_length", int),
    )


class _AddedToken(msgspec.Struct):
    content: str


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _TokenizerConfig(msgspec.Struct):
    """The fields of tokenizer_config.json that matter here."""

    chat_template: str | list[_NamedTemplate] | None = None
    bos_token: str | _AddedToken | None = None
    eos_token: str | _AddedToken | None = None
    unk_token: str | _AddedToken | None = None
    pad_token: str | _AddedToken | None = None
    tokenizer_class: str = ""
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None

    def special_token_names(self) -> dict[str, str]:
        named = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "unk_token": self.unk_token,
            "pad_token": self.pad_token,
        }
        return {
            name: token.content if isinstance(token, _AddedToken) else token
            for name, token in named.items()
            if token is not None
        }


class _ModelLimits(msgspec.Struct):
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None


class _Decoder(msgspec.Struct):
    type: str = ""
    decoders: list[_Decoder] = []

    def types(self) -> set[str]:
        return {self.type}.union(*(decoder.types() for decoder in self.decoders))


class _TokenizerFile(msgspec.Struct):
    decoder: _Decoder | None = None


def _add_ends(backend: tokenizers.Tokenizer, config: _TokenizerConfig, path: Path) -> None:
    """For the classes that add BOS and EOS by their configuration, whatever the file says (DeepSeek's says nothing)."""
    is_told = config.add_bos_token is not None or config.add_eos_token is not None
    if config.tokenizer_class not in _TOLD_OF_ENDS or not is_told:
        return
    names = config.special_token_names()

    def token(field: str) -> Token:
        name = names.get(field, "")
        token_id = backend.token_to_id(name)
        if token_id is None:
            raise ModelError(f"{path}: {field} is {name!r}, which is no token, and is to be added to prompts")
        return name, token_id

    bos = None if config.add_bos_token is False else token("bos_token")
    backend.post_processor = with_ends(bos, token("eos_token") if config.add_eos_token else None)


def _from_directory(directory: Path) -> TokenizerParts:
    path = directory / "tokenizer.json"
    decoder_types = (decode_json_file(path, _TokenizerFile).decoder or _Decoder()).types()
    if not decoder_types & {"ByteLevel", "ByteFallback"}:
        listed = ", ".join(sorted(decoder_types - {""})) or "none"
        raise ModelError(f"{path}: decoder {listed} is not supported (supported: ByteLevel, ByteFallback)")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever is wrong in the file
        raise ModelError(f"{path}: {error}") from error
    # A training run's, kept in the file: prompts would be cut, or filled up, in silence.
    backend.no_truncation()
    backend.no_padding()
    config_path = directory / "tokenizer_config.json"
    config = decode_json_file(config_path, _TokenizerConfig) if config_path.exists() else _TokenizerConfig()
    _add_ends(backend, config, config_path)
    limits = decode_json_file(directory / "config.json", _ModelLimits)
    return TokenizerParts(
        backend=backend,
        is_byte_level="ByteLevel" in decoder_types,
        bos_token_id=limits.bos_token_id,
        eos_token_ids=GenerationDefaults.of_directory(directory).eos_token_ids,
        special_token_names=config.special_token_names(),
        chat_template=_chat_template(directory, config),
        context_length=limits.max_position_embeddings,
    )


def _chat_template(directory: Path, config: _TokenizerConfig) -> str | None:
    """The file beside the tokenizer wins over the field in its config, as in transformers."""
    path = directory / "chat_template.jinja"
    if path.exists():
        if path.stat().st_size > _MAX_TEMPLATE_BYTES:
            raise ModelError(f"{path}: larger than {_MAX_TEMPLATE_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    match config.chat_template:
        case None | str() as template:
            return template
        case templates:
            by_name = {entry.name: entry.template for entry in templates}
            if "default" not in by_name:
                raise ModelError(f"{directory}: tokenizer_config.json lists chat templates, but none named 'default'")
            return by_name["default"]
