"""int6_linear: out = x W_hat^T + b with W_hat at six bits a weight, forward and backward.

    out [..., N] = x [..., K] W_hat^T + bias,    W_hat = scale * code             dx = dout W_hat,  dbias = sum dout

x bf16, fp16 or fp32; packed int32 tiles (layout.py), scale fp16 (fp32 where that is too narrow) [N] or [N, K/group];
bias [N] in x's dtype. Sums in fp32. The weight is frozen: no gradient for it, no second copy of it for the backward.
2*M*N*K FLOPs and 0.75*N*K bytes of weights for M rows of x. A NaN or an infinity stays in its row of x.

With one scale a row the forward multiplies bare codes, which bf16 holds exactly, and applies the scale to the fp32 sum;
group scales and the backward round scale * code to x's dtype once, as a dequantised weight is. `pick_config` chooses
between four kernels by the number of rows M:

    warp     unpack, mma.sync and fp32 sums in each warp's registers, the contraction split over warps
    tile     unpack to the registers that wgmma reads, x through shared memory, the contraction split over programs
    wide     some warps unpack to shared memory while others multiply; Hopper, one scale a row
    dense    dequantise to a temporary weight, then cuBLAS

A row of x gives the same bits whatever rows surround it as long as `pick_config` gives the same config: forward for M
in 1-8, 9-16, 17-32, 33-64, 65-128 and 129-256 each, and for all others up to 8,191 that get the wide kernel with one
split.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from ..dispatch import DTYPES, cdiv, custom_op, expect, is_hopper, multiprocessors, next_power_of_2, resolve_backend
from ..linear.op import cublas_
from .backward import dequantize_tiles, warp_backward
from .forward import add_parts, permute_inputs, tile_forward, warp_forward
from .layout import COLUMNS, Int6Matrix, tile_grid
from .wide import wide

Backend = Literal["reference", "triton"]
TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Int6Config:
    """How one product is computed. `kernel` is "warp", "tile", "wide" or "dense"; the other fields are their own."""

    kernel: str
    num_warps: int = 4
    split: int = 1
    """Programs that share a contraction; their parts are added in order by a second launch."""
    eights: int = 1
    """warp, backward: groups of eight rows of dout"""
    block_m: int = 16
    """tile, wide: rows of x in a program, which has 64 rows of the weight (tile: 128 were slower for any number of x's)
    or a block of 128 outputs (wide)"""
    stages: int = 3
    """tile, wide: steps in flight"""


H100 = 132
"""Multiprocessors of the GPU on which the numbers below were measured."""


@functools.lru_cache(1024)
def pick_config(
    M: int, N: int, K: int, dtype: torch.dtype, assembly: bool = True, can_be_wide: bool = True, processors: int = H100
) -> Int6Config:
    """The forward's kernel for M rows; without `assembly` (the interpreter) there are no warp and no wide kernels.

    `can_be_wide` is false where the wide kernel cannot serve for another reason: the GPU, or scales of groups.
    Microseconds on one NVIDIA H100 (bf16, L2 cold, graph replay) are of 8192x8192, 4096x14336 and 14336x4096 (N x K).
    """
    tile_rows, tile_columns, _ = tile_grid(N, K)
    blocks, programs = -(-tile_rows // 4), 1 << processors.bit_length()  # about two a multiprocessor
    if assembly and dtype == torch.float32:
        return Int6Config("dense")  # tensor cores have no fp32 product: what cuBLAS does with it is as good as it gets
    if assembly and M <= 8 and K % 8 == 0:
        # M=1 at 4 / 8 / 16 warps: 21.0 / 19.3 / 20.5, 30.4 / 19.4 / 18.1, 17.4 / 18.1 / 19.0
        wanted = 16 if tile_rows <= 2 * processors else 8 if tile_rows <= 4 * processors else 4
        most = 1 << max(2, (tile_columns // 4).bit_length() - 1)  # four tiles a warp; matrices of 512 are best at 4
        return Int6Config("warp", num_warps=min(wanted, most))
    if M <= 16:
        # M=16 at split 1 / 2 / 4: 28.9 / 25.8 / 26.7, 39.8 / 27.5 / 23.2, 22.2 / 24.6 / 26.2
        return Int6Config("tile", block_m=16, split=max(1, min(4, programs // blocks, tile_columns)), stages=4)
    if M <= 32:
        # only on an NVIDIA H200: at 8192x8192 split 4 23.6, split 2 26.7
        return Int6Config("tile", block_m=32, split=min(4 if tile_rows <= 512 else 2, tile_columns))
    if M <= 64:
        # M=64 at split 1 / 2 / 4: 36.7 / 30.4 / 34.2, 60.2 / 33.9 / 28.5, 26.3 / 32.5 / 40.5
        return Int6Config("tile", block_m=64, split=max(1, min(4, programs // blocks, tile_columns)), stages=4)
    wide = _wide(M, N, K, tile_columns, processors) if assembly and can_be_wide else None
    if wide and 128 < M < 8192:
        # at 8192x8192: M=256 53.9 (tile 76.8, dense 121.8), M=1024 180 (dense 239), M=4096 735 - 795 (dense 848)
        return wide
    if M <= 384:
        return Int6Config("tile", block_m=128, split=max(1, min(4, programs // 2 // blocks, tile_columns)))
    return Int6Config("dense")  # 66 of dequantising at 8192x8192


@functools.lru_cache(1024)
def pick_config_dx(
    M: int, N: int, K: int, dtype: torch.dtype, assembly: bool = True, can_be_wide: bool = True, processors: int = H100
) -> Int6Config:
    """The backward's kernel for M rows; arguments and microseconds as of `pick_config`."""
    tile_rows, tile_columns, _ = tile_grid(N, K)
    if not assembly or dtype == torch.float32:
        return Int6Config("dense")
    if M <= 16 and N % 2 == 0:
        # M=16 at split 2 / 4 / 8: 31.6 / 24.7 / 28.5, 23.5 / 26.6 / 33.4, 48.9 / 28.3 / 22.9
        programs = 1 << processors.bit_length()  # two of 8 warps fit a multiprocessor
        split = max(1, min(8, programs // tile_columns, tile_rows // 8))
        return Int6Config("warp", num_warps=8, eights=1 if M <= 8 else 2, split=split)
    wide = _wide(M, K, N, -(-tile_rows // 8), processors) if can_be_wide else None
    if wide and M < 2048:
        # at 8192x8192, in an earlier form: M=256 61 (dequantising 66 and cuBLAS 52), M=1024 206 - 216 (66 and 180)
        return wide
    return Int6Config("dense")  # M=4096 808, wide 785 - 919


def _wide(M: int, features: int, contraction: int, loads: int, processors: int) -> Int6Config | None:
    """The wide kernel for a result [M, features], split into at most a block a processor; None where it is no use.

    TMA copies rows of a multiple of 16 bytes. Smaller weights were not measured: dequantising those costs little.
    """
    if features % 8 or contraction % 8 or features * contraction < 1 << 24:
        return None
    blocks = -(-features // 128) * -(-M // 256)
    split = max(n for n in (1, 2, 4) if n == 1 or (loads % n == 0 and blocks * n <= processors))
    return Int6Config("wide", block_m=256, split=split, stages=4)


def int6_linear_ref(x: Tensor, weight: Int6Matrix, bias: Tensor | None = None) -> Tensor:
    """`x` [..., K] by `weight` [N, K] -> [..., N]: dequantise to x's dtype, then a linear with `bias` [N] or None.

    Autograd gives the gradients of x and bias.

    Example: out = int6_linear_ref(x, matrix)
    """
    return F.linear(x, weight.dequantize(x.dtype), bias)


def _groups(scale: Tensor, columns: int) -> tuple[int, int]:
    """Scales of a row and the inputs of each; 0 inputs stands for one scale a row."""
    return (1, 0) if scale.dim() == 1 else (scale.size(1), columns // scale.size(1))


def _takes_assembly(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype != torch.float32


def _scales_fit(x: Tensor, scale: Tensor) -> bool:
    """Whether a kernel may round a scale to x's dtype before it multiplies: fp16 has no place for the smallest ones."""
    return x.dtype != torch.float16 or scale.dtype == torch.float16


def _aligned(x: Tensor) -> Tensor:
    """x contiguous; a copy where it does not start at 16 bytes, of which the kernels' loads are."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _config(pick, x: Tensor, rows: int, columns: int, packed: Tensor, scale: Tensor) -> Int6Config:
    """What :func:`pick_config` or :func:`pick_config_dx` picks for x and these parts of a weight [rows, columns]."""
    if not _scales_fit(x, scale):
        return Int6Config("dense")
    aligned = packed.data_ptr() % 16 == 0 and scale.data_ptr() % 16 == 0  # of which TMA's copies are
    can_be_wide = aligned and scale.dim() == 1 and scale.dtype == torch.float16 and x.is_cuda and is_hopper(x.device)
    processors = multiprocessors(x.device) if x.is_cuda else H100
    return pick(x.size(0), rows, columns, x.dtype, x.is_cuda, can_be_wide, processors)


def _add(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    M, N = out.shape
    add_parts[(cdiv(M * N, 1024),)](
        parts_ptr=parts, bias_ptr=bias, out_ptr=out, M=M, N=N, SPLIT=parts.size(0), BLOCK=1024, num_warps=4
    )


def _forward(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, rows: int, config: Int6Config) -> Tensor:
    (M, K), bias = x.shape, None if bias is None else bias.contiguous()
    tile_rows, tile_columns, has_half = tile_grid(rows, K)
    if M == 0:
        return x.new_empty(M, rows)
    if config.kernel == "dense":
        return cublas_(x.new_empty(M, rows), x, dequantize(packed, scale, (rows, K), x.dtype).mT, bias)
    if config.kernel == "wide":
        blocks = config.split, config.block_m, config.stages
        out, parts = wide(_aligned(x), packed, scale, bias, (rows, K), False, *blocks)
        if parts is not None:
            _add(parts, bias, out)
        return out
    out, x = x.new_empty(M, rows), x.contiguous()
    groups, size = _groups(scale, K)
    weight = dict(packed_ptr=packed, scale_ptr=scale, N=rows, tile_columns=tile_columns, groups=groups)
    weight |= dict(GROUP=size, HALF=has_half)
    if config.kernel == "warp":
        warp_forward[(tile_rows,)](
            x_ptr=_aligned(x).view(torch.int32), bias_ptr=bias, out_ptr=out, M=M, K=K, **weight,
            dtype=TRITON_DTYPES[x.dtype], LOG_WARPS=config.num_warps.bit_length() - 1, num_warps=config.num_warps,
        )  # fmt: skip
        return out
    slots = x.new_empty(M, tile_columns * COLUMNS)
    block = min(1024, next_power_of_2(slots.size(1)))
    permute_inputs[(M, cdiv(slots.size(1), block))](
        x_ptr=x, out_ptr=slots, K=K, tile_columns=tile_columns, BLOCK=block, num_warps=4
    )
    parts = out if config.split == 1 else x.new_empty(config.split, M, rows, dtype=torch.float32)
    tile_forward[(cdiv(M, config.block_m) * cdiv(tile_rows, 4), config.split)](
        x_ptr=slots, bias_ptr=bias if config.split == 1 else None, out_ptr=parts, M=M, tile_rows=tile_rows, **weight,
        BLOCK_M=config.block_m, R=4, SPLIT=config.split, STAGES=config.stages, ASM=_takes_assembly(x),
        num_warps=config.num_warps,
    )  # fmt: skip
    if config.split > 1:
        _add(parts, bias, out)
    return out


def _backward(dout: Tensor, packed: Tensor, scale: Tensor, columns: int, config: Int6Config) -> Tensor:
    M, rows = dout.shape
    tile_rows, tile_columns, has_half = tile_grid(rows, columns)
    if M == 0:
        return dout.new_empty(M, columns)
    if config.kernel == "dense":
        weight = dequantize(packed, scale, (rows, columns), dout.dtype)
        return cublas_(dout.new_empty(M, columns), dout, weight)
    if config.kernel == "wide":
        blocks = config.split, config.block_m, config.stages
        dx, parts = wide(_aligned(dout), packed, scale, None, (rows, columns), True, *blocks)
        if parts is not None:
            _add(parts, None, dx)
        return dx
    dx, parts = dout.new_empty(M, columns), dout.new_empty(config.split, M, columns, dtype=torch.float32)
    groups, size = _groups(scale, columns)
    warp_backward[(tile_columns, config.split)](
        dout_ptr=_aligned(dout).view(torch.int32), packed_ptr=packed, scale_ptr=scale, parts_ptr=parts, M=M, N=rows,
        K=columns, tile_rows=tile_rows, tile_columns=tile_columns, groups=groups, dtype=TRITON_DTYPES[dout.dtype],
        GROUP=size, HALF=has_half, EIGHTS=config.eights, LOG_WARPS=config.num_warps.bit_length() - 1,
        SPLIT=config.split, num_warps=config.num_warps,
    )  # fmt: skip
    _add(parts, None, dx)
    return dx


def dequantize(packed: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """w_hat [N, K] in `dtype` by the kernel; the same bits as `Int6Matrix.dequantize`."""
    out = packed.new_empty(shape, dtype=dtype)
    tile_rows, tile_columns, has_half = tile_grid(*shape)
    groups, size = _groups(scale, shape[1])
    dequantize_tiles[(tile_columns, cdiv(tile_rows, 2))](
        packed_ptr=packed, scale_ptr=scale, out_ptr=out, N=shape[0], K=shape[1], tile_rows=tile_rows,
        tile_columns=tile_columns, groups=groups, GROUP=size, HALF=has_half, R=2,
        ASM=_takes_assembly(out) and _scales_fit(out, scale), num_warps=4,
    )  # fmt: skip
    return out


@custom_op("klora::int6_product", mutates_args=())
def int6_product(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """x [M, K] -> [M, rows]."""
    return _forward(x, packed, scale, bias, rows, _config(pick_config, x, rows, x.size(1), packed, scale))


@int6_product.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    return x.new_empty(x.size(0), rows)


@custom_op("klora::int6_product_dx", mutates_args=())
def int6_product_dx(dout: Tensor, packed: Tensor, scale: Tensor, columns: int) -> Tensor:
    """dout [M, N] -> dx [M, columns]."""
    config = _config(pick_config_dx, dout, dout.size(1), columns, packed, scale)
    return _backward(dout, packed, scale, columns, config)


@int6_product_dx.register_fake
def _(dout: Tensor, packed: Tensor, scale: Tensor, columns: int) -> Tensor:
    return dout.new_empty(dout.size(0), columns)


def _setup_context(ctx, inputs, output) -> None:
    x, packed, scale, _, _ = inputs
    ctx.save_for_backward(packed, scale)
    ctx.columns = x.size(1)


def _gradients(ctx, dout: Tensor):
    packed, scale = ctx.saved_tensors
    dx = int6_product_dx(dout, packed, scale, ctx.columns) if ctx.needs_input_grad[0] else None
    dbias = dout.sum(0) if ctx.needs_input_grad[3] else None
    return dx, None, None, dbias, None


int6_product.register_autograd(_gradients, setup_context=_setup_context)


def _resolve(backend: Backend | None, x: Tensor, weight: Int6Matrix) -> Backend:
    """The backend that runs; ValueError unless x and both parts of the weight are on one device."""
    expect("weight.packed", weight.packed, weight.packed.shape, device=x.device)
    expect("weight.scale", weight.scale, weight.scale.shape, device=x.device)
    return resolve_backend(backend, x)


def int6_linear(x: Tensor, weight: Int6Matrix, bias: Tensor | None = None, *, backend: Backend | None = None) -> Tensor:
    """`x` [..., K] by `weight` [N, K] -> x W_hat^T + bias [..., N], in x's dtype: bfloat16, float16 or float32.

    `bias` is [N] in x's dtype, or None. x and bias get gradients; the weight has none.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU.
    ValueError: another K, dtype, device or backend, a bias that is not [N] in x's dtype.

    Example: out = int6_linear(x, matrix)
    """
    rows, columns = weight.shape
    expect("x", x, ("...", columns), DTYPES)
    if bias is not None:
        expect("bias", bias, (rows,), (x.dtype,), x.device)
    if _resolve(backend, x, weight) == "reference":
        return int6_linear_ref(x, weight, bias)
    out = int6_product(x.reshape(-1, columns), weight.packed, weight.scale, bias, rows)
    return out.view(*x.shape[:-1], rows)


def int6_linear_dx(dout: Tensor, weight: Int6Matrix, *, backend: Backend | None = None) -> Tensor:
    """`dout` [..., N] by `weight` [N, K] -> dx [..., K] in dout's dtype: the backward of :func:`int6_linear`.

    dout is bfloat16, float16 or float32. The kernel has no gradient of its own.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU.
    ValueError: another N, dtype, device or backend.

    Example: dx = int6_linear_dx(dout, matrix)
    """
    rows, columns = weight.shape
    expect("dout", dout, ("...", rows), DTYPES)
    if _resolve(backend, dout, weight) == "reference":
        return dout @ weight.dequantize(dout.dtype)
    dx = int6_product_dx(dout.reshape(-1, rows), weight.packed, weight.scale, columns)
    return dx.view(*dout.shape[:-1], columns)
