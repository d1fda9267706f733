"""The rule of tolerance: an error of four of its floors is seen, and a sum in another order is not one."""

import pytest
import torch
from klora.bench.tolerance import allowed_error, assert_as_exact, noise_floor, relative_error
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def drawn(size: int, dtype: torch.dtype, spread: float = 0.0) -> tuple[Tensor, Tensor]:
    """Numbers [2, size / 2] in float64 and PyTorch's: rounded, after an error of `spread` units in the last place."""
    generator = torch.Generator().manual_seed(0)
    exact, own = (torch.randn(2, size // 2, dtype=torch.float64, generator=generator) for _ in range(2))
    return exact, (exact * (1 + own * spread * torch.finfo(dtype).eps)).to(dtype)


PLANTED = {
    "all scaled": lambda like: like,
    "a row": lambda like: torch.zeros_like(like).index_fill(0, torch.tensor(0), 1.0),
    "a number": lambda like: torch.zeros_like(like).index_fill(1, torch.tensor(0), 1.0).triu(),
    "noise": lambda like: torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(2)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [0.0, 3.0])
@pytest.mark.parametrize("size", [4, 30, 1000, 100_000])
@pytest.mark.parametrize("planted", PLANTED)
def test_an_error_of_four_floors_is_seen(planted, size, spread, dtype):
    exact, plain = drawn(size, dtype, spread)
    error = relative_error(plain, exact)
    added = PLANTED[planted](plain.double())
    share = max(4 * noise_floor(error, dtype, size), error)
    wrong = plain.double() + added * (share * exact.norm() / added.norm())
    assert relative_error(wrong, exact) > allowed_error(error, dtype, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_floor_of_a_large_sample_is_small_beside_a_rounding_and_that_of_few_numbers_a_few_roundings(dtype):
    exact, plain = drawn(1_000_000, dtype)
    rounding, eps = relative_error(plain, exact), torch.finfo(dtype).eps
    assert 0.1 * eps < rounding < 0.3 * eps
    if dtype != torch.float32:
        assert noise_floor(rounding, dtype, 1_000_000) < 0.02 * rounding
    assert 2.0**-23 <= noise_floor(rounding, dtype, 1_000_000) <= noise_floor(rounding, dtype, 4) < 2 * eps
    assert noise_floor(0.0, dtype, 0) == noise_floor(0.0, dtype, 1)


def added_up(products: Tensor, lanes: int, fused: bool) -> Tensor:
    """The fp32 sum of exact products [..., K] in `lanes` partial sums, each product rounded unless it is `fused`."""
    lost = 0 if fused else products.float().double() - products
    parts = torch.zeros(*products.shape[:-1], lanes)
    for terms in (products + lost).split(lanes, -1):
        parts = (parts.double() + terms).float()
    while parts.size(-1) > 1:
        parts = parts[..., ::2] + parts[..., 1::2]
    return parts[..., 0]


@pytest.mark.parametrize("size", [(1, 5), (7, 48), (33, 80)])
@pytest.mark.parametrize("K", [16, 64, 256])
def test_a_product_summed_in_the_order_of_another_processor_is_right(K, size):
    """One or two partial sums, as blocked products have, or those of a vector: each is held to each other."""
    generator = torch.Generator().manual_seed(K)
    a, b = torch.randn(size[0], 1, K, generator=generator), torch.randn(1, size[1], K, generator=generator)
    products = a.double() * b.double()
    exact = products.sum(-1)
    for orders in ((1, 2), (4, 8, 16)):
        found = [added_up(products, lanes, fused) for lanes in orders for fused in (True, False)]
        for ours in found:
            for plain in found:
                assert_as_exact([ours], [exact], [plain])


def test_the_worst_yardstick_counts_and_what_is_wrong_is_named():
    exact, plain = drawn(1000, torch.float32)
    better, worse = plain, plain * (1 + 2.0**-20)
    assert_as_exact([worse], [exact], [better], [worse])
    with pytest.raises(AssertionError, match="output 1: error 9.*e-07, allowed 1.5.*e-07; PyTorch's is .*e-08"):
        assert_as_exact([better, worse], [exact] * 2, [better] * 2)
    with pytest.raises(AssertionError, match=r"output 0 is torch.float16 \[2, 500\]; PyTorch's torch.float32 \[2, 5"):
        assert_as_exact([plain.half()], [exact], [plain])
    for bad in (plain.index_fill(1, torch.tensor(3), float("nan")), torch.zeros_like(plain)):
        with pytest.raises(AssertionError, match="output 0"):
            assert_as_exact([bad], [exact], [plain])
    assert_as_exact([plain[:0]], [exact[:0]], [plain[:0]])
