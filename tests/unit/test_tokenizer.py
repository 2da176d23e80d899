"""Tokenizers from GGUF metadata and from tokenizer.json, and back into a directory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from cluster.errors import ContextTooLong, InvalidRequest, ModelError
from cluster.tokenizer import Tokenizer, write_tokenizer_directory

CORPUS = [
    "Hello world, it's 2026 and we'll see.",
    "größe naïve 日本語 日本 🤗🤗",
    "  spaces\n\n\ttabs  123456 ½ x²",
] * 3
TEXTS = [*CORPUS[:3], "<s>Hello</s><user>x", "I'M HERE'S\r\n don't", "", "a\u0301", "ⅧⅧ 1234567", "…!?$+<=>^~|"]
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
SPECIAL = ["<unk>", "<s>", "</s>"]


def trained(pre_tokenizer: Any = None) -> Backend:
    """A small byte-level BPE with real merges; ids 0..2 are special."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return backend


def write_gguf(path: Path, backend: Backend, pre: str | None, **changes: Any) -> Path:
    content = json.loads(backend.to_str())
    vocabulary = backend.get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), "<user>"]
    fields = {
        "model": "gpt2",
        "tokens": tokens,
        "types": [3] * 3 + [1] * (len(tokens) - 4) + [4],
        "merges": [" ".join(merge) for merge in content["model"]["merges"]],
        **changes,
    }
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_tokenizer_model(fields["model"])
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(fields["tokens"])
    writer.add_token_types(fields["types"])
    writer.add_token_merges(fields["merges"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(fields.get("bos", 1))
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    if "add_bos" in fields:
        writer.add_add_bos_token(fields["add_bos"])
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def from_gguf(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", trained(), "gpt-2"))


def test_special_tokens_come_from_the_file(from_gguf: Tokenizer) -> None:
    assert from_gguf.bos_token_id == 1
    assert from_gguf.eos_token_ids == (2, 0)
    assert from_gguf.special_ids == {0, 1, 2}
    assert from_gguf.special_token_names == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert from_gguf.context_length == 64
    assert from_gguf.vocab_size == len(from_gguf.backend.get_vocab())


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(from_gguf: Tokenizer, text: str) -> None:
    token_ids = from_gguf.encode(text)
    assert from_gguf.decode(token_ids, skip_special_tokens=False) == text
    detokenizer = from_gguf.detokenizer(skip_special_tokens=False)
    assert "".join([detokenizer.push(token_id) for token_id in token_ids] + [detokenizer.flush()]) == text


@settings(max_examples=200)
@given(st.lists(st.integers(0, 400), max_size=40), st.booleans())
def test_incremental_text_equals_decoding_at_once(from_gguf: Tokenizer, token_ids: list[int], skip: bool) -> None:
    token_ids = [token_id % from_gguf.vocab_size for token_id in token_ids]
    detokenizer = from_gguf.detokenizer(skip_special_tokens=skip)
    text = "".join([detokenizer.push(token_id) for token_id in token_ids] + [detokenizer.flush()])
    assert text == from_gguf.decode(token_ids, skip_special_tokens=skip)


def test_added_tokens_are_recognised_in_text(from_gguf: Tokenizer) -> None:
    user = from_gguf.vocab_size - 1
    assert from_gguf.encode("<s><user></s>") == [1, user, 2]
    assert from_gguf.decode([1, user, 2]) == "<user>"  # user-defined, not special


TEXT = "I'M don't 12345 ½x²  a\n\nb!?"
DIGITS = pre_tokenizers.Digits(individual_digits=True)
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
SEQUENCES = {"gpt-2": BYTE_LEVEL, "smollm": pre_tokenizers.Sequence([DIGITS, BYTE_LEVEL])}
WORDS = {
    "llama-bpe": ["I", "'M", " don", "'t", " ", "123", "45", " ", "½", "x", "²", " ", " a", "\n\n", "b", "!?"],
    "qwen2": ["I", "'M", " don", "'t", " ", "1", "2", "3", "4", "5", " ", "½", "x", "²", " ", " a", "\n\n", "b", "!?"],
    "default": [
        "I",
        "'",
        "M",
        " don",
        "'",
        "t",
        " ",
        "123",
        "45",
        " ",
        "½",
        "x",
        "²",
        " ",
        " a",
        "\n",
        "\n",
        "b",
        "!?",
    ],
}


def cut(pre_tokenizer: Any, text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("pre", [*SEQUENCES, *WORDS])
def test_text_is_cut_into_words_as_the_models_own_tokenizer_does(pre: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_gguf(tmp_path / "tiny.gguf", trained(), pre))
    wanted = cut(SEQUENCES[pre], TEXT) if pre in SEQUENCES else WORDS[pre]
    assert cut(tokenizer.backend.pre_tokenizer, TEXT) == wanted


def test_qwen_texts_are_normalised(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_gguf(tmp_path / "tiny.gguf", trained(), "qwen2"))
    assert tokenizer.encode("a\u0301") == tokenizer.encode("\u00e1")


@pytest.mark.parametrize(
    ("pre", "add_bos", "first"), [("gpt-2", True, 1), ("llama-bpe", None, 1), ("gpt-2", None, None)]
)
def test_bos_is_added_where_the_file_or_the_family_says_so(
    pre: str, add_bos: bool | None, first: int | None, tmp_path: Path
) -> None:
    changes = {} if add_bos is None else {"add_bos": add_bos}
    tokenizer = Tokenizer.load(write_gguf(tmp_path / "tiny.gguf", trained(), pre, **changes))
    plain = tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.encode("Hello") == ([] if first is None else [first]) + plain


@pytest.mark.parametrize(
    ("pre", "changes", "words"),
    [
        ("gpt-2", {"model": "llama"}, r"tokenizer model 'llama' is not supported"),
        ("deepseek-llm", {}, r"tokenizer.ggml.pre 'deepseek-llm' is not supported \(supported: default, gpt-2"),
        ("gpt-2", {"merges": ["a bc d"]}, r"holds 'a bc d', which does not join two tokens"),
        ("gpt-2", {"types": [3, 3]}, r"2 token types for"),
        ("gpt-2", {"bos": 9999}, r"bos_token is id 9999, outside of the vocabulary"),
    ],
)
def test_a_vocabulary_that_cannot_be_right_is_refused(
    pre: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words):
        Tokenizer.load(write_gguf(tmp_path / "tiny.gguf", trained(), pre, **changes))


def test_exported_directory_is_one_that_transformers_reads_alike(from_gguf: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer_directory(from_gguf, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == from_gguf.encode(text)
    messages = [{"role": "user", "content": "Hello"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == from_gguf.render_chat(messages) == "<s>Hello"
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)


def test_a_directory_gives_the_same_tokenizer(from_gguf: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer_directory(from_gguf, tmp_path)
    (tmp_path / "model.safetensors").touch()
    again = Tokenizer.load(tmp_path)
    assert again.eos_token_ids == from_gguf.eos_token_ids
    assert again.special_token_names == from_gguf.special_token_names
    assert again.context_length == from_gguf.context_length
    assert [again.encode(text) for text in TEXTS] == [from_gguf.encode(text) for text in TEXTS]
    write_tokenizer_directory(again, tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_what_a_training_run_left_in_the_file_neither_cuts_nor_fills_up(from_gguf: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer_directory(from_gguf, tmp_path)
    (tmp_path / "model.safetensors").touch()
    path = str(tmp_path / "tokenizer.json")
    backend = Backend.from_file(path)
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=64)
    backend.save(path)
    again = Tokenizer.load(tmp_path)
    assert [again.encode(text) for text in TEXTS] == [from_gguf.encode(text) for text in TEXTS]


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}, ([1], [])),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True}, ([1], [2])),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, ([], [])),
        ({"tokenizer_class": "LlamaTokenizerFast"}, ([], [])),  # as the file has it
        ({"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": True}, ([], [])),  # which does not look at it
    ],
)
def test_llamas_classes_add_what_their_configuration_says(
    changes: dict[str, Any], ends: tuple[list[int], list[int]], from_gguf: Tokenizer, tmp_path: Path
) -> None:
    write_tokenizer_directory(from_gguf, tmp_path)
    (tmp_path / "model.safetensors").touch()
    config_path = tmp_path / "tokenizer_config.json"
    config_path.write_text(json.dumps(json.loads(config_path.read_text()) | changes))
    bare = from_gguf.encode("Hello", add_special_tokens=False)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("Hello") == [*ends[0], *bare, *ends[1]]
    assert loaded.encode("Hello", add_special_tokens=False) == bare


def test_a_template_file_wins_over_the_config(from_gguf: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer_directory(from_gguf, tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.load(tmp_path).render_chat([{"role": "user", "content": ""}]) == "from the file"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", None, r"tokenizer.json: missing"),
        ("tokenizer.json", "{", r"tokenizer.json: Input data was truncated"),
        ("tokenizer.json", '{"decoder": {"type": "WordPiece"}}', r"decoder WordPiece is not supported"),
        ("tokenizer.json", '{"decoder": {"type": "ByteLevel"}}', r"tokenizer.json: "),
        ("tokenizer_config.json", '{"bos_token": 7}', r"tokenizer_config.json: .*bos_token"),
        ("config.json", None, r"config.json: missing"),
    ],
)
def test_damaged_directories_are_named(
    name: str, content: str | None, words: str, from_gguf: Tokenizer, tmp_path: Path
) -> None:
    write_tokenizer_directory(from_gguf, tmp_path)
    (tmp_path / "model.safetensors").touch()
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=words):
        Tokenizer.load(tmp_path)


def test_a_text_that_cannot_fit_is_refused_with_both_numbers(from_gguf: Tokenizer) -> None:
    assert len(from_gguf.encode("Hello", max_tokens=64)) <= 64
    with pytest.raises(ContextTooLong, match=r"the text has 65 tokens, at most 64 fit"):
        from_gguf.encode("!" * 65, max_tokens=64)
    with pytest.raises(ContextTooLong, match=r"at least \d+ tokens, at most 64 fit"):
        from_gguf.encode("x" * 10_000_000, max_tokens=64)


def test_lone_surrogates_are_refused(from_gguf: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"not valid Unicode"):
        from_gguf.encode("a\ud800b")


def test_half_characters_of_one_token(from_gguf: Tokenizer) -> None:
    first = from_gguf.backend.get_vocab()["Ã"]
    assert from_gguf.token_bytes(first) == b"\xc3"
    assert from_gguf.token_text(first) == "\ufffd"
    assert from_gguf.token_bytes(10**6) == b""


def test_the_router_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, cluster.tokenizer; sys.exit(len({'torch', 'numpy', 'gguf', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_a_name_is_looked_up_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(name: object, progress: object, *, has_weights: bool) -> None:
        assert not has_weights
        raise ModelError(f"{name} was asked for")

    monkeypatch.setattr("cluster.tokenizer.tokenizer.resolve_model", resolve)
    with pytest.raises(ModelError, match="org/name was asked for"):
        Tokenizer.load("org/name")


def test_other_threads_go_on_while_a_long_text_is_encoded(tmp_path: Path) -> None:
    """The router tokenises in threads so that streams go on; the interpreter's lock must be free meanwhile."""
    tokenizer = Tokenizer.load(write_gguf(tmp_path / "tiny.gguf", trained(), "gpt-2"))
    text = "1" * 1_200_000
    ended = threading.Event()
    num_wakes = 0

    def watch() -> None:
        nonlocal num_wakes
        while not ended.is_set():
            time.sleep(0.001)
            num_wakes += 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    before = num_wakes
    token_ids = tokenizer.encode(text)
    num_meanwhile = num_wakes - before
    ended.set()
    watcher.join()
    assert tokenizer.decode(token_ids) == text
    # With the lock held it wakes at most once at each of our few calls; free, hundreds of times in half a second.
    assert num_meanwhile > 10
