"""What every op promises, whichever backend runs: who gets a gradient, what an index means, what users may do.

One table holds a small call of each op. The reference is the other side of each promise: it and the kernel agree.
"""

import inspect
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import klora.kernels
import pytest
import torch
import torch.distributed as dist
from klora.bench.tolerance import assert_as_exact, relative_error
from klora.kernels import (
    apply_rotary,
    bigram_embedding,
    cache_write_,
    cached_attention,
    causal_attention,
    causal_attention_varlen,
    dispatch,
    int6_linear,
    int6_linear_dx,
    linear,
    linear_nll,
    lora_adam_,
    lora_attention,
    lora_cached_attention,
    lora_head_nll,
    lora_head_nll_grads_,
    lora_head_nll_ref,
    lora_linear,
    lora_mlp,
    lora_qkv,
    lora_qkv_rope,
    lora_swiglu_mlp,
    muon_apply_,
    muon_updates,
    newton_schulz,
    norm_rotary,
    qkv_attention,
    quantize_int6,
    relu_squared_mlp,
    residual_mlp,
    residual_mlp_norm,
    residual_norm,
    rms_norm,
    rotary_tables,
    softcap_logits_ref,
    softcap_nll,
    softcap_nll_ref,
    swiglu,
    swiglu_mlp,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BACKENDS = ("reference", "triton")
D, H, G, HEAD, R, V, POOL = 32, 4, 2, 16, 3, 40, 4
SIZES = (H * HEAD, G * HEAD, G * HEAD)


class Op(NamedTuple):
    """A call: `floats` are the tensors that may require a gradient, `refused` those of them that must not."""

    function: Callable
    floats: dict[str, Tensor]
    more: dict[str, Any] = {}
    refused: tuple[str, ...] = ()
    per_document: tuple[str, ...] = ("x",)
    """whose first dimension is the documents"""

    def __call__(self, backend: str, **changed: Any) -> list[Tensor]:
        """Every output that is a tensor."""
        outputs = self.function(**{**self.floats, **self.more, **changed}, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [output for output in outputs if output is not None]


def _with_one_slot(slots: Tensor, **given: Any) -> tuple[Tensor, ...]:
    """A document's adapter and its cache have one slot."""
    return lora_cached_attention(**given, slots=slots, cache_slots=slots)


def _up_to_attention(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, slots: Tensor, backend: str,
    **given: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What is not stored shows in the attention behind it."""
    x_out, x_in, n = residual_mlp_norm(**given, push=True, backend=backend)
    about = {"head_dim": HEAD, "backend": backend}
    return x_out, x_in, lora_attention(n, weight, lora_a, lora_b, cos, sin, gain, slots, SIZES, **about)


def ops(B: int = 2, S: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, Op]:
    """A call of every op that has outputs, for B documents of S tokens."""
    draw = torch.Generator().manual_seed(0)

    def randn(*size: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=draw).to(DEVICE, like) * 0.5

    x, weight = randn(B, S, D), randn(sum(SIZES), D)
    cos, sin = rotary_tables(S, HEAD, 100.0, DEVICE)
    slots = (2 - torch.arange(B, device=DEVICE)) % POOL
    targets = torch.arange(B * S, device=DEVICE).view(B, S) % V
    fp32 = {"like": torch.float32}
    gain = 1 + randn(H, **fp32)
    adapters = {"lora_a": randn(POOL, 3, R, D, **fp32), "lora_b": randn(POOL, sum(SIZES), R, **fp32)}
    head = {"lora_a": randn(POOL, R, D, **fp32), "lora_b": randn(POOL, V, R, **fp32)}
    qkv = {"x": x, "weight": weight, **adapters}
    mlp = {"up_a": randn(POOL, R, D, **fp32), "up_b": randn(POOL, 48, R, **fp32)}
    mlp |= {"down_a": randn(POOL, 2, 48, **fp32), "down_b": randn(POOL, D, 2, **fp32)}
    tables = {"cos": cos, "sin": sin, "gain": gain}
    about = {"slots": slots, "sizes": SIZES}
    heads = {"q": randn(B, S, H, HEAD), "k": randn(B, S, G, HEAD)}
    filled = 3 * torch.arange(1, B + 1, device=DEVICE)
    cache = {name: randn(POOL, 5, G, HEAD) for name in ("cache_k", "cache_v")}
    h = {"h": x, "weight": randn(V, D)}
    loss = {"targets": targets, "softcap": 5.0, "temperature": 0.9}
    stream = {name: randn(B, S, D) for name in ("x", "branch", "pushed", "x0")}
    vectors = {"scale": randn(D, **fp32), "skip": randn(D, **fp32), "mix": randn(2, D, **fp32)}
    return {
        "linear": Op(linear, {"x": x, "weight": weight}),
        "relu_squared_mlp": Op(relu_squared_mlp, {"x": x, "up": randn(48, D), "down": randn(D, 48)}),
        "swiglu": Op(swiglu, {"gate": x, "up": randn(B, S, D)}, per_document=("gate", "up")),
        "swiglu_mlp": Op(swiglu_mlp, {"x": x, "gate": randn(48, D), "up": randn(48, D), "down": randn(D, 48)}),
        "residual_mlp": Op(
            residual_mlp,
            {"mixed": randn(B, S, 48), "x": x, "out": randn(D, 48) / 4, "up": randn(48, D) / 4, "down": randn(D, 48)},
            per_document=("mixed", "x"),
        ),
        "residual_mlp_norm": Op(
            _up_to_attention,
            {"mixed": randn(B, S, 48), **{name: stream[name] for name in ("x", "pushed", "x0")}}
            | {"out": randn(D, 48) / 4, "up": randn(48, D) / 4, "down": randn(D, 48) / 4}
            | {"skip": vectors["skip"], "mix": vectors["mix"], "weight": weight, **adapters, **tables},
            {"slots": slots},
            tuple(tables),
            ("mixed", "x", "pushed", "x0"),
        ),
        "rms_norm": Op(rms_norm, {"x": x}),
        "residual_norm": Op(
            residual_norm,
            {**stream, **vectors, "bias": randn(POOL, D, **fp32)},
            {"slots": slots, "push": True},
            per_document=tuple(stream),
        ),
        "norm_rotary": Op(norm_rotary, {**heads, **tables}, {}, ("cos", "sin"), ("q", "k")),
        "apply_rotary": Op(
            apply_rotary,
            {**heads, "cos": cos, "sin": sin},
            {"positions": torch.arange(S, device=DEVICE).flip(0).expand(B, S)},
            ("cos", "sin"),
            ("q", "k"),
        ),
        "causal_attention": Op(causal_attention, {**heads, "v": randn(B, S, G, HEAD)}, {}, (), ("q", "k", "v")),
        "cached_attention": Op(
            cached_attention,
            {**heads, "v": randn(B, S, G, HEAD), **cache},
            {"slots": slots, "filled": filled, "window": S + 4},
            tuple(cache),
            ("q", "k", "v"),
        ),
        "lora_qkv": Op(lora_qkv, qkv, about),
        "lora_linear": Op(
            lora_linear,
            {"x": x, "weight": weight, "lora_a": adapters["lora_a"][:, 0], "lora_b": adapters["lora_b"]},
            {"slots": slots},
        ),
        "lora_mlp": Op(lora_mlp, {"x": x, "up": randn(48, D), "down": randn(D, 48), **mlp}, {"slots": slots}),
        "lora_swiglu_mlp": Op(
            lora_swiglu_mlp,
            {"x": x, "gate": randn(48, D), "up": randn(48, D), "down": randn(D, 48), **mlp}
            | {"gate_a": randn(POOL, 2, D, **fp32), "gate_b": randn(POOL, 48, 2, **fp32)},
            {"slots": slots},
        ),
        "lora_qkv_rope": Op(lora_qkv_rope, {**qkv, **tables}, {**about, "head_dim": HEAD}, tuple(tables)),
        "lora_attention": Op(lora_attention, {**qkv, **tables}, {**about, "head_dim": HEAD}, tuple(tables)),
        "lora_cached_attention": Op(
            _with_one_slot,
            {**qkv, "cos": cos.expand(B, S, 8), "sin": sin.expand(B, S, 8), "gain": gain, **cache},
            {**about, "filled": filled, "window": S + 4, "head_dim": HEAD},
            (*tables, *cache),
        ),
        "qkv_attention": Op(
            qkv_attention, {"x": x, "weight": weight, **tables}, {"sizes": SIZES, "head_dim": HEAD}, ("cos", "sin")
        ),
        "bigram_embedding": Op(
            bigram_embedding,
            {"embed": randn(V, D, **fp32), "bigram": randn(9, D, **fp32), "gate": randn(D, **fp32)},
            {"tokens": targets + 2, "dtype": dtype},
            per_document=(),
        ),
        "softcap_nll": Op(softcap_nll, h, loss, per_document=("h",)),
        "linear_nll": Op(linear_nll, h, {**loss, "reduction": "none"}, per_document=("h",)),
        "lora_head_nll": Op(lora_head_nll, {**h, **head}, {**loss, "slots": slots}, per_document=("h",)),
    }


OPS = ops()
WITH_SLOTS = [name for name, op in OPS.items() if "slots" in op.more]
POOLS = ("lora_a", "lora_b", "bias", "gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b", "cache_k", "cache_v")
"""Tensors whose first dimension is that of the slots."""
WITH_ROTARY = [name for name, op in OPS.items() if "cos" in op.floats]
WITH_TARGETS = [name for name, op in OPS.items() if "targets" in op.more]
INPUTS = [(name, tensor) for name, op in OPS.items() for tensor in op.floats]
FREE = {
    ("residual_mlp_norm", "triton"): 0,
    ("residual_mlp_norm", "reference"): 1,
    ("rms_norm", "triton"): 0,
    ("residual_norm", "triton"): 2,
    ("residual_norm", "reference"): 1,
    ("lora_cached_attention", "triton"): 1,
}
"""How many of the outputs may be changed in place before a backward, where not all of them: the backward of a norm
reads n (PyTorch's, x_in), that of a chunk its k and v, and autograd refuses it then."""


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for got, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, other, rtol=2e-4, atol=2e-5)


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for got, other in zip(ours, theirs, strict=True):
        assert torch.equal(got, other)


def gradients(op: Op, backend: str, names: list[str] | None = None, **changed: Any) -> list[Tensor]:
    """Outputs, then the gradients of the floats named (all that may have one) for a fixed weight of each output."""
    names = [name for name in op.floats if name not in op.refused] if names is None else names
    leaves = {name: changed.get(name, op.floats[name]).detach().requires_grad_() for name in names}
    outputs = op(backend, **{**changed, **leaves})
    loss = sum((out * torch.linspace(0.5, 1.5, out.numel(), device=DEVICE).view(out.shape)).sum() for out in outputs)
    return [out.detach() for out in outputs] + list(torch.autograd.grad(loss, list(leaves.values())))


@pytest.mark.parametrize(("name", "tensor"), INPUTS)
def test_reference_and_kernel_give_the_same_tensors_a_gradient(name, tensor):
    """Each input alone: either both backends give its gradient, or both refuse it by name."""
    op = OPS[name]
    if tensor in op.refused:
        for backend in BACKENDS:
            with pytest.raises(ValueError, match=f"{tensor} requires a gradient"):
                gradients(op, backend, [tensor])
            with torch.no_grad():
                op(backend, **{tensor: op.floats[tensor].clone().requires_grad_()})
    else:
        close(*(gradients(op, backend, [tensor]) for backend in BACKENDS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ops_that_write_their_results_need_no_no_grad(backend):
    """Parameters may be given as they are: nothing that comes out, and nothing written, hangs on a graph."""
    pools = [torch.rand(3, 10, device=DEVICE).requires_grad_() for _ in range(4)]
    before = pools[0].detach().clone()
    step, lr = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.ones(3, device=DEVICE)
    lora_adam_(*pools, step, lr, backend=backend)
    assert not torch.equal(pools[0], before) and all(pool.is_leaf and pool._version for pool in (pools[0], pools[2]))
    op = OPS["lora_head_nll"]
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in op.floats.items()}
    into = {f"d{name}": leaves[name].detach().clone().requires_grad_() for name in ("lora_a", "lora_b")}
    dnll = torch.ones_like(op.more["targets"], dtype=torch.float32)
    results = lora_head_nll_grads_(**leaves, **op.more, **into, dnll=dnll, backend=backend)
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("B", "S"), [(0, 5), (2, 0)])
def test_no_documents_and_no_tokens_have_empty_outputs_and_zero_gradients(name, B, S):
    op = ops(B, S)[name]
    ours, theirs = (gradients(op, backend) for backend in ("triton", "reference"))
    assert [out.shape for out in ours] == [out.shape for out in theirs]
    assert not any(bool(t.any()) for t in (*ours, *theirs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_SLOTS)
def test_a_pool_of_no_adapters_serves_documents_that_have_none(name, backend):
    op = OPS[name]
    pools = {tensor: op.floats[tensor][:0] for tensor in POOLS if tensor in op.floats}
    none = torch.full_like(op.more["slots"], -1)
    empty = gradients(op, backend, slots=none, **pools)
    outputs = len(op(backend))
    close(empty[:outputs], op(backend, slots=none))


@pytest.mark.parametrize("name", WITH_SLOTS)
def test_a_slot_outside_the_pool_is_none(name):
    """No number is cut to 32 bits: 2^32 + 1 is not slot 1."""
    op = ops(B=4)[name]
    wrong = torch.tensor([2**32 + 1, POOL, -(2**32), 1], device=DEVICE)
    results = [gradients(op, backend, slots=wrong) for backend in BACKENDS]
    close(*results)
    none = torch.tensor([-1, -1, -1, 1], device=DEVICE)
    for backend, found in zip(BACKENDS, results, strict=True):
        same(found, gradients(op, backend, slots=none))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_adam_skips_a_slot_outside_the_pool(backend, dtype):
    pools = [torch.rand(3, 10, device=DEVICE) for _ in range(4)]
    step, lr = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.ones(3, device=DEVICE)
    before = pools[0].clone()
    wrong = [2**32, 2**32 + 2, 3, -7] if dtype == torch.int64 else [3, 2**31 - 1, -7, -1]
    lora_adam_(*pools, step, lr, torch.tensor([*wrong, 1], dtype=dtype, device=DEVICE), backend=backend)
    assert step.tolist() == [0, 1, 0] and torch.equal(pools[0][[0, 2]], before[[0, 2]])
    nothing = [pool[:0] for pool in pools]
    lora_adam_(*nothing, step[:0], lr[:0], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_TARGETS)
def test_a_target_outside_the_vocabulary_is_not_scored(name, backend):
    op = OPS[name]
    wrong = torch.tensor([2**32, 2**32 + 5, -(2**32) + 3, V, -1, -100, 2**62], device=DEVICE)
    targets = op.more["targets"].clone()
    targets.view(-1)[: len(wrong)] = wrong
    nll, dh, *_ = gradients(op, backend, targets=targets)
    assert not nll.view(-1)[:7].any() and not dh.view(-1, D)[:7].any()
    assert nll.view(-1)[7:].all() and dh.view(-1, D)[7:].any(1).all()
    ignored = torch.where((targets < 0) | (targets >= V), -100, targets)
    same(gradients(op, backend, targets=targets), gradients(op, backend, targets=ignored))
    same(gradients(op, backend, targets=ignored.int()), gradients(op, backend, targets=ignored))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_SLOTS)
def test_a_document_without_a_slot_does_not_read_slot_0(name, backend):
    """0 x NaN is NaN: what is not named is replaced, forward and backward."""
    op = OPS[name]
    slots = torch.tensor([-1, 1], device=DEVICE)
    others = torch.tensor([0, 2, 3], device=DEVICE)
    pools = [tensor for tensor in POOLS if tensor in op.floats]
    torn = {tensor: op.floats[tensor].index_fill(0, others, math.nan) for tensor in pools}
    same(gradients(op, backend, slots=slots, **torn), gradients(op, backend, slots=slots))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.per_document])
def test_a_document_that_is_not_finite_spoils_no_other(name, backend):
    op = OPS[name]
    torn = {tensor: op.floats[tensor].clone() for tensor in op.per_document}
    for tensor in torn.values():
        tensor[1] = math.nan
    healthy = gradients(op, backend, list(op.per_document))
    spoilt = gradients(op, backend, list(op.per_document), **torn)
    same([t[:1] for t in spoilt], [t[:1] for t in healthy])


def misaligned(tensor: Tensor) -> Tensor:
    """The same numbers, contiguous, 4 (in 16 bits 2) bytes past an address that is a multiple of 16."""
    memory = tensor.new_empty(tensor.numel() + 16)
    start = 1 + -memory.data_ptr() % 16 // memory.itemsize
    return memory[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, every second one of twice as many."""
    return torch.stack([tensor, tensor], -1)[..., 0]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_where_and_how_a_tensor_lies_changes_no_number(name, backend):
    op = OPS[name]
    expected = gradients(op, backend)
    for layout in (misaligned, strided):
        given = {tensor: layout(value) for tensor, value in op.floats.items()}
        more = {tensor: layout(op.more[tensor]) for tensor in ("slots", "targets") if tensor in op.more}
        found = gradients(op, backend, **given, **more)
        (same if backend == "triton" else close)(found, expected)


class Fakes(TorchDispatchMode):
    """Calls each op that returns something for a compiler too; `met` names them, `others` what is otherwise there."""

    def __init__(self):
        super().__init__()
        self.met, self.others = set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function.namespace == "klora" and function._schema.returns:
            self.met.add(function._schema.name)
            with FakeTensorMode() as mode:
                expected = function(*tree_map_only(Tensor, mode.from_tensor, args), **(kwargs or {}))
            real, fake = (
                [(t.shape, t.dtype, t.stride(), t.device) for t in tree_leaves(outputs)] for outputs in (made, expected)
            )
            if real != fake:
                self.others.append((function._schema.name, real, fake))
        return made


def narrowed(op: Op, **places: int) -> Op:
    """With 17, which is a multiple of nothing, of the rows or columns of these tensors: by their dimension."""
    return op._replace(floats=op.floats | {name: op.floats[name].narrow(dim, 0, 17) for name, dim in places.items()})


def odd(ops: dict[str, Op]) -> list[Op]:
    return [
        narrowed(ops["linear"], weight=0),
        narrowed(ops["linear"], x=2, weight=1),
        narrowed(ops["relu_squared_mlp"], up=0, down=1),
        narrowed(ops["swiglu_mlp"], up=0, gate=0, down=1),
        narrowed(ops["swiglu"], up=2, gate=2),
        narrowed(ops["lora_linear"], weight=0, lora_b=1),
        narrowed(ops["lora_linear"], x=2, weight=1, lora_a=2),
        narrowed(ops["linear_nll"], weight=0),
        narrowed(ops["lora_head_nll"], weight=0, lora_b=1),
    ]


@pytest.mark.slow
def test_a_compiler_expects_what_every_op_returns():
    """Shapes, dtypes, strides and devices, for a layout that a kernel takes and one that it does not, and odd sizes."""
    assert [getattr(klora.kernels, name) for name in klora.kernels.__all__], "all are registered"
    x, matrix = torch.rand(3, 64, device=DEVICE), quantize_int6(torch.rand(48, 64, device=DEVICE))
    packed = [torch.rand(6, 2, 16, device=DEVICE) for _ in range(3)]
    several = OPS["lora_linear"].floats | {"x": torch.rand(POOL, 5, D, device=DEVICE)}
    with Fakes() as fakes:
        for op in OPS.values():
            gradients(op, "triton")
        for op in ops(dtype=torch.float16).values():
            gradients(op, "triton", **{name: strided(tensor) for name, tensor in op.floats.items()})
        for dtype in (torch.float32, torch.float16):
            for op in odd(ops(dtype=dtype)):
                gradients(op, "triton")
        int6_linear(x, matrix, backend="triton")
        int6_linear_dx(x[:, :48], matrix, backend="triton")
        causal_attention_varlen(*packed, torch.tensor([0, 2], dtype=torch.int32, device=DEVICE), backend="triton")
        lora_linear(several["x"], *([several[name]] * 2 for name in ("weight", "lora_a", "lora_b")), backend="triton")
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("klora::")}
    returning = {name for name in names if getattr(torch.ops.klora, name[7:]).default._schema.returns}
    assert not fakes.others
    assert fakes.met == returning


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_one_document_expanded_to_two_is_two_documents(name, backend):
    op = OPS[name]
    one = {tensor: op.floats[tensor][:1] for tensor in op.per_document}
    expanded = {tensor: value.expand(2, *value.shape[1:]) for tensor, value in one.items()}
    copied = {tensor: value.contiguous() for tensor, value in expanded.items()}
    same(op(backend, **expanded), op(backend, **copied))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_outputs_may_be_changed_in_place(name, backend):
    op = OPS[name]
    names = [tensor for tensor in op.floats if tensor not in op.refused]

    def doubled(in_place: bool, last: int | None = None) -> list[Tensor]:
        """The gradients where every output up to the last is doubled, once as a whole and once through a view."""
        leaves = [op.floats[tensor].clone().requires_grad_() for tensor in names]
        outputs = op(backend, **dict(zip(names, leaves, strict=True)))
        for out in outputs[:last] if in_place else ():
            out.mul_(2)
            out.view(-1)[:1].mul_(2)
        if not in_place:
            twice = [2 * out for out in outputs[:last]]
            twice = [torch.cat([2 * out.flatten()[:1], out.flatten()[1:]]) for out in twice]
            outputs = [*twice, *outputs[len(twice) :]]
        return list(torch.autograd.grad(sum(out.sum() for out in outputs), leaves))

    free = FREE.get((name, backend))
    if free is not None:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            doubled(in_place=True)
    close(doubled(in_place=True, last=free), doubled(in_place=False, last=free))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_training_follows_evaluation_under_inference_mode(name, backend):
    op = OPS[name]
    with torch.inference_mode():
        evaluated = op(backend)
    trained = gradients(op, backend)
    (close if name.endswith("nll") else same)(trained[: len(evaluated)], evaluated)


def test_rotary_tables_made_under_inference_mode_serve_training():
    with torch.inference_mode():
        tables = rotary_tables(5, 8, 1e4)
    q, k = (torch.randn(2, 5, heads, 8, requires_grad=True) for heads in (2, 1))
    sum(out.sum() for out in norm_rotary(q, k, *tables)).backward()
    assert q.grad.any() and k.grad.any()


@pytest.mark.parametrize(("name", "tensor"), [(name, tensor) for name, tensor in INPUTS if len(OPS[name].floats) > 1])
def test_another_device_or_dtype_is_refused(name, tensor):
    op = OPS[name]
    for backend in BACKENDS:
        with pytest.raises(ValueError, match="device| on "):
            op(backend, **{tensor: op.floats[tensor].to("meta")})
    with pytest.raises(ValueError, match="wanted|wants|dtype|allowed"):
        op("triton", **{tensor: op.floats[tensor].double()})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_SLOTS)
def test_slots_are_int32_or_int64_of_one_device(name, backend):
    op, slots = OPS[name], OPS[name].more["slots"]
    same(op(backend, slots=slots.int()), op(backend))
    for wrong in (slots.short(), slots.float(), slots.bool(), slots.to("meta"), slots[:1], slots[None]):
        with pytest.raises(ValueError, match="slots is .*; wanted int32 or int64"):
            op(backend, slots=wrong)
    with pytest.raises(TypeError, match=r"slots is \[2, 1\]; wanted a tensor, int32 or int64 \[2\]"):
        op(backend, slots=[2, 1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_TARGETS)
def test_targets_are_int32_or_int64_of_one_device(name, backend):
    op, targets = OPS[name], OPS[name].more["targets"]
    for wrong in (targets.short(), targets.float(), targets.to("meta"), targets[:1]):
        with pytest.raises(ValueError, match="targets"):
            op(backend, targets=wrong)


@pytest.mark.parametrize("name", WITH_ROTARY)
@pytest.mark.parametrize("kind", ["scaled", "any", "rounded"])
def test_gradients_are_those_of_the_tables_whatever_their_length(name, kind):
    """YaRN scales both tables; each pair of `any` has a length of its own; bfloat16 tables are nearly unit ones."""
    op = OPS[name]
    cos, sin = op.floats["cos"], op.floats["sin"]
    lengths = torch.linspace(0.3, 2.0, cos.numel(), device=DEVICE).view(cos.shape)
    cos, sin = {
        "scaled": (1.4 * cos, 1.4 * sin),
        "any": (lengths * cos, lengths * sin),
        "rounded": (cos.bfloat16().float(), sin.bfloat16().float()),
    }[kind]
    draws = [_tables_gradients(op, floats, cos, sin) for floats in _draws(op)]
    wanted, plain, ours = (
        [torch.cat(parts) for parts in zip(*(draw[which] for draw in draws), strict=True)] for which in range(3)
    )
    assert all(relative_error(got, true) <= 4e-6 for got, true in zip(plain, wanted, strict=True))
    # p comes from the logsumexp, which costs up to half as much error again as a kept softmax.
    assert_as_exact(ours, wanted, plain, margin=1.6)


def _draws(op: Op) -> Iterator[dict[str, Tensor]]:
    """What the op takes, and numbers near it: of one draw alone, an error's size is chance."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    yield op.floats
    for _ in range(3):
        near = {name: torch.randn(t.shape, generator=generator, device=DEVICE) for name, t in op.floats.items()}
        near = {name: t + (0.3 * t.abs().mean() * near[name]).to(t) for name, t in op.floats.items()}
        yield near | {name: op.floats[name] for name in ("cos", "sin")}


def _tables_gradients(op: Op, floats: dict[str, Tensor], cos: Tensor, sin: Tensor) -> list[list[Tensor]]:
    """Flat outputs and gradients: in float64, and of the reference and the kernels."""
    exact = Op(op.function, {n: t.double() for n, t in floats.items()}, op.more, op.refused)
    op = Op(op.function, floats, op.more, op.refused)
    found = gradients(exact, "reference", cos=cos.double(), sin=sin.double())
    found = [found, *(gradients(op, backend, cos=cos, sin=sin) for backend in BACKENDS)]
    return [[tensor.flatten() for tensor in one] for one in found]


@pytest.mark.parametrize("name", WITH_TARGETS)
@pytest.mark.parametrize("temperature", [1.0, 0.9])
@pytest.mark.parametrize("softcap", [math.inf, 2.0**64, 1e300])
def test_an_infinite_softcap_leaves_the_logits_as_they_are(name, temperature, softcap):
    op = OPS[name]
    about = {"softcap": softcap, "temperature": temperature}
    leaves = {n: t.double().requires_grad_() for n, t in op.floats.items()}
    logits = leaves["h"] @ leaves["weight"].mT / temperature
    if "lora_a" in leaves:
        a, b = leaves["lora_a"][op.more["slots"]], leaves["lora_b"][op.more["slots"]]
        logits = logits + leaves["h"] @ a.mT @ b.mT / temperature
    nll = logits.logsumexp(-1) - logits.gather(-1, op.more["targets"][..., None])[..., 0]
    weights = torch.linspace(0.5, 1.5, nll.numel(), device=DEVICE, dtype=torch.float64).view(nll.shape)
    exact = [nll, *torch.autograd.grad((nll * weights).sum(), list(leaves.values()))]
    for backend in BACKENDS:
        for got, true in zip(gradients(op, backend, **about), exact, strict=True):
            assert (got.double() - true).norm() <= 2e-6 * true.norm()
    z = torch.tensor([-1e4, -0.1, 0.0, 3e-8, 77.0])
    assert torch.equal(softcap_logits_ref(z, softcap), z)


def on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def every_op() -> dict[str, Callable]:
    """A call of every op on CPU tensors, by the backend; those that write their results too."""
    calls = {}
    for name, op in ops().items():
        moved = Op(op.function, *({key: on_cpu(value) for key, value in part.items()} for part in op[1:3]))
        calls[name] = moved
    head = calls["lora_head_nll"]
    into = {"dnll": torch.ones(2, 5), **{f"d{name}": head.floats[name].clone() for name in ("lora_a", "lora_b")}}
    pools, step, lr = [torch.rand(3, 10) for _ in range(4)], torch.zeros(3, dtype=torch.int64), torch.ones(3)
    x, matrix, pair = torch.rand(2, 64), quantize_int6(torch.rand(64, 64)), ([torch.rand(8, 8)], [torch.rand(8, 8)])
    rings, chunk, counts = [torch.rand(2, 8, 1, 16) for _ in range(2)], torch.rand(2, 3, 1, 16), torch.tensor([0, 1])
    packed = torch.rand(3, 1, 16), torch.rand(3, 1, 16), torch.rand(3, 1, 16), torch.tensor([0, 1, 3]).int()
    return calls | {
        "causal_attention_varlen": partial(causal_attention_varlen, *packed),
        "cache_write_": partial(cache_write_, *rings, chunk, chunk.clone(), counts, counts, counts),
        "lora_head_nll_grads_": partial(lora_head_nll_grads_, **head.floats, **head.more, **into),
        "lora_adam_": partial(lora_adam_, *pools, step, lr),
        "int6_linear": partial(int6_linear, x, matrix),
        "int6_linear_dx": partial(int6_linear_dx, x, matrix),
        "newton_schulz": partial(newton_schulz, torch.rand(8, 8)),
        "muon_updates": partial(muon_updates, *pair, 0.9),
        "muon_apply_": partial(muon_apply_, *pair, 0.1, 0.0),
    }


EVERY_OP = every_op()


def test_no_op_with_a_backend_is_missing_here():
    public = (getattr(klora.kernels, name) for name in klora.kernels.__all__)
    with_backend = {
        f.__name__ for f in public if inspect.isfunction(f) and "backend" in inspect.signature(f).parameters
    }
    assert with_backend - {"causal_attention_ref"} == EVERY_OP.keys(), "whose backend is PyTorch's"


@pytest.mark.parametrize("name", EVERY_OP)
def test_the_kernel_on_cpu_tensors_is_refused_by_name(name, monkeypatch):
    """Outside of the interpreter; Triton's own error would speak of drivers."""
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    wanted = (
        r"backend is 'triton' and the tensors are on cpu; the kernels run on a CUDA GPU: .* give backend='reference'"
    )
    with pytest.raises(ValueError, match=wanted):
        EVERY_OP[name](backend="triton")
    with pytest.raises(ValueError, match="backend is 'cuda'; allowed: None, 'reference', 'triton'"):
        EVERY_OP[name](backend="cuda")


@pytest.fixture(scope="module")
def as_dtensor():
    """Makes a DTensor of a tensor, a list of one: on a mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield partial(tree_map_only, Tensor, lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]))
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", EVERY_OP)
def test_a_dtensor_is_refused_by_the_name_of_its_argument(name, backend, as_dtensor):
    """Each tensor alone, and no op runs: what it would write stays as it is."""
    call = EVERY_OP[name]
    if isinstance(call, partial):
        function = call.func
        given = dict(inspect.signature(function).bind_partial(*call.args, **call.keywords).arguments)
    else:
        function, given = call.function, {**call.floats, **call.more}
    tensors = [key for key, value in given.items() if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))]
    assert tensors
    for key in tensors:
        said = "slots|cache_slots" if key == "slots" else key
        wanted = rf"DTensor was given for `({said})`.*allowed: plain tensors; give ({said})\.to_local\(\).*full_tensor"
        with pytest.raises(ValueError, match=wanted):
            function(**{**given, key: as_dtensor(given[key])}, backend=backend)


def test_a_dtensor_is_refused_where_weights_are_packed_and_in_lists(as_dtensor):
    weight, x = torch.rand(48, 64), torch.rand(2, 5, 64)
    matrix, pools = quantize_int6(weight), ([torch.rand(2, 3, 64)] * 2, [torch.rand(2, 48, 3)] * 2)
    calls = {
        "weight": lambda: quantize_int6(as_dtensor(weight)),
        "second_moment": lambda: quantize_int6(weight, second_moment=as_dtensor(torch.rand(64))),
        "codes": lambda: klora.kernels.pack_int6(as_dtensor(matrix.codes())),
        "packed": lambda: klora.kernels.unpack_int6(as_dtensor(matrix.packed), matrix.shape),
        "weight.scale": lambda: int6_linear(x, replace(matrix, scale=as_dtensor(matrix.scale))),
        "weight[1]": lambda: lora_linear(x, [weight, as_dtensor(weight)], *pools),
        "v": lambda: klora.kernels.auto_attention(*torch.rand(2, 2, 5, 2, 16), as_dtensor(torch.rand(2, 5, 2, 16))),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"DTensor was given for `{re.escape(name)}`"):
            call()


@pytest.mark.slow
def test_without_the_interpreter_the_refusal_is_not_triton_s():
    code = "import torch; from klora.kernels import rms_norm; rms_norm(torch.ones(2, 16), backend='triton')"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("ValueError: backend is 'triton' and the tensors are on cpu; ")


@pytest.mark.parametrize("about", [{"softcap": s} for s in (None, 0.0, -1.0, math.nan)]
                         + [{"softcap": 5.0, "temperature": t} for t in (0.0, -1.0, math.nan, math.inf)])  # fmt: skip
def test_an_impossible_softcap_or_temperature_is_refused(about):
    plain = [OPS["softcap_nll"].floats[name] for name in ("h", "weight")]
    op = OPS["lora_head_nll"]
    targets = op.more["targets"]
    calls = [
        lambda: softcap_logits_ref(plain[0], **about),
        lambda: softcap_nll_ref(*plain, targets, **about),
        lambda: lora_head_nll_ref(**op.floats, **{**op.more, **about}),
        lambda: lora_head_nll_grads_(
            **op.floats, **{**op.more, **about}, dnll=targets.float(), dlora_a=op.floats["lora_a"].clone(),
            dlora_b=op.floats["lora_b"].clone(), backend="triton",
        ),
        *(lambda name=name, backend=backend: OPS[name](backend, **about)
          for name in WITH_TARGETS if name != "linear_nll" or about["softcap"] is not None  # where it is no softcap
          for backend in BACKENDS),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="both must be above 0.*softcap=math.inf is no softcap"):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
@pytest.mark.parametrize("name", [*WITH_SLOTS, "softcap_nll"])
def test_no_index_is_cut_to_32_bits_in_bf16(name):
    op = ops(dtype=torch.bfloat16)[name]
    if "slots" in op.more:
        results = [
            gradients(op, "triton", slots=torch.tensor([slot, 1], device=DEVICE)) for slot in (2**32, 2**32 + 2, -1)
        ]
        same(results[0], results[2]), same(results[1], results[2])
    if "targets" in op.more:
        targets = op.more["targets"].clone()
        targets[0, :2] = torch.tensor([2**32, 2**32 + 5], device=DEVICE)
        nll, dh, *_ = gradients(op, "triton", targets=targets)
        assert not nll[0, :2].any() and not dh[0, :2].any()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
@pytest.mark.parametrize("name", ["lora_qkv_rope", "lora_attention"])
def test_gradients_for_tables_of_any_length_in_bf16(name):
    op = ops(S=70, dtype=torch.bfloat16)[name]
    cos, sin = (1.4 * op.floats[table] for table in ("cos", "sin"))
    exact = Op(op.function, {n: t.double() for n, t in op.floats.items()}, op.more, op.refused)
    wanted = gradients(exact, "reference", cos=cos.double(), sin=sin.double())
    ours, plain = (gradients(op, backend, cos=cos, sin=sin) for backend in ("triton", "reference"))
    assert_as_exact(ours, wanted, plain)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", WITH_TARGETS)
def test_without_a_softcap_in_16_bits(name, dtype):
    op = ops(S=70, dtype=dtype)[name]
    exact = Op(op.function, {n: t.double() for n, t in op.floats.items()}, op.more)
    wanted = gradients(exact, "reference", softcap=math.inf)
    ours, plain = (gradients(op, backend, softcap=math.inf) for backend in ("triton", "reference"))
    assert_as_exact(ours, wanted, plain)


@pytest.mark.slow
def test_triton_s_frontend_takes_every_kernel_in_both_kinds_of_dtype():
    """What the interpreter lets pass and the compiler does not; in a process where Triton is itself."""
    done = subprocess.run([sys.executable, Path(__file__).with_name("frontend.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 200
