"""Building a tokenizer from GGUF metadata (byte-level BPE, as GPT-2, Llama 3, Qwen and SmolLM have).

The file names the way text is cut into words before merging (`tokenizer.ggml.pre`); the expressions
below are those of the models' own tokenizer.json, in llama.cpp's naming.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from cluster.errors import ModelError
from cluster.model_files.gguf_header import GGUFHeader
from cluster.model_files.gguf_special_tokens import special_tokens
from cluster.tokenizer.ends import with_ends

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_GPT2_WORDS = _CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3_WORDS = (
    rf"(?i:{_CONTRACTIONS})"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
# For each name the expressions that cut the text, one after the other.
_SPLITS = {
    "gpt-2": (_GPT2_WORDS,),
    "smollm": (r"\p{N}", _GPT2_WORDS),
    "llama-bpe": (_LLAMA3_WORDS,),
    "qwen2": (_QWEN2_WORDS,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_NFC = ("qwen2",)
_WHOLE_WORDS_FIRST = ("llama-bpe",)  # a word that is a token is not built from merges
_BOS_BY_DEFAULT = ("llama-bpe",)


def tokenizer_from_gguf(header: GGUFHeader) -> Tokenizer:
    """Raises `ModelError` naming the file and the key: not byte-level BPE, unknown pre-tokenizer,
    inconsistent vocabulary."""
    kind = header.require("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise ModelError(
            f"{header.path}: tokenizer model {kind!r} is not supported in GGUF files (supported: gpt2, byte-level "
            "BPE); use the model's safetensors directory with its tokenizer.json"
        )
    pre = header.get("tokenizer.ggml.pre", str, "default")
    if pre not in _SPLITS:
        raise ModelError(
            f"{header.path}: tokenizer.ggml.pre {pre!r} is not supported (supported: {', '.join(sorted(_SPLITS))})"
        )
    tokens = header.require_list("tokenizer.ggml.tokens", str)
    tokenizer = Tokenizer(_merge_model(header, tokens, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    if pre in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in _SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(_added_tokens(header, tokens))
    if header.get("tokenizer.ggml.add_bos_token", bool, pre in _BOS_BY_DEFAULT):
        tokenizer.post_processor = _prepend_bos(header, tokens)
    return tokenizer


def _merge_model(header: GGUFHeader, tokens: list[str], *, ignore_merges: bool) -> models.BPE:
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ModelError(f"{header.path}: tokenizer.ggml.tokens lists a token twice")
    merges: list[tuple[str, str]] = []
    for line in header.require_list("tokenizer.ggml.merges", str):
        left, _, right = line.partition(" ")
        if left + right not in vocabulary or left not in vocabulary or right not in vocabulary:
            raise ModelError(f"{header.path}: tokenizer.ggml.merges holds {line!r}, which does not join two tokens")
        merges.append((left, right))
    return models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges)


def _added_tokens(header: GGUFHeader, tokens: list[str]) -> list[AddedToken]:
    """Tokens that are matched in the text before anything else."""
    types = header.require_list("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise ModelError(f"{header.path}: {len(types)} token types for {len(tokens)} tokens")
    return [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _prepend_bos(header: GGUFHeader, tokens: list[str]) -> processors.TemplateProcessing:
    bos_token_id = special_tokens(header).bos_token_id
    if bos_token_id is None or not 0 <= bos_token_id < len(tokens):
        raise ModelError(f"{header.path}: a BOS token is to be added, but tokenizer.ggml.bos_token_id names none")
    return with_ends((tokens[bos_token_id], bos_token_id))
