"""int6_linear: out = x W_hat^T + b with W_hat at six bits a weight, forward and backward.

    out [..., N] = x [..., K] W_hat^T + bias,    W_hat = scale * code             dx = dout W_hat,  dbias = sum dout

x bf16, fp16 or fp32; packed int32 tiles (layout.py), scale fp16 [N] or [N, K/group]; bias [N] in x's dtype. Sums in
fp32. The weight is frozen: no gradient for it, no second copy of it for the backward. 2*M*N*K FLOPs and 0.75*N*K bytes
of weights for M rows of x.

With one scale a row the forward multiplies bare codes, which bf16 holds exactly, and applies the scale to the fp32 sum;
group scales and the backward round scale * code to x's dtype once, as a dequantised weight is. `pick_config` chooses
between three kernels by the number of rows M:

    warp     unpack, mma.sync and fp32 sums in each warp's registers, the contraction split over warps
    tile     unpack to the registers that wgmma reads, x through shared memory, the contraction split over programs
    dense    dequantise to a temporary weight, then cuBLAS

A row of x gives the same bits whatever rows surround it as long as M stays within one line of `pick_config`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .backward import dequantize_tiles, warp_backward
from .forward import add_parts, permute_inputs, tile_forward, warp_forward
from .layout import COLUMNS, Int6Matrix, packed_shape

Backend = Literal["reference", "triton"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Int6Config:
    """How one product is computed. `kernel` is "warp", "tile" or "dense"; the other fields are the first two's own."""

    kernel: str
    num_warps: int = 4
    split: int = 1
    """Programs that share a contraction; their parts are added in order by a second launch."""
    eights: int = 1
    """warp, backward: groups of eight rows of dout"""
    block_m: int = 16
    """tile: rows of x in a program, which has 64 rows of the weight: 128 were slower for any number of x's"""
    stages: int = 3
    """tile: steps in flight"""


def pick_config(M: int, N: int, K: int, dtype: torch.dtype, assembly: bool = True) -> Int6Config:
    """The forward's kernel for M rows; without `assembly` (the interpreter) there are no warp kernels.

    Microseconds on one NVIDIA H200 (bf16, L2 cold, graph replay) are of 8192x8192, 4096x14336 and 14336x4096 (N x K).
    """
    tile_rows, tile_columns = packed_shape(N, K)[:2]
    blocks = -(-tile_rows // 4)
    if assembly and dtype == torch.float32:
        return Int6Config("dense")  # tensor cores have no fp32 product: what cuBLAS does with it is as good as it gets
    if assembly and M <= 8 and K % 8 == 0:
        # about 30 warps for each of 132 SMs: M=1 at 4 / 8 warps 17.8 / 16.0, 29.1 / 18.0, 14.4 / 16.8
        wanted = 16 if tile_rows <= 264 else 8 if tile_rows <= 528 else 4
        most = 1 << max(2, (tile_columns // 4).bit_length() - 1)  # four tiles a warp; matrices of 512 are best at 4
        return Int6Config("warp", num_warps=min(wanted, most))
    if M <= 16:
        # M=16: split 4 21.5, 20.1; split 2 20.5 at 14336x4096, 22.1 at 8192x8192
        return Int6Config("tile", block_m=16, split=min(4 if tile_rows <= 512 else 2, tile_columns), stages=4)
    if M <= 32:
        # M=32 at 8192x8192: split 4 23.6, split 2 26.7
        return Int6Config("tile", block_m=32, split=min(4 if tile_rows <= 512 else 2, tile_columns))
    if M <= 64:
        # M=64: split 2 30.2 (4: 34.8), split 4 28.0 (2: 38.2), split 1 27.4 (2: 32.6)
        return Int6Config("tile", block_m=64, split=max(1, min(4, 256 // blocks, tile_columns)))
    if M <= 384:
        # at 8192x8192: 74 for M=256, where dense takes 95; at M=1024 dense takes 220 and no tile less than 226
        return Int6Config("tile", block_m=128, split=max(1, min(4, 128 // blocks, tile_columns)))
    return Int6Config("dense")


def pick_config_dx(M: int, N: int, K: int, dtype: torch.dtype, assembly: bool = True) -> Int6Config:
    """The backward's kernel for M rows."""
    if assembly and dtype != torch.float32 and M <= 16 and N % 2 == 0:
        tile_rows, tile_columns = packed_shape(N, K)[:2]
        split = max(1, min(8, 256 // tile_columns, tile_rows // 8))  # two programs of 8 warps fit an SM
        return Int6Config("warp", num_warps=8, eights=1 if M <= 8 else 2, split=split)
    return Int6Config("dense")  # 48 us of dequantising at 8192x8192; it pays from M=17 on, where the warps spill


def int6_linear_ref(x: Tensor, weight: Int6Matrix, bias: Tensor | None = None) -> Tensor:
    """The plain statement: dequantise to x's dtype, then a linear."""
    return F.linear(x, weight.dequantize(x.dtype), bias)


def int6_linear(x: Tensor, weight: Int6Matrix, bias: Tensor | None = None, backend: Backend | None = None) -> Tensor:
    """x [..., K] -> [..., N] in x's dtype; differentiable in x and bias.

    `backend` "reference" or "triton" overrides the choice by device: kernels on CUDA, plain PyTorch elsewhere.
    ValueError: another K, dtype or device, a bias that is not [N] in x's dtype.
    """
    rows, columns = weight.shape
    if x.dim() == 0 or x.size(-1) != columns or x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; this weight takes bf16, fp16 or fp32 [..., {columns}]")
    if bias is not None and (bias.dtype != x.dtype or tuple(bias.shape) != (rows,)):
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}; with this weight and x it is {x.dtype} [{rows}]")
    if bias is not None and bias.device != x.device:
        raise ValueError(f"bias is on {bias.device} and x on {x.device}; they take one device")
    if _backend(backend, x, weight) == "reference":
        return int6_linear_ref(x, weight, bias)
    out = int6_product(x.reshape(-1, columns), weight.packed, weight.scale, bias, rows)
    return out.view(*x.shape[:-1], rows)


def int6_linear_dx(dout: Tensor, weight: Int6Matrix, backend: Backend | None = None) -> Tensor:
    """dout [..., N] -> dx [..., K] in dout's dtype: what the backward of `int6_linear` computes."""
    rows, columns = weight.shape
    if dout.dim() == 0 or dout.size(-1) != rows or dout.dtype not in DTYPES:
        raise ValueError(f"dout is {dout.dtype} {list(dout.shape)}; this weight takes bf16, fp16 or fp32 [..., {rows}]")
    if _backend(backend, dout, weight) == "reference":
        return dout @ weight.dequantize(dout.dtype)
    dx = int6_product_dx(dout.reshape(-1, rows), weight.packed, weight.scale, columns)
    return dx.view(*dout.shape[:-1], columns)


def _backend(backend: Backend | None, x: Tensor, weight: Int6Matrix) -> Backend:
    if backend not in (None, "reference", "triton"):
        raise ValueError(f"backend={backend!r}; allowed: reference, triton or None")
    if weight.packed.device != x.device or weight.scale.device != x.device:
        devices = f"activations are on {x.device}, codes on {weight.packed.device}, scales on {weight.scale.device}"
        raise ValueError(f"{devices}; they take one device")
    return backend or ("triton" if x.is_cuda else "reference")


@torch.library.custom_op("klora::int6_product", mutates_args=())
def int6_product(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """x [M, K] -> [M, rows]."""
    config = pick_config(x.size(0), rows, x.size(1), x.dtype, x.is_cuda)
    return _forward(x, packed, scale, bias, rows, config)


@int6_product.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    return x.new_empty(x.size(0), rows)


@torch.library.custom_op("klora::int6_product_dx", mutates_args=())
def int6_product_dx(dout: Tensor, packed: Tensor, scale: Tensor, columns: int) -> Tensor:
    """dout [M, N] -> dx [M, columns]."""
    config = pick_config_dx(dout.size(0), dout.size(1), columns, dout.dtype, dout.is_cuda)
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


def _forward(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, rows: int, config: Int6Config) -> Tensor:
    M, K = x.shape
    tile_rows, tile_columns = packed_shape(rows, K)[:2]
    if config.kernel == "dense":
        return F.linear(x, dequantize(packed, scale, (rows, K), x.dtype), bias)
    out = x.new_empty(M, rows)
    if M == 0:
        return out
    x = x.contiguous()
    groups, size = _groups(scale, K)
    meta = {"GROUP": size, "BIAS": bias is not None}
    bias = scale if bias is None else bias.contiguous()  # never read
    if config.kernel == "warp":
        warp_forward[(tile_rows,)](
            _words(x), packed, scale, bias, out, M, rows, K, tile_columns, groups,
            dtype=TRITON_DTYPES[x.dtype], LOG_WARPS=config.num_warps.bit_length() - 1, num_warps=config.num_warps,
            **meta,
        )  # fmt: skip
        return out
    slots = x.new_empty(M, tile_columns * COLUMNS)
    block = min(1024, triton.next_power_of_2(slots.size(1)))
    permute_inputs[(M, triton.cdiv(slots.size(1), block))](x, slots, K, tile_columns, BLOCK=block, num_warps=4)
    into = out if config.split == 1 else x.new_empty(config.split, M, rows, dtype=torch.float32)
    tile_forward[(triton.cdiv(M, config.block_m) * triton.cdiv(tile_rows, 4), config.split)](
        slots, packed, scale, bias, into, M, rows, tile_rows, tile_columns, groups,
        BLOCK_M=config.block_m, R=4, SPLIT=config.split, STAGES=config.stages, ASM=_assembly(x),
        num_warps=config.num_warps, **meta,
    )  # fmt: skip
    if config.split > 1:
        _add(into, bias, out, meta["BIAS"])
    return out


def _backward(dout: Tensor, packed: Tensor, scale: Tensor, columns: int, config: Int6Config) -> Tensor:
    M, rows = dout.shape
    tile_rows, tile_columns = packed_shape(rows, columns)[:2]
    if config.kernel == "dense":
        return dout @ dequantize(packed, scale, (rows, columns), dout.dtype)
    dx = dout.new_empty(M, columns)
    if M == 0:
        return dx
    groups, size = _groups(scale, columns)
    parts = dout.new_empty(config.split, M, columns, dtype=torch.float32)
    warp_backward[(tile_columns, config.split)](
        _words(dout.contiguous()), packed, scale, parts, M, rows, columns, tile_rows, tile_columns, groups,
        dtype=TRITON_DTYPES[dout.dtype], GROUP=size, EIGHTS=config.eights,
        LOG_WARPS=config.num_warps.bit_length() - 1, SPLIT=config.split, num_warps=config.num_warps,
    )  # fmt: skip
    _add(parts, scale, dx, False)
    return dx


def dequantize(packed: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """w_hat [N, K] in `dtype` by the kernel; the same bits as `Int6Matrix.dequantize`."""
    out = packed.new_empty(shape, dtype=dtype)
    tile_rows, tile_columns = packed_shape(*shape)[:2]
    groups, size = _groups(scale, shape[1])
    dequantize_tiles[(tile_columns, triton.cdiv(tile_rows, 2))](
        packed, scale, out, *shape, tile_rows, tile_columns, groups, GROUP=size, R=2, ASM=_assembly(out), num_warps=4
    )
    return out


def _add(parts: Tensor, bias: Tensor, out: Tensor, has_bias: bool) -> None:
    M, N = out.shape
    add_parts[(triton.cdiv(M * N, 1024),)](
        parts, bias, out, M, N, SPLIT=parts.size(0), BIAS=has_bias, BLOCK=1024, num_warps=4
    )


def _groups(scale: Tensor, columns: int) -> tuple[int, int]:
    """Scales of a row and the inputs of each; 0 inputs stands for one scale a row."""
    return (1, 0) if scale.dim() == 1 else (scale.size(1), columns // scale.size(1))


def _assembly(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype != torch.float32


def _words(x: Tensor) -> Tensor:
    """x [M, K] as int32 [M, K/2]; a copy where it does not start at 16 bytes, of which the kernels' loads are."""
    return (x.clone() if x.data_ptr() % 16 else x).view(torch.int32)
