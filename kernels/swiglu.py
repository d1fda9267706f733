"""SwiGLU, the gate of Llama's MLP: out = silu(gate) * up.

    silu(g) = g s,   s = 1 / (1 + exp(-g))
    dgate = dout * up * s (1 + g (1 - s));   dup = dout * g s

gate, up [..., F] of one dtype: bf16, fp16 or fp32; rows any distance apart, so that both may be halves of one product.
fp32 inside, each output rounded once. Bytes, in items of the dtype: 3 F a row forward; 5 F backward, which reads gate
and up again and writes both gradients in one pass. Kept: gate and up. :func:`swiglu_mlp` has the products beside it.

Shazeer 2020 (GLU variants); Elfwing et al. 2018 (SiLU).
"""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import cdiv, custom_op, dtypes_of, empty_as, empty_grad, expect, next_power_of_2, resolve_backend
from .launch import launched

TILE = 2048
"""Elements of a program, 16 a lane: two loads of 16 bytes from each tensor in 16 bits."""


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """silu(`gate`) * `up` for tensors of one shape and float dtype. Autograd gives both gradients.

    Example: out = swiglu_ref(x, branch)
    """
    return F.silu(gate) * up


@triton.jit
def silu(gate):
    """In fp32."""
    return gate / (1.0 + tl.exp(-gate))


@triton.jit
def swiglu_gradient(dout, gate, up):
    """dgate and dup, in fp32."""
    s = 1.0 / (1.0 + tl.exp(-gate))
    return dout * up * (s + gate * (s * (1.0 - s))), dout * (gate * s)


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [ROWS, 1] and columns [1, BLOCK] of a program, and where they exist."""
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows) & (column < columns)


@launched
@triton.jit
def _forward(gate_ptr, up_ptr, out_ptr, rows, columns, gate_stride, up_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, column, mask = _tile(rows, columns, ROWS, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * columns + column, (silu(gate) * up).to(out_ptr.dtype.element_ty), mask=mask)


@launched
@triton.jit
def _backward(
    dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, rows, columns, dout_stride, gate_stride, up_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, mask = _tile(rows, columns, ROWS, BLOCK)
    dout = tl.load(dout_ptr + row * dout_stride + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    dgate, dup = swiglu_gradient(dout, gate, up)
    places = row * columns + column
    if dgate_ptr is not None:
        tl.store(dgate_ptr + places, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    if dup_ptr is not None:
        tl.store(dup_ptr + places, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def _launch(kernel, gate: Tensor, up: Tensor, dout: Tensor | None = None, **outputs: Tensor | None) -> None:
    """`kernel` over all elements; `outputs` are contiguous."""
    if not gate.numel():
        return
    tensors = {"gate": gate, "up": up} | ({} if dout is None else {"dout": dout})
    rows = {name: t.reshape(-1, t.size(-1)) for name, t in tensors.items()}
    rows = {name: t if t.stride(1) == 1 else t.contiguous() for name, t in rows.items()}
    count, columns = rows["gate"].shape
    block = min(TILE, next_power_of_2(columns))
    height = TILE // block
    kernel[(cdiv(count, height) * cdiv(columns, block),)](
        **{f"{name}_ptr": t for name, t in (rows | outputs).items()}, rows=count, columns=columns,
        **{f"{name}_stride": t.stride(0) for name, t in rows.items()}, ROWS=height, BLOCK=block, num_warps=4,
    )  # fmt: skip


def launch_swiglu(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """out = silu(gate) * up; `out` is contiguous."""
    _launch(_forward, gate, up, out=out)


@custom_op("klora::swiglu", mutates_args=())
def _op(gate: Tensor, up: Tensor) -> Tensor:
    out = empty_as(gate)
    launch_swiglu(gate, up, out)
    return out


@_op.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@custom_op("klora::swiglu_backward_", mutates_args=("dgate", "dup"))
def swiglu_backward_(dout: Tensor, gate: Tensor, up: Tensor, dgate: Tensor | None, dup: Tensor | None) -> None:
    """Writes dgate and dup, which are contiguous, or None where one is not wanted."""
    _launch(_backward, gate, up, dout, dgate=dgate, dup=dup)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dout):
    saved = ctx.saved_tensors
    grads = [empty_grad(t, wanted) for t, wanted in zip(saved, ctx.needs_input_grad, strict=True)]
    swiglu_backward_(dout, *saved, *grads)
    return tuple(grads)


_op.register_autograd(_autograd, setup_context=_setup)


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(`gate`) * `up`, all [..., F] of one dtype. Both get gradients, made in one pass.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32, and copies what lies apart within a row.
    ValueError: other shapes, dtypes or backends, tensors of several dtypes or devices.

    Example: out = swiglu(x @ up.mT, x @ up.mT)
    """
    backend = resolve_backend(backend, gate)
    expect("gate", gate, ("...", "F"), dtypes_of(backend))
    expect("up", up, gate.shape, (gate.dtype,), gate.device)
    return swiglu_ref(gate, up) if backend == "reference" else _op(gate, up)
