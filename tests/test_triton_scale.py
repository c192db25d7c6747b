"""The Triton backend's in-place product by a scalar, interpreted, against torch's."""

import pytest
import torch

pytest.importorskip("triton")
triton_worker = pytest.importorskip("triton_worker")


@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0])
@pytest.mark.parametrize("count", [1, 8192, 20001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_values(dtype, count, factor):
    x = torch.randn(count).to(dtype)
    (got,) = triton_worker.run("scale_", x, torch.tensor(factor))
    assert torch.equal(got, x * factor)
