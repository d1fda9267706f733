"""Adam on a pool of adapters, one step counter and one learning rate a slot, all chosen slots in one launch.

    m <- b1 m + (1-b1) g;   v <- b2 v + (1-b2) g^2;   t <- t + 1
    p <- p - lr * decay * p
    p <- p - lr * group_lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

params, grads, exp_avg, exp_avg_sq [slots, P] fp32, all but grads updated in place; step int64 [slots]; lr fp32
[slots]; group_lr fp32 [P] multiplies the learning rate of each parameter; decay fp32 [P] is each one's weight decay
(AdamW: decoupled, towards zero), if there is any. With b1 = 0 the step is g's, and m is neither read nor written.

`slots` int [n], without repeats, chooses the rows that take part; the others keep their bits. An entry of -1, or of any
other row that does not exist, chooses none: a captured graph can hold a batch with empty places. Kingma and Ba 2015;
Loshchilov and Hutter 2019.

28 bytes (8 less with b1 = 0) and about 15 operations a parameter: it runs at the speed of memory
(group_lr and decay, shared by all slots, stay in cache). Everything is fp32; the two bias corrections are computed in
fp64, once a program, because 1 - b^t of a small t loses digits. Many programs work on one slot, all need its old
counter, and exactly one may advance it: each program adds 2^32 to the counter when it is done, and the one that comes
last stores t + 1.
These integer additions commute, so the result is the same bits in every run. A counter must stay below 2^32, and no two
launches may work on the same slot at once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import INTEGERS, cdiv, custom_op, expect, resolve_backend
from .launch import launched
from .slots import is_in_pool


@torch.no_grad()
def lora_adam_ref_(
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    group_lr: Tensor,
    slots: Tensor | slice = slice(None),
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-10,
    decay: Tensor | None = None,
) -> None:
    """One Adam step of the chosen `slots` (an int tensor, or a slice), with `betas` and `eps`, in place. No autograd.

    `params`, `grads`, `exp_avg`, `exp_avg_sq` [slots, P] and `lr` [slots], `group_lr` and `decay` [P] of one float
    dtype; `step` int64 [slots]. With a first beta of 0 exp_avg is left alone.

    Example: lora_adam_ref_(params, grads, exp_avg, exp_avg_sq, step, lr, group_lr, slots)
    """
    beta1, beta2 = betas
    if isinstance(slots, Tensor):
        slots = slots[is_in_pool(slots, len(params))]
    step[slots] += 1
    grad = mean = grads[slots]
    if beta1:
        mean = exp_avg[slots] * beta1 + grad * (1 - beta1)
        exp_avg[slots] = mean
    square = exp_avg_sq[slots] * beta2 + grad * grad * (1 - beta2)
    exp_avg_sq[slots] = square
    if decay is not None:
        params[slots] -= lr[slots][:, None] * decay * params[slots]
    count = step[slots].to(params.dtype)[:, None]
    denominator = (square / (1 - beta2**count)).sqrt_().add_(eps)
    params[slots] -= lr[slots][:, None] * group_lr * (mean / (1 - beta1**count)) / denominator


@dataclass(frozen=True)
class LoraAdamConfig:
    block: int
    num_warps: int


def pick_config() -> LoraAdamConfig:
    """The launch for every pool.

    0.116 ms for 64 slots of 234,496 parameters on an NVIDIA H200, 1.17 times its bytes at copy bandwidth. When it was
    tuned it took 0.111; 1024 and 4 warps 0.114, 2048 and 8 warps 0.114, 4096 and 8 warps 0.115.
    """
    return LoraAdamConfig(block=2048, num_warps=4)


@launched
@triton.jit
def _adam(
    params_ptr,
    grads_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    step_ptr,
    lr_ptr,
    group_lr_ptr,
    slots_ptr,
    decay_ptr,
    count,
    size,
    eps,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(size, BLOCK)
    row = tl.program_id(0) // blocks
    slot = row.to(tl.int64) if slots_ptr is None else tl.load(slots_ptr + row).to(tl.int64)
    if (slot >= 0) & (slot < count):
        # The upper half of a counter holds the programs that are done; the lower half is the old t until the last is.
        t = (tl.load(step_ptr + slot) & 0xFFFFFFFF) + 1
        offsets = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < size
        rate = tl.load(lr_ptr + slot)
        if decay_ptr is not None:
            shrink = rate * tl.load(decay_ptr + offsets, mask=mask, other=0.0)
        if group_lr_ptr is not None:
            rate = rate * tl.load(group_lr_ptr + offsets, mask=mask, other=0.0)
        offsets += slot * size
        grad = tl.load(grads_ptr + offsets, mask=mask, other=0.0)
        if BETA1 != 0.0:
            mean = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0)
        square = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0)
        param = tl.load(params_ptr + offsets, mask=mask, other=0.0)
        if BETA1 != 0.0:
            mean = mean * BETA1 + grad * (1 - BETA1)
        square = square * BETA2 + grad * grad * (1 - BETA2)
        if BETA1 != 0.0:
            tl.store(exp_avg_ptr + offsets, mean, mask=mask)
        tl.store(exp_avg_sq_ptr + offsets, square, mask=mask)
        denominator = tl.sqrt_rn(square * _correction(BETA2, t)) + eps
        if decay_ptr is not None:
            param -= shrink * param
        if BETA1 != 0.0:
            grad = mean * _correction(BETA1, t)
        param -= rate * tl.div_rn(grad, denominator)
        tl.store(params_ptr + offsets, param, mask=mask)
        # No warp of this program may still be about to read the counter when the program says that it is done.
        tl.debug_barrier()
        done = tl.atomic_add(step_ptr + slot, 4294967296) >> 32
        if done == blocks - 1:
            tl.store(step_ptr + slot, t)


@triton.jit
def _correction(BETA: tl.constexpr, t):
    """1 / (1 - BETA^t) in fp32."""
    power = tl.exp(t.to(tl.float64) * tl.log(tl.full((), BETA, tl.float64)))
    return (1.0 / (1.0 - power)).to(tl.float32)


@custom_op("klora::lora_adam_", mutates_args=("params", "exp_avg", "exp_avg_sq", "step"))
def _lora_adam(
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    group_lr: Tensor | None,
    slots: Tensor | None,
    decay: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    count, size = params.shape
    rows = count if slots is None else len(slots)
    if not rows or not size:
        return
    config = pick_config()
    _adam[(cdiv(size, config.block) * rows,)](
        params_ptr=params, grads_ptr=grads, exp_avg_ptr=exp_avg, exp_avg_sq_ptr=exp_avg_sq, step_ptr=step, lr_ptr=lr,
        group_lr_ptr=group_lr, slots_ptr=slots, decay_ptr=decay, count=count, size=size, eps=eps,
        BETA1=beta1, BETA2=beta2, BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip


@torch.no_grad()
def lora_adam_(
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    slots: Tensor | None = None,
    group_lr: Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-10,
    *,
    decay: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One Adam step of the slots that `slots` int32 or int64 [n] names (None: all), in place. No autograd.

    `params`, `grads`, `exp_avg` and `exp_avg_sq` are float32 [slots, P], `step` int64 [slots], `lr` float32 [slots].
    All but grads and lr are updated; exp_avg is not where the first of `betas` is 0. `group_lr` float32 [P] multiplies
    the learning rate of each parameter, and `decay` float32 [P] is its decoupled weight decay: lr decay p is taken from
    p first. `betas` lie in [0, 1), `eps` is at least 0. Parameters may require gradients.

    An entry of `slots` outside the pool is skipped. A slot named twice spoils its counter for good, and with it all its
    later steps. check_slots(slots, count, distinct=True) finds both.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel wants
    contiguous tensors.
    ValueError: other shapes, dtypes, strides, betas, eps or backends, tensors on several devices.

    Example: lora_adam_(params, grads, exp_avg, exp_avg_sq, step, lr, slots)
    """
    reference = resolve_backend(backend, params) == "reference"
    expect("params", params, ("slots", "P"))
    floats, pool = (params.dtype,) if reference else (torch.float32,), params.shape
    for name, tensor, shape, dtypes in (
        ("params", params, pool, floats),
        ("grads", grads, pool, floats),
        ("exp_avg", exp_avg, pool, floats),
        ("exp_avg_sq", exp_avg_sq, pool, floats),
        ("step", step, pool[:1], (torch.int64,)),
        ("lr", lr, pool[:1], floats),
        ("group_lr", group_lr, pool[1:], floats),
        ("decay", decay, pool[1:], floats),
        ("slots", slots, ("n",), INTEGERS),
    ):
        if tensor is None:
            continue
        expect(name, tensor, shape, dtypes, params.device)
        if not reference and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; the kernel wants contiguous tensors")
    if not all(0 <= beta < 1 for beta in betas) or eps < 0:
        raise ValueError(f"betas are {betas} and eps {eps}; allowed: betas from 0 to below 1, eps at least 0")
    if reference:
        group_lr = params.new_ones(params.size(1)) if group_lr is None else group_lr
        chosen = slice(None) if slots is None else slots
        lora_adam_ref_(params, grads, exp_avg, exp_avg_sq, step, lr, group_lr, chosen, betas, eps, decay)
    else:
        _lora_adam(params, grads, exp_avg, exp_avg_sq, step, lr, group_lr, slots, decay, *betas, eps)
