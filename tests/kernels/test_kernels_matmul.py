"""Products wider than what they multiply, and how a weight's gradient is cut."""

from __future__ import annotations

import pytest
import torch

from kernels.cases import distance
from ssmtrain.kernels import matmul
from ssmtrain.kernels.matmul import outer, whole_rounds


@pytest.mark.parametrize(
    "M,N,rows",
    [
        (8512, 2048, 8448),  # 4.06 rounds of 132
        (10576, 2560, 10112),  # 6.29
        (8192, 2048, 8192),  # 3.88
        (3352, 768, 3352),  # 0.6
        (50288, 2048, 50288),  # 23.8
        (2048, 4096, 2048),  # 1.94
    ],
)
def test_whole_rounds(M: int, N: int, rows: int) -> None:
    """Where the last of few rounds would be nearly empty, and nowhere else."""
    assert whole_rounds(M, N, 132) == rows and whole_rounds(M, N, None) == M
    tiles = -(-rows // 128) * -(-N // 256)
    assert rows == M or M - rows < 512 or tiles % 132 < -(-N // 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [None, 2])
def test_outer(parts: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one product or two: against float64, of parts of something wider."""
    monkeypatch.setattr(matmul, "_multiprocessors", lambda a: parts)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(50, n + 3, generator=generator).to(dtype)[:, :n] for n in (300, 20))
    found = outer(a, b, torch.float32)
    assert found.dtype == torch.float32 and found.shape == (300, 20) and found.is_contiguous()
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    assert distance(found, a.double().t() @ b.double()) < tolerance


def test_the_second_product_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made, mm = [], matmul.mm
    monkeypatch.setattr(matmul, "_multiprocessors", lambda a: 2)
    monkeypatch.setattr(matmul, "mm", lambda a, *rest, **named: made.append(len(a)) or mm(a, *rest, **named))
    outer(torch.randn(9, 300).bfloat16(), torch.randn(9, 20).bfloat16(), torch.float32)
    assert made == [256, 44]


@pytest.mark.gpu
@pytest.mark.parametrize("M,N", [(8512, 2048), (3352, 768)])
def test_outer_on_a_gpu(M: int, N: int) -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(4096, n, device="cuda").bfloat16() for n in (M, N))
    # Matrix units cut sums off: 4e-6 of 4,096 terms, where a result rounded to 16 bits has 2e-3.
    assert distance(outer(a, b, torch.float32), a.double().t() @ b.double()) < 2e-5
