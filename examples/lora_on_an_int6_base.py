"""Adapters over a base at six bits: less memory for the weights, the same training loop.

    python lora_on_an_int6_base.py

A tiny Llama with random weights learns to repeat a line of tokens.
"""

import torch
from klora.lora import attach
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "initializer_range": 0.1,
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=4)
model = LlamaForCausalLM(config).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
line = torch.randint(256, (1, 32), device=device)
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
dense = model(line).logits.detach()


def linear_bytes():
    """What the weights of the targets take, scales included."""
    modules = [module for name, module in model.named_modules() if name.endswith(TARGETS)]
    return sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))


bytes_dense = linear_bytes()
lora = attach(model, slots=2, targets=TARGETS, rank=8, alpha=16, base="int6")
print(f"on {device}: {bytes_dense:,} bytes of dense weights, {linear_bytes():,} at six bits")
print(f"logits: relative error {((model(line).logits - dense).norm() / dense.norm()).item():.1%}")

lora.adapters.create("line")
optimizer = lora.optimizer(lr=0.01)
for step in range(41):
    with lora.rows(["line"]):
        loss = model(line, labels=line).loss
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step:2}: loss {loss.item():.3f}")

state = lora.detach().state_dict()
print(f"detached, the dense weights: {all(torch.equal(state[name], before[name]) for name in before)}")
