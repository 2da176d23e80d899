"""The GGUF reader on good, damaged and hostile files: a ModelError that names the file, nothing else."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from cluster.errors import ModelError
from cluster.model_files.gguf_header import GGUFType, read_gguf_header


def write_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("some.number", 7)
    writer.add_string("some.text", "größe")
    writer.add_array("some.words", ["a", "b c", ""])
    writer.add_array("some.floats", [1.5, -2.0])
    writer.add_bool("some.flag", True)
    writer.add_tensor("first", np.arange(6, dtype=np.float32).reshape(2, 3))
    quantised = gguf.quants.quantize(np.ones((4, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("second", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_the_gguf_package_wrote(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "good.gguf")
    header = read_gguf_header(path)
    assert header.architecture == "llama"
    assert header.require("some.number", int) == 7
    assert header.require("some.text", str) == "größe"
    assert header.require_list("some.words", str) == ["a", "b c", ""]
    assert header.require_list("some.floats", float) == [1.5, -2.0]
    assert header.require("some.flag", bool) is True
    assert header.tensors["second"].shape == (4, 64)
    assert header.tensors["second"].row_bytes(path) == 2 * 34
    reader = {tensor.name: int(tensor.data_offset) for tensor in gguf.GGUFReader(path).tensors}
    assert {name: tensor.offset for name, tensor in header.tensors.items()} == reader


def test_metadata_of_another_type_is_an_error_and_never_converted(tmp_path: Path) -> None:
    header = read_gguf_header(write_gguf(tmp_path / "good.gguf"))
    with pytest.raises(ModelError, match=r"'some.text' is str, not int"):
        header.require("some.text", int)
    with pytest.raises(ModelError, match=r"'some.flag' is bool, not int"):
        header.require("some.flag", int)
    with pytest.raises(ModelError, match=r"lacks 'absent'"):
        header.require("absent", int)
    with pytest.raises(ModelError, match=r"'some.words' holds something else"):
        header.require_list("some.words", int)


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    for encoding in GGUFType:
        kind = gguf.GGMLQuantizationType[encoding.name]
        assert (kind.value, *gguf.GGML_QUANT_SIZES[kind]) == encoding.value


@pytest.mark.parametrize("step", [1, 37])
def test_every_truncation_is_named(tmp_path: Path, step: int) -> None:
    whole = write_gguf(tmp_path / "good.gguf").read_bytes()
    damaged = tmp_path / "cut.gguf"
    lengths = range(4, 120) if step == 1 else range(120, len(whole), step)
    for length in lengths:
        damaged.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf: .*truncated"):
            read_gguf_header(damaged)


def test_damaged_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "good.gguf").read_bytes()
    generator = random.Random(1)
    damaged = tmp_path / "damaged.gguf"
    complaints: list[str] = []
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data) // 2)] = generator.randrange(256)
        damaged.write_bytes(data)
        try:
            read_gguf_header(damaged)
        except ModelError as error:
            complaints.append(error.message)
    assert len(complaints) > 100
    assert all("damaged.gguf" in complaint for complaint in complaints)


def test_a_huge_announced_count_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "huge.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + b"\0" * 64)
    with pytest.raises(ModelError, match=r"entries announced"):
        read_gguf_header(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a GGUF file"),
        (b"PK\3\4 something else", "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1 is not supported"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is not supported"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=words):
        read_gguf_header(path)


def test_a_missing_file_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be read: No such file"):
        read_gguf_header(tmp_path / "absent.gguf")
