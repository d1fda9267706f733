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

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import custom_op, is_hopper, resolve_backend
from .backward import dequantize_tiles, warp_backward
from .forward import add_parts, permute_inputs, tile_forward, warp_forward
from .layout import COLUMNS, Int6Matrix, packed_shape
from .wide import wide

Backend = Literal["reference", "triton"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
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


def pick_config(
    M: int, N: int, K: int, dtype: torch.dtype, assembly: bool = True, can_be_wide: bool = True
) -> Int6Config:
    """The forward's kernel for M rows; without `assembly` (the interpreter) there are no warp and no wide kernels.

    `can_be_wide` is false where the wide kernel cannot serve for another reason: the GPU, or scales of groups.
    Microseconds on one NVIDIA H100 (bf16, L2 cold, graph replay) are of 8192x8192, 4096x14336 and 14336x4096 (N x K).
    """
    tile_rows, tile_columns = packed_shape(N, K)[:2]
    blocks = -(-tile_rows // 4)
    if assembly and dtype == torch.float32:
        return Int6Config("dense")  # tensor cores have no fp32 product: what cuBLAS does with it is as good as it gets
    if assembly and M <= 8 and K % 8 == 0:
        # M=1 at 4 / 8 / 16 warps: 21.0 / 19.3 / 20.5, 30.4 / 19.4 / 18.1, 17.4 / 18.1 / 19.0
        wanted = 16 if tile_rows <= 264 else 8 if tile_rows <= 528 else 4
        most = 1 << max(2, (tile_columns // 4).bit_length() - 1)  # four tiles a warp; matrices of 512 are best at 4
        return Int6Config("warp", num_warps=min(wanted, most))
    if M <= 16:
        # M=16 at split 1 / 2 / 4: 28.9 / 25.8 / 26.7, 39.8 / 27.5 / 23.2, 22.2 / 24.6 / 26.2
        return Int6Config("tile", block_m=16, split=max(1, min(4, 256 // blocks, tile_columns)), stages=4)
    if M <= 32:
        # only on an NVIDIA H200: at 8192x8192 split 4 23.6, split 2 26.7
        return Int6Config("tile", block_m=32, split=min(4 if tile_rows <= 512 else 2, tile_columns))
    if M <= 64:
        # M=64 at split 1 / 2 / 4: 36.7 / 30.4 / 34.2, 60.2 / 33.9 / 28.5, 26.3 / 32.5 / 40.5
        return Int6Config("tile", block_m=64, split=max(1, min(4, 256 // blocks, tile_columns)), stages=4)
    wide = _wide(M, N, K, tile_columns) if assembly and can_be_wide else None
    if wide and 128 < M < 8192:
        # at 8192x8192: M=256 53.9 (tile 76.8, dense 121.8), M=1024 180 (dense 239), M=4096 735 - 795 (dense 848)
        return wide
    if M <= 384:
        return Int6Config("tile", block_m=128, split=max(1, min(4, 128 // blocks, tile_columns)))
    return Int6Config("dense")  # 66 of dequantising at 8192x8192


def pick_config_dx(
    M: int, N: int, K: int, dtype: torch.dtype, assembly: bool = True, can_be_wide: bool = True
) -> Int6Config:
    """The backward's kernel for M rows; arguments and microseconds as of `pick_config`."""
    tile_rows, tile_columns = packed_shape(N, K)[:2]
    if not assembly or dtype == torch.float32:
        return Int6Config("dense")
    if M <= 16 and N % 2 == 0:
        # M=16 at split 2 / 4 / 8: 31.6 / 24.7 / 28.5, 23.5 / 26.6 / 33.4, 48.9 / 28.3 / 22.9
        split = max(1, min(8, 256 // tile_columns, tile_rows // 8))  # two programs of 8 warps fit an SM
        return Int6Config("warp", num_warps=8, eights=1 if M <= 8 else 2, split=split)
    wide = _wide(M, K, N, -(-tile_rows // 8)) if can_be_wide else None
    if wide and M < 2048:
        # at 8192x8192, in an earlier form: M=256 61 (dequantising 66 and cuBLAS 52), M=1024 206 - 216 (66 and 180)
        return wide
    return Int6Config("dense")  # M=4096 808, wide 785 - 919


def _wide(M: int, features: int, contraction: int, loads: int) -> Int6Config | None:
    """The wide kernel for a result [M, features], split into at most 132 blocks; None where it is no use.

    TMA copies rows of a multiple of 16 bytes. Smaller weights were not measured: dequantising those costs little.
    """
    if features % 8 or contraction % 8 or features * contraction < 1 << 24:
        return None
    blocks = -(-features // 128) * -(-M // 256)
    split = max(n for n in (1, 2, 4) if n == 1 or (loads % n == 0 and blocks * n <= 132))
    return Int6Config("wide", block_m=256, split=split, stages=4)


def int6_linear_ref(x: Tensor, weight: Int6Matrix, bias: Tensor | None = None) -> Tensor:
    """`x` [..., K] by `weight` [N, K] -> [..., N]: dequantise to x's dtype, then a linear with `bias` [N] or None.

    Autograd gives the gradients of x and bias.

    Example: out = int6_linear_ref(x, matrix)
    """
    return F.linear(x, weight.dequantize(x.dtype), bias)


def int6_linear(x: Tensor, weight: Int6Matrix, bias: Tensor | None = None, backend: Backend | None = None) -> Tensor:
    """`x` [..., K] by `weight` [N, K] -> x W_hat^T + bias [..., N], in x's dtype: bfloat16, float16 or float32.

    `bias` is [N] in x's dtype, or None. x and bias get gradients; the weight has none.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU.
    ValueError: another K, dtype, device or backend, a bias that is not [N] in x's dtype.

    Example: out = int6_linear(x, matrix)
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
    """`dout` [..., N] by `weight` [N, K] -> dx [..., K] in dout's dtype: the backward of :func:`int6_linear`.

    dout is bfloat16, float16 or float32. The kernel has no gradient of its own.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU.
    ValueError: another N, dtype, device or backend.

    Example: dx = int6_linear_dx(dout, matrix)
    """
    rows, columns = weight.shape
    if dout.dim() == 0 or dout.size(-1) != rows or dout.dtype not in DTYPES:
        raise ValueError(f"dout is {dout.dtype} {list(dout.shape)}; this weight takes bf16, fp16 or fp32 [..., {rows}]")
    if _backend(backend, dout, weight) == "reference":
        return dout @ weight.dequantize(dout.dtype)
    dx = int6_product_dx(dout.reshape(-1, rows), weight.packed, weight.scale, columns)
    return dx.view(*dout.shape[:-1], columns)


def _backend(backend: Backend | None, x: Tensor, weight: Int6Matrix) -> Backend:
    backend = resolve_backend(backend, x)
    if weight.packed.device != x.device or weight.scale.device != x.device:
        devices = f"activations are on {x.device}, codes on {weight.packed.device}, scales on {weight.scale.device}"
        raise ValueError(f"{devices}; they take one device")
    return backend


@custom_op("klora::int6_product", mutates_args=())
def int6_product(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """x [M, K] -> [M, rows]."""
    config = pick_config(x.size(0), rows, x.size(1), x.dtype, x.is_cuda, _can_be_wide(x, packed, scale))
    config = config if _scales_fit(x, scale) else Int6Config("dense")
    return _forward(x, packed, scale, bias, rows, config)


@int6_product.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    return x.new_empty(x.size(0), rows)


@custom_op("klora::int6_product_dx", mutates_args=())
def int6_product_dx(dout: Tensor, packed: Tensor, scale: Tensor, columns: int) -> Tensor:
    """dout [M, N] -> dx [M, columns]."""
    can_be_wide = _can_be_wide(dout, packed, scale)
    config = pick_config_dx(dout.size(0), dout.size(1), columns, dout.dtype, dout.is_cuda, can_be_wide)
    config = config if _scales_fit(dout, scale) else Int6Config("dense")
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
    if M == 0:
        return x.new_empty(M, rows)
    if config.kernel == "dense":
        return F.linear(x, dequantize(packed, scale, (rows, K), x.dtype), bias)
    if config.kernel == "wide":
        bias = None if bias is None else bias.contiguous()
        out, parts = wide(
            _aligned(x), packed, scale, bias, (rows, K), False, config.split, config.block_m, config.stages
        )
        if parts is not None:
            _add(parts, scale if bias is None else bias, out, bias is not None)
        return out
    out = x.new_empty(M, rows)
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
    if M == 0:
        return dout.new_empty(M, columns)
    if config.kernel == "dense":
        return dout @ dequantize(packed, scale, (rows, columns), dout.dtype)
    if config.kernel == "wide":
        shape = rows, columns
        dx, parts = wide(_aligned(dout), packed, scale, None, shape, True, config.split, config.block_m, config.stages)
        if parts is not None:
            _add(parts, scale, dx, False)
        return dx
    dx = dout.new_empty(M, columns)
    groups, size = _groups(scale, columns)
    parts = dout.new_empty(config.split, M, columns, dtype=torch.float32)
    warp_backward[(tile_columns, config.split)](
        _words(dout), packed, scale, parts, M, rows, columns, tile_rows, tile_columns, groups,
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
        packed, scale, out, *shape, tile_rows, tile_columns, groups, GROUP=size, R=2,
        ASM=_assembly(out) and _scales_fit(out, scale), num_warps=4,
    )  # fmt: skip
    return out


def _can_be_wide(x: Tensor, packed: Tensor, scale: Tensor) -> bool:
    aligned = packed.data_ptr() % 16 == 0 and scale.data_ptr() % 16 == 0  # of which TMA's copies are
    return aligned and scale.dim() == 1 and scale.dtype == torch.float16 and x.is_cuda and is_hopper(x.device)


def _scales_fit(x: Tensor, scale: Tensor) -> bool:
    """Whether a kernel may round a scale to x's dtype before it multiplies: fp16 has no place for the smallest ones."""
    return x.dtype != torch.float16 or scale.dtype == torch.float16


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


def _aligned(x: Tensor) -> Tensor:
    """x contiguous; a copy where it does not start at 16 bytes, of which the kernels' loads are."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _words(x: Tensor) -> Tensor:
    """x [M, K] as int32 [M, K/2]."""
    return _aligned(x).view(torch.int32)
