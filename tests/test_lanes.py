"""Lanes that share a row hold the same bits of its sum. The interpreter knows no lanes: so by the machine code."""

import pytest
from hopper import compiled_for_hopper, fused_with_another_lane

SMALL = """
import torch, triton
from hopper import fused_with_another_lane, pretend
from klora.kernels.attention import causal_attention
from klora.kernels.embedding import bigram_embedding
from klora.kernels.precompile import recorded
from klora.kernels.qkv_attention import qkv_attention
from klora.kernels.rms_norm import rms_norm
from klora.kernels.rotary import rotary_tables

pretend()
HEAD, T = 16, 16

def leaf(*size):
    return torch.zeros(size, requires_grad=True)

def attention():
    q, k, v = (leaf(2, T, heads, HEAD) for heads in (4, 2, 2))
    causal_attention(q, k, v, backend="triton").sum().backward()

def projected_attention():
    tables = *rotary_tables(T, HEAD, 100.0, "cpu"), leaf(4)
    sizes = [4 * HEAD, 2 * HEAD, 2 * HEAD]
    out = qkv_attention(leaf(2, T, 96), leaf(sum(sizes), 96), *tables, sizes, head_dim=HEAD, backend="triton")
    out.sum().backward()

def embedding():
    tokens = torch.zeros(2, T, dtype=torch.int64)
    x, _ = bigram_embedding(tokens, leaf(50, 16), leaf(40, 16), leaf(16), torch.float32, backend="triton")
    x.sum().backward()

def norm():
    rms_norm(leaf(2, T, 16), leaf(16), backend="triton").sum().backward()

for work in (attention, projected_attention, embedding, norm):
    for kernel in recorded(work).values():
        compiled = triton.compile(kernel.source(), target=kernel.target, options=kernel.options)
        found = fused_with_another_lane(compiled.asm["ptx"])
        assert not found, (kernel.name, found)
        print(work.__name__, kernel.name)
"""


@pytest.mark.slow
def test_lanes_of_a_row_hold_one_sum_where_each_has_one_element():
    """In a process where Triton is itself."""
    found = set(compiled_for_hopper(SMALL).splitlines())
    assert {"attention _dq_kernel", "projected_attention _dq_kernel", "projected_attention _dkdv_kernel"} <= found
    assert {"embedding _forward", "embedding _backward", "norm forward", "norm backward"} <= found


def test_what_is_found():
    shuffle = "shfl.sync.bfly.b32 \t%r118, %r117, 8, 31, -1;"
    fused = "fma.rn.f32 \t%r119, %r114, %r116, %r118;"
    by_ptxas = "mul.f32 \t%r117, %r114, %r116;", "add.f32 \t%r119, %r117, %r118;"
    rounded = "mul.rn.f32 \t%r117, %r114, %r116;", "add.f32 \t%r119, %r117, %r118;"
    apart = "fma.rn.f32 \t%r117, %r114, %r116, 0f00000000;", "add.f32 \t%r119, %r117, %r118;"
    assert fused_with_another_lane(f"{shuffle}\n{fused}") == [fused]
    assert fused_with_another_lane("\n".join([by_ptxas[0], shuffle, by_ptxas[1]])) == [by_ptxas[1]]
    assert fused_with_another_lane("\n".join([rounded[0], shuffle, rounded[1]])) == []
    assert fused_with_another_lane("\n".join([apart[0], shuffle, apart[1]])) == []
