"""The product of two tiles added to a third, as every kernel with a sum over tiles wants it."""

import triton
import triton.language as tl


@triton.jit
def multiply_add(a, b, acc):
    """a b + acc. In fp32, which no tensor core multiplies, the block's sum is formed first: shorter chains of adds.

    `max_num_imprecise_acc`, which means something for 8-bit floats alone, keeps Triton from making one chain of both.
    """
    if a.dtype == tl.float32:
        acc += tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def multiply(a, b):
    """a b in fp32."""
    return multiply_add(a, b, tl.zeros((a.shape[0], b.shape[1]), tl.float32))
