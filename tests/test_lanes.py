"""Lanes that share a row hold the same bits of its sum. The interpreter knows no lanes: so by the machine code."""

import pytest
from hopper import compiled_for_hopper, fused_with_another_lane

WITH_SUMS = (
    "residual_mlp",
    "rms_norm",
    "residual_norm",
    "norm_rotary",
    "causal_attention",
    "lora_qkv_rope",
    "lora_attention",
    "lora_cached_attention",
    "qkv_attention",
    "bigram_embedding",
    "softcap_nll",
    "linear_nll",
)
"""Ops whose kernels add up along rows; `cached_attention` and `lora_head_nll` have the sums of others here."""

SMALL = """
import os, sys
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import triton
from hopper import fused_with_another_lane, pretend
from klora.kernels.precompile import recorded
from test_contract import gradients, ops

pretend()
works = ops()
for name in sys.argv[1:]:
    for kernel in recorded(lambda: gradients(works[name], "triton")).values():
        compiled = triton.compile(kernel.source(), target=kernel.target, options=kernel.options)
        found = fused_with_another_lane(compiled.asm["ptx"])
        assert not found, (name, kernel.name, found)
        print(name, kernel.name)
"""


@pytest.mark.slow
def test_lanes_of_a_row_hold_one_sum_where_each_has_one_element():
    """In a process where Triton is itself; in fp32, for products of 16 bits are exact."""
    found = set(compiled_for_hopper(SMALL, *WITH_SUMS).splitlines())
    assert {line.split()[0] for line in found} == set(WITH_SUMS)
    assert {"causal_attention _dq_kernel", "qkv_attention _dq_kernel", "qkv_attention _dkdv_kernel"} <= found
    assert {"bigram_embedding _forward", "bigram_embedding _backward", "rms_norm forward", "rms_norm backward"} <= found


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
