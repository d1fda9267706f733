"""The ops for anyone's model make a Llama: loss and every gradient are those of Transformers."""

import pytest
import torch
from hopper import compiled_for_hopper
from klora.kernels import (
    apply_rotary,
    causal_attention,
    linear_nll,
    residual_norm,
    rms_norm,
    rotary_tables,
    swiglu_mlp,
)
from transformers import LlamaConfig, LlamaForCausalLM

CUDA = torch.cuda.is_available()
IGNORED = -100


def loss_of(llama, tokens, labels, positions, backend):
    layers, config, about = llama.model.layers, llama.config, {"backend": backend}
    size = config.hidden_size // config.num_attention_heads
    norm = {"eps": config.rms_norm_eps, **about}
    cos, sin = rotary_tables(64, size, 10000.0, tokens.device)
    x = llama.model.embed_tokens(tokens)
    n = rms_norm(x, layers[0].input_layernorm.weight, **norm)
    after = [layer.input_layernorm.weight for layer in layers[1:]] + [llama.model.norm.weight]
    for layer, weight in zip(layers, after, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = (
            project(n).unflatten(-1, (-1, size)) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary(q, k, cos, sin, positions, **about)
        out = attention.o_proj(causal_attention(q, k, v, **about).flatten(2))
        _, x, n = residual_norm(x, out, weight=layer.post_attention_layernorm.weight, **norm)
        out = swiglu_mlp(n, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, **about)
        _, x, n = residual_norm(x, out, weight=weight, **norm)
    return linear_nll(n[:, :-1], llama.lm_head.weight, labels[:, 1:], **about)


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", "reference"),
        pytest.param("cpu", "triton", marks=pytest.mark.skipif(CUDA, reason="the interpreter runs without a GPU")),
        pytest.param("cuda", "triton", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA GPU")]),
    ],
)
def test_loss_and_gradients_are_those_of_transformers(device, backend):
    """Two rows, some targets ignored, positions that do not begin at 0."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).to(device)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    tokens = torch.randint(120, (2, 12), device=device)
    labels, positions = tokens.clone(), torch.arange(3, 15, device=device).expand(2, 12)
    labels[0, 4:7] = IGNORED
    parameters = dict(llama.named_parameters())
    loss = loss_of(llama, tokens, labels, positions, backend)
    found = torch.autograd.grad(loss, list(parameters.values()))
    theirs = llama(tokens, labels=labels, position_ids=positions).loss
    torch.testing.assert_close(loss, theirs)
    for name, ours, wanted in zip(
        parameters, found, torch.autograd.grad(theirs, list(parameters.values())), strict=True
    ):
        assert (ours - wanted).norm() <= 1e-4 * wanted.norm(), name


COMPILED_FOR_HOPPER = """
import torch, triton
from hopper import pretend
from klora.kernels import linear_nll, swiglu_mlp
from klora.kernels.precompile import recorded

pretend()

def leaf(*size):
    return torch.zeros(size, dtype=torch.bfloat16, requires_grad=True)

def work():
    swiglu_mlp(leaf(4000, 512), leaf(1536, 512), leaf(1536, 512), leaf(512, 1536), backend="triton").sum().backward()
    targets = torch.zeros(4000, dtype=torch.int64)
    linear_nll(leaf(4000, 512), leaf(2008, 512), targets, memory=1, backend="triton").backward()

for kernel in recorded(work).values():
    compiled = triton.compile(kernel.source(), target=kernel.target, options=kernel.options)
    shared, epilogue = compiled.metadata.shared, ""
    if kernel.name == "_product_kernel":
        epilogue = kernel.constants[(kernel.function.arg_names.index("EPILOGUE"),)]
    # The gate's tiles are made for two programs side by side on a multiprocessor's 228 KiB, each with 1 KiB of its own.
    assert shared <= (232_448 if "gate" not in epilogue else 233_472 // 2 - 1024), (kernel.name, epilogue, shared)
    if kernel.name in ("row_sums", "logit_gradient"):
        assert "ld.global.v4.b32" in compiled.asm["ptx"], "it is not read 16 bytes at a time"
    print(kernel.name, epilogue)
"""


@pytest.mark.slow
def test_the_products_epilogues_compile_for_hopper():
    """In a process where Triton is itself: what they need of shared memory, and how wide the passes over logits of
    a vocabulary of a multiple of 8 read, which the interpreter does not know."""
    found = {line.strip() for line in compiled_for_hopper(COMPILED_FOR_HOPPER).splitlines()}
    assert {f"_product_kernel {name}" for name in ("store", "gate", "gate_slope", "add")} <= found
    assert {"row_sums", "logit_gradient"} <= found
