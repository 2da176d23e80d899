"""Linear layers: the canonical bits for odd shapes, and the same row whatever is computed beside it."""

from __future__ import annotations

import threading

import pytest
import torch

from cluster.engine.kernels.cpu.arithmetic import InstructionClass, dot_chain
from cluster.engine.kernels.probes import Magnitudes, Probe, draw, first_difference, linear_probe, silu_probe
from tests.unit.kernel_variants import ALL_VARIANTS, class_of, expected_outputs, native, reference

SHAPES = [(1, 1, 1), (1, 16, 32), (2, 17, 31), (15, 33, 65), (16, 15, 64), (31, 48, 96), (65, 50, 40), (257, 20, 33)]


@pytest.mark.parametrize("variant", ALL_VARIANTS)
@pytest.mark.parametrize("magnitudes", Magnitudes)
def test_native_linear_has_the_bits_of_the_reference(variant: str, magnitudes: Magnitudes) -> None:
    for rows, outputs, inputs in SHAPES:
        for probe in (linear_probe(rows, outputs, inputs, magnitudes), silu_probe(rows, outputs, inputs, magnitudes)):
            assert first_difference(probe.run(native(variant)), expected_outputs(probe, class_of(variant))) is None, (
                probe.name
            )


def _operands(rows: int, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = draw(generator, rows, inputs, Magnitudes.CANCELLING).bfloat16()
    return x, draw(generator, outputs, inputs, Magnitudes.NORMAL).bfloat16()


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_a_row_does_not_depend_on_the_rows_beside_it(variant: str) -> None:
    ops = native(variant)
    x, weight = _operands(300, 70, 160)
    packed = ops.pack_linear(weight)
    expected = ops.linear(x, packed, out_dtype=torch.float32)
    for start, end in [(0, 1), (1, 17), (17, 49), (49, 148), (148, 300), (299, 300)]:
        part = ops.linear(x[start:end], packed, out_dtype=torch.float32)
        assert torch.equal(part, expected[start:end]), (start, end)


@pytest.mark.parametrize("variant", ALL_VARIANTS)
@pytest.mark.parametrize("rows", [1, 40])
def test_column_shards_and_thread_counts_do_not_change_bits(variant: str, rows: int) -> None:
    x, weight = _operands(rows, 700, 160)  # large enough for several threads
    one = native(variant, 1)
    expected = one.linear(x, one.pack_linear(weight))
    for num_threads in (2, 3, 8):
        ops = native(variant, num_threads)
        assert torch.equal(ops.linear(x, ops.pack_linear(weight)), expected)
        for shards in (2, 3, 7):
            parts = [ops.linear(x, ops.pack_linear(part)) for part in torch.tensor_split(weight, shards)]
            assert torch.equal(torch.cat(parts, dim=1), expected)


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_a_broken_row_stays_alone(variant: str) -> None:
    ops = native(variant)
    x, weight = _operands(40, 64, 96)
    packed = ops.pack_linear(weight)
    expected = ops.linear(x, packed)
    x[7, 3], x[30, 95] = torch.nan, torch.inf
    broken = ops.linear(x, packed)
    is_sound = torch.ones(40, dtype=torch.bool)
    is_sound[[7, 30]] = False
    assert torch.equal(broken[is_sound], expected[is_sound])
    assert broken[7].isnan().all()
    assert not broken[30].isfinite().all()


def test_results_are_right_while_several_threads_call() -> None:
    """The pool serves one call at a time; the others must run on their callers, not wait or mix."""
    ops = native("fma_avx2")
    x, weight = _operands(20, 700, 160)
    packed = ops.pack_linear(weight)
    expected = ops.linear(x, packed)
    wrong: list[int] = []

    def call_often(caller: int) -> None:
        wrong.extend(caller for _ in range(20) if not torch.equal(ops.linear(x, packed), expected))

    callers = [threading.Thread(target=call_often, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
        assert not caller.is_alive()
    assert wrong == []


def test_a_call_returns_when_all_of_its_work_is_done() -> None:
    """More helpers than cores, so that some lose their core in the middle of a piece."""
    ops = native("fma_avx2", 8)
    x, weight = _operands(256, 700, 160)
    packed = ops.pack_linear(weight)
    expected = native("fma_avx2", 1).linear(x, packed)
    for _ in range(40):
        out = ops.linear(x, packed)
        assert torch.equal(out, expected)
        out.zero_()  # the allocator hands the same memory out again


def test_denormals_of_torch_do_not_reach_the_kernels() -> None:
    probe = linear_probe(3, 20, 40, Magnitudes.DENORMAL)
    ops = native("fma_portable")
    expected = probe.run(ops)
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot flush denormals here")
    try:
        flushed = probe.run(ops)
    finally:
        torch.set_flush_denormal(False)
    assert first_difference(flushed, expected) is None


def _count_differences(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    return int((ours != theirs).sum())


@pytest.mark.parametrize("instructions", InstructionClass)
@pytest.mark.parametrize("magnitudes", [Magnitudes.NORMAL, Magnitudes.WIDE, Magnitudes.CANCELLING])
def test_the_data_would_show_another_order(instructions: InstructionClass, magnitudes: Magnitudes) -> None:
    generator = torch.Generator().manual_seed(2)
    a = draw(generator, 8, 320, magnitudes).bfloat16()
    b = draw(generator, 32, 320, magnitudes).bfloat16()
    canonical = dot_chain(a, b, instructions)
    backwards = dot_chain(a.flip(1), b.flip(1), instructions)
    halves = dot_chain(a[:, :160], b[:, :160], instructions) + dot_chain(a[:, 160:], b[:, 160:], instructions)
    assert _count_differences(canonical, backwards) > 50
    assert _count_differences(canonical, halves) > 50


def test_the_instruction_classes_differ_and_the_data_shows_it() -> None:
    probe: Probe = linear_probe(4, 40, 320, Magnitudes.WIDE)
    results = [probe.run(reference(variant))[0] for variant in ("amx_bf16", "avx512_bf16", "fma_portable")]
    assert _count_differences(results[0], results[1]) > 0
    assert _count_differences(results[1], linear_probe(4, 40, 320, Magnitudes.WIDE).run(reference("amx_bf16"))[0]) > 0
    denormal = linear_probe(4, 40, 320, Magnitudes.DENORMAL)
    assert _count_differences(denormal.run(reference("avx512_bf16"))[0], denormal.run(reference("fma_avx2"))[0]) > 0
