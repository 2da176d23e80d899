"""What the copy engine is told of a matrix, with layouts that all launches share."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cluster.engine.kernels.triton import launch_hopper
from cluster.engine.kernels.triton.gluon_names import shared_layout


@pytest.mark.parametrize(
    ("dtype", "columns", "swizzle"), [(torch.bfloat16, 64, 128), (torch.bfloat16, 32, 64), (torch.float32, 128, 128)]
)
def test_boxes_with_a_shared_layout_are_those_with_one_of_their_own(
    dtype: torch.dtype, columns: int, swizzle: int
) -> None:
    x = torch.zeros((96, 256), dtype=dtype)
    layout = NVMMASharedLayout(swizzle, x.element_size() * 8, 2)
    expected = TensorDescriptor(x, [96, 256], [256, 1], [32, columns], layout)
    for _ in range(2):
        found = launch_hopper._boxes(x, 32, columns)
        assert found.base is x
        for name in ("shape", "strides", "block_shape", "layout", "padding"):
            assert getattr(found, name) == getattr(expected, name)
        assert repr(found.layout) == repr(expected.layout)


def test_layouts_differ_by_what_they_are_made_of() -> None:
    made = [shared_layout(*key) for key in ((128, 16), (128, 8), (64, 16))]
    assert len({repr(each) for each in made}) == 3
    assert shared_layout(128, 16) is made[0]
