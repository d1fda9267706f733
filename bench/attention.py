"""Group `attention`: ours, the formula in eager PyTorch, PyTorch's SDPA backends, and competing packages.

`cached_attention` is that of a chunk of T tokens whose cache holds the whole window before it, in rings that begin
anywhere. Its peers attend over the window put together, cache and chunk in one tensor, which is part of their time.

`attention_varlen` is that of packed documents, one after the other in one row, the n-th n times as long as the first.
"""

import importlib
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.attention import (
    PACKAGES,
    attend,
    auto_attention,
    cached_attention,
    causal_attention,
    causal_attention_varlen,
    explain_attention,
)
from .entry import Call, Entry, Shape, Tensors, Variant

SHAPES = {
    "B96-S1024": {"B": 96, "S": 1024, "H": 8, "G": 4, "d": 64},
    "B64-S256": {"B": 64, "S": 256, "H": 8, "G": 4, "d": 64},
    "B64-S512": {"B": 64, "S": 512, "H": 8, "G": 4, "d": 64},
    "B64-S768": {"B": 64, "S": 768, "H": 8, "G": 4, "d": 64},
    "B64-S1024": {"B": 64, "S": 1024, "H": 8, "G": 4, "d": 64},
    "B48-S2048": {"B": 48, "S": 2048, "H": 8, "G": 4, "d": 64},
    "B48-S1024-d128": {"B": 48, "S": 1024, "H": 8, "G": 4, "d": 128},
    "B48-S1024-d80": {"B": 48, "S": 1024, "H": 8, "G": 4, "d": 80},
    "B48-S1024-d96": {"B": 48, "S": 1024, "H": 8, "G": 4, "d": 96},
    "B4-S4096-d128": {"B": 4, "S": 4096, "H": 32, "G": 8, "d": 128},
    "B24-S1024-d256": {"B": 24, "S": 1024, "H": 8, "G": 4, "d": 256},
}
TO_128 = tuple(name for name, shape in SHAPES.items() if shape["d"] <= 128)
"""Shapes that peers take whose heads end at 128."""
TOY = {"B": 2, "S": 48, "H": 4, "G": 2, "d": 16}
GATE = {"B": 2, "S": 1000, "H": 8, "G": 4, "d": 64}

CHUNKS = {
    f"B{B}-T{T}-W{window}" + ("" if d == 64 else f"-d{d}"): {"B": B, "T": T, "window": window, "H": 8, "G": 4, "d": d}
    for B, T, window, d in (
        (64, 32, 1024, 64),
        (64, 256, 1024, 64),
        (64, 256, 4096, 64),
        (64, 64, 1024, 128),
        (16, 32, 1024, 64),
        (4, 32, 4096, 64),
    )
}
TOY_CHUNK = {"B": 2, "T": 17, "window": 48, "H": 4, "G": 2, "d": 16}
GATE_CHUNK = {"B": 2, "T": 100, "window": 1000, "H": 8, "G": 4, "d": 64}

PACKED = {
    "T65536-N64": {"T": 65536, "documents": 64, "H": 8, "G": 4, "d": 64},
    "T65536-N512": {"T": 65536, "documents": 512, "H": 8, "G": 4, "d": 64},
    "T32768-N16-d128": {"T": 32768, "documents": 16, "H": 8, "G": 4, "d": 128},
}
TOY_PACKED = {"T": 60, "documents": 4, "H": 4, "G": 2, "d": 16}
GATE_PACKED = {"T": 1500, "documents": 8, "H": 8, "G": 4, "d": 64}


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d), causal) v, term by term in the dtype of the inputs."""
    groups = q.size(2) // k.size(2)
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.size(-1) ** 0.5
    future = torch.ones(q.size(1), q.size(1), dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhij,bjhd->bihd", F.softmax(scores.masked_fill(future, float("-inf")), -1), v)


def _draw(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    sizes = [(shape["B"], shape["S"], heads, shape["d"]) for heads in (shape["H"], shape["G"], shape["G"], shape["H"])]
    return tuple(torch.randn(size, device=device, generator=generator).to(dtype) for size in sizes)


def _forward(attention: Call) -> Call:
    return lambda q, k, v, dout: attention(q, k, v)


def _forward_backward(attention: Call) -> Call:
    def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Tensors:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = attention(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout)

    return run


def _variants(wrap) -> tuple[Variant, ...]:
    def sdpa(backend: str, *devices: str, shapes: tuple[str, ...] | None = None) -> Variant:
        return Variant(
            f"sdpa-{backend}",
            lambda shape, device, dtype: wrap(lambda q, k, v: attend(q, k, v, backend)),
            devices=devices,
            shapes=shapes,
        )

    def choice(shape: Shape, device: torch.device, dtype: torch.dtype) -> str:
        q, k, v, _ = _draw(shape, device, dtype, torch.Generator(device).manual_seed(0))
        is_trained = wrap is _forward_backward
        return str(explain_attention(*(t.requires_grad_(is_trained) for t in (q, k, v))))

    def compiled(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
        return wrap(torch.compile(plain_attention))

    def package(name: str) -> Variant:
        def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
            return wrap(lambda q, k, v: attend(q, k, v, name))

        distribution = PACKAGES[name].distribution
        return Variant(distribution, build, package=distribution, devices=("cuda",), shapes=TO_128)

    return (
        Variant("eager", lambda shape, device, dtype: wrap(plain_attention)),
        Variant("klora", lambda shape, device, dtype: wrap(causal_attention), is_ours=True),
        Variant("klora-auto", lambda shape, device, dtype: wrap(auto_attention), is_ours=True, attention=choice),
        Variant("torch.compile", compiled, devices=("cuda",)),
        sdpa("cudnn", "cuda", shapes=TO_128),
        sdpa("flash", "cpu", "cuda"),
        *map(package, PACKAGES),
    )


def _bytes(tensors_of_heads: int, tensors_of_groups: int):
    def count(shape: Shape, itemsize: int) -> int:
        rows = shape["B"] * shape["S"] * shape["d"]
        return itemsize * rows * (tensors_of_heads * shape["H"] + tensors_of_groups * shape["G"])

    return count


def _flops(products: int):
    """`products` matrix products over the causal half of the square."""
    return lambda shape: products * shape["B"] * shape["H"] * shape["S"] ** 2 * shape["d"]


def _draw_chunk(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    """q, k, v, cache_k, cache_v, slots, filled and dout; slot 0 and half of the others are not named."""
    B, held = shape["B"], shape["window"] - shape["T"]
    *chunk, dout = _draw({**shape, "S": shape["T"]}, device, dtype, generator)
    size = 2 * B + 1, held, shape["G"], shape["d"]
    caches = (torch.randn(size, device=device, generator=generator).to(dtype) for _ in range(2))
    slots = 1 + torch.randperm(2 * B, device=device, generator=generator)[:B]
    filled = held + torch.randint(4 * held, (B,), device=device, generator=generator)
    return *chunk, *caches, slots, filled, dout


def _cached(shape: Shape, q, k, v, cache_k, cache_v, slots, filled) -> Tensor:
    return cached_attention(q, k, v, cache_k, cache_v, slots, filled, shape["window"])


def _over_window(attention: Call) -> Call:
    """`attention`(q [B, T, H, d], k, v [B, window, G, d]) where the cached ones come first, in any order: all of them
    are seen.
    """

    def run(shape: Shape, q, k, v, cache_k, cache_v, slots, filled) -> Tensor:
        return attention(q, *(torch.cat([c[slots], own], 1) for c, own in ((cache_k, k), (cache_v, v))))

    return run


def _own_mask(q: Tensor, k: Tensor) -> Tensor:
    """[T, window]: which keys a query sees."""
    return torch.ones(q.size(1), k.size(1), dtype=torch.bool, device=q.device).tril(k.size(1) - q.size(1))


@_over_window
def _plain_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(q.size(2) // k.size(2), 2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.size(-1) ** 0.5
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~_own_mask(q, k), float("-inf")).softmax(-1), v)


@_over_window
def _sdpa_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads repeated: the kernel that takes a mask knows no groups."""
    mask = _own_mask(q, k)
    k, v = (t.repeat_interleave(q.size(2) // k.size(2), 2).transpose(1, 2) for t in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask).transpose(1, 2)


@_over_window
def _causal_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    whole = torch.cat([q.new_zeros(q.size(0), k.size(1) - q.size(1), *q.shape[2:]), q], 1)
    return causal_attention(whole, k, v, q.size(1))


def _chunk_forward(attention: Call) -> Call:
    return lambda shape, *inputs: attention(shape, *inputs[:-1])


def _chunk_forward_backward(attention: Call) -> Call:
    def run(shape: Shape, q, k, v, *more) -> Tensors:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = attention(shape, *leaves, *more[:-1])
        return out, *torch.autograd.grad(out, leaves, more[-1])

    return run


def _of_shape(wrap, name: str, attention: Call, **more) -> Variant:
    """A variant whose `attention` takes the shape too, forward or with its backward: `wrap` says which."""

    def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
        return lambda *inputs: wrap(attention)(shape, *inputs)

    return Variant(name, build, **more)


def _chunk_variants(wrap) -> tuple[Variant, ...]:
    return (
        _of_shape(wrap, "eager", _plain_chunk),
        _of_shape(wrap, "klora", _cached, is_ours=True),
        _of_shape(wrap, "klora-window", _causal_chunk, is_ours=True),
        _of_shape(wrap, "sdpa-mask", _sdpa_chunk),
    )


def _chunk_bytes(of_chunk: int, of_cache: int):
    """`of_chunk` tensors of H heads and as many of G; `of_cache` passes over the cached keys and values."""

    def count(shape: Shape, itemsize: int) -> int:
        own = of_chunk * shape["T"] * (shape["H"] + shape["G"])
        cached = of_cache * 2 * (shape["window"] - shape["T"]) * shape["G"]
        return itemsize * shape["B"] * shape["d"] * (own + cached)

    return count


def _chunk_flops(over_cache: int, over_chunk: int):
    """Products over the cached keys, and over the causal half of the chunk's own."""

    def count(shape: Shape) -> int:
        keys = 2 * over_cache * (shape["window"] - shape["T"]) + over_chunk * shape["T"]
        return shape["B"] * shape["H"] * shape["T"] * shape["d"] * keys

    return count


def _ends(shape: Shape) -> list[int]:
    """Where documents start and end, as the host knows it."""
    count = shape["documents"]
    return [shape["T"] * n * (n + 1) // (count * (count + 1)) for n in range(count + 1)]


def _longest(shape: Shape) -> int:
    return max(b - a for a, b in itertools.pairwise(_ends(shape)))


def _draw_packed(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    """q, k, v and dout [T, heads, d]."""
    return tuple(t[0] for t in _draw({**shape, "B": 1, "S": shape["T"]}, device, dtype, generator))


def _plain_packed(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One document after the other."""
    parts = [plain_attention(*(t[None, a:b] for t in (q, k, v)))[0] for a, b in itertools.pairwise(_ends(shape))]
    return torch.cat(parts)


def _packed_by_pytorch(shape: Shape, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # not every version has it: then the record says so

    about = cu_seqlens, cu_seqlens, _longest(shape), _longest(shape)
    return varlen_attn(q, k, v, *about, window_size=(-1, 0), enable_gqa=True)


def _packed_by_package(name: str) -> Call:
    def attention(shape: Shape, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        module = importlib.import_module(PACKAGES[name].module)
        about = cu_seqlens, cu_seqlens, _longest(shape), _longest(shape)
        out = module.flash_attn_varlen_func(q, k, v, *about, causal=True)
        return out if isinstance(out, Tensor) else out[0]

    return attention


def _packed_variants(wrap) -> tuple[Variant, ...]:
    def with_ends(name: str, attention: Call, **more) -> Variant:
        """`attention` takes cu_seqlens too, which is made once."""

        def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
            cu_seqlens = torch.tensor(_ends(shape), dtype=torch.int32, device=device)
            call = wrap(lambda shape, q, k, v: attention(shape, q, k, v, cu_seqlens))
            return lambda *inputs: call(shape, *inputs)

        return Variant(name, build, **more)

    return (
        _of_shape(wrap, "eager", _plain_packed),
        with_ends("klora", lambda shape, *inputs: causal_attention_varlen(*inputs), is_ours=True),
        with_ends("torch-varlen", _packed_by_pytorch, devices=("cuda",)),
        *(
            with_ends(of.distribution, _packed_by_package(name), package=of.distribution, devices=("cuda",))
            for name, of in PACKAGES.items()
        ),
    )


def _packed_bytes(tensors: int):
    return lambda shape, itemsize: itemsize * tensors * shape["T"] * shape["d"] * (shape["H"] + shape["G"])


def _packed_flops(products: int):
    def count(shape: Shape) -> int:
        squares = sum((b - a) ** 2 for a, b in itertools.pairwise(_ends(shape)))
        return products * shape["H"] * squares * shape["d"]

    return count


ENTRIES = (
    Entry(
        group="attention",
        op="attention_forward",
        shapes=SHAPES,
        toy=TOY,
        gate=GATE,
        draw=_draw,
        truth=lambda shape, *inputs: _forward(plain_attention)(*inputs),
        variants=_variants(_forward),
        bytes=_bytes(2, 2),
        flops=_flops(2),
    ),
    Entry(
        group="attention",
        op="attention_forward_backward",
        shapes=SHAPES,
        toy=TOY,
        gate=GATE,
        draw=_draw,
        truth=lambda shape, *inputs: _forward_backward(plain_attention)(*inputs),
        variants=_variants(_forward_backward),
        bytes=_bytes(4, 4),
        flops=_flops(7),
    ),
    Entry(
        group="attention",
        op="cached_attention_forward",
        shapes=CHUNKS,
        toy=TOY_CHUNK,
        gate=GATE_CHUNK,
        draw=_draw_chunk,
        truth=_chunk_forward(_plain_chunk),
        variants=_chunk_variants(_chunk_forward),
        bytes=_chunk_bytes(2, 1),
        flops=_chunk_flops(2, 2),
    ),
    Entry(
        group="attention",
        op="cached_attention_forward_backward",
        shapes=CHUNKS,
        toy=TOY_CHUNK,
        gate=GATE_CHUNK,
        draw=_draw_chunk,
        truth=_chunk_forward_backward(_plain_chunk),
        variants=_chunk_variants(_chunk_forward_backward),
        bytes=_chunk_bytes(4, 2),
        flops=_chunk_flops(5, 7),
    ),
    Entry(
        group="attention",
        op="attention_varlen_forward",
        shapes=PACKED,
        toy=TOY_PACKED,
        gate=GATE_PACKED,
        draw=_draw_packed,
        truth=_chunk_forward(_plain_packed),
        variants=_packed_variants(_chunk_forward),
        bytes=_packed_bytes(2),
        flops=_packed_flops(2),
    ),
    Entry(
        group="attention",
        op="attention_varlen_forward_backward",
        shapes=PACKED,
        toy=TOY_PACKED,
        gate=GATE_PACKED,
        draw=_draw_packed,
        truth=_chunk_forward_backward(_plain_packed),
        variants=_packed_variants(_chunk_forward_backward),
        bytes=_packed_bytes(4),
        flops=_packed_flops(7),
    ),
)
