"""The one rule of tolerance, for the tests and for the benchmarks' gate.

    error     |out - exact| / |exact|                    Frobenius norms in float64, one for each output
    allowed   1.1 x plain + floor                        plain: the error of plain PyTorch, same dtype, same input
    floor     eps(fp32) + FEW max(plain, eps(out) / 2) / sqrt(n)

`exact` is the float64 result for the same input; n is the number of elements that are compared. The floor is what no
implementation controls:

- Order. All accumulate in fp32, and the order of a sum is the processor's: its vector width, its BLAS, its fused
  multiply-adds. That moves an error of less than one to a few eps(fp32) by up to one (0.75 was seen: products of one
  row under ATEN_CPU_CAPABILITY=default), however large the sample is.
- Chance. An error is the root of a mean over n roundings, so it scatters by about one part in sqrt(n).

The floor of typical outputs whose plain error is that of one rounding (0.2 eps):

    n           fp32      of plain    bf16      of plain
    1           3.0e-07   12          1.2e-02   7.5
    1,000       1.2e-07   5           3.7e-04   0.24
    1,000,000   1.2e-07   5           1.2e-05   0.008

An error that is added to PyTorch's is seen from 4 floors on, or from PyTorch's own error on, whichever is larger.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

MARGIN = 1.1
FEW = 3.0


def relative_error(output: Tensor, exact: Tensor) -> float:
    """|output - exact| / |exact| in float64; infinite for a NaN, a wrong shape or an exact value of zero missed."""
    if output.shape != exact.shape:
        return math.inf
    difference = torch.linalg.vector_norm(output.detach().to(exact.device).double() - exact.double()).item()
    scale = torch.linalg.vector_norm(exact.double()).item()
    error = difference / scale if scale else (0.0 if difference == 0 else math.inf)
    return error if math.isfinite(error) else math.inf


def noise_floor(plain: float, dtype: torch.dtype, size: int) -> float:
    """How far two right results of `size` elements in `dtype` may differ in error, where PyTorch's is `plain`."""
    scatter = FEW * max(plain, torch.finfo(dtype).eps / 2) / math.sqrt(max(size, 1))
    return torch.finfo(torch.float32).eps + scatter


def allowed_error(plain: float, dtype: torch.dtype, size: int, margin: float = MARGIN) -> float:
    """The most that the error of `size` elements in `dtype` may be, where PyTorch's is `plain`."""
    return margin * plain + noise_floor(plain, dtype, size)


def assert_as_exact(
    ours: Iterable[Tensor], exact: Iterable[Tensor], *plain: Iterable[Tensor], margin: float = MARGIN
) -> None:
    """AssertionError unless each of `ours` has the shape and dtype of PyTorch's and an error that is allowed.

    With several yardsticks in `plain`, the worst of them counts. `margin` is for outputs that are known to be computed
    with fewer digits than PyTorch's; the test says why.
    """
    for number, (out, true, *yardsticks) in enumerate(zip(ours, exact, *plain, strict=True)):
        for yardstick in yardsticks:
            assert out.shape == yardstick.shape and out.dtype == yardstick.dtype, (
                f"output {number} is {out.dtype} {list(out.shape)}; PyTorch's {yardstick.dtype} {list(yardstick.shape)}"
            )
        worst = max(relative_error(yardstick, true) for yardstick in yardsticks)
        error, most = relative_error(out, true), allowed_error(worst, out.dtype, out.numel(), margin)
        assert error <= most, f"output {number}: error {error:.3e}, allowed {most:.3e}; PyTorch's is {worst:.3e}"
