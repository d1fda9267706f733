"""Every op's kernels through Triton's frontend for Hopper, without a GPU: `python tests/frontend.py`.

The interpreter runs a kernel as Python. What it lets pass and the compiler does not, such as a tensor that may be None
in a branch that is not taken, shows here: status 1, and a line for each kernel that is refused.
"""

import os
import sys

os.environ |= {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}

import test_lora_linears
import torch
from hopper import pretend
from klora.kernels.precompile import Compilation, recorded
from test_contract import gradients, ops
from triton._C.libtriton import ir
from triton.compiler import make_backend


def to_ir(kernel: Compilation) -> None:
    """The first stage of compiling, as `triton.compile` makes it."""
    source, backend, context = kernel.source(), make_backend(kernel.target), ir.context()
    options = backend.parse_options({**kernel.options, **source.parse_options()})
    ir.load_dialects(context)
    backend.load_dialects(context)
    more = backend.get_codegen_implementation(options), backend.get_module_map(), context
    source.make_ir(kernel.target, options, *more)


def work() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for op in ops(dtype=dtype).values():
            gradients(op, "triton")
        for case in test_lora_linears.CASES.values():
            test_lora_linears.results(
                test_lora_linears.lora_linear, test_lora_linears.inputs(**case, dtype=dtype), backend="triton"
            )


if __name__ == "__main__":
    pretend()
    refused = 0
    kernels = recorded(work).values()
    for kernel in kernels:
        try:
            to_ir(kernel)
        except Exception as error:
            refused += 1
            print(f"{kernel.name}: {error}", file=sys.stderr)
    print(f"{len(kernels)} kernels, {refused} refused")
    sys.exit(refused > 0)
