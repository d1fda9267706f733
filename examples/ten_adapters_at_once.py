"""Ten adapters of different rank, alpha and targets on one Llama, trained at once: each learns a task of its own.

    python ten_adapters_at_once.py

The Llama is tiny, with random weights. Task i is to count on in steps of i + 1. One batch holds two rows of each task;
one forward, one backward and one optimizer step train all ten.
"""

import torch
from klora.lora import attach
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, ROWS, LENGTH, STEPS = 32, 2, 24, 120
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(config).to(device)

lora = attach(model, slots=10, targets=TARGETS, rank=16)
names = [f"steps of {i + 1}" for i in range(10)]
for i, name in enumerate(names):
    lora.adapters.create(name, rank=4 + i, alpha=16 + i, targets=TARGETS[: 4 + i % 3])
optimizer = lora.optimizer(lr=0.01)
for i, name in enumerate(names):
    optimizer.set_lr(name, 0.01 - 0.0003 * i)

rows = [name for name in names for _ in range(ROWS)]
strides = torch.tensor([names.index(name) + 1 for name in rows], device=device)[:, None]
counted = strides * torch.arange(LENGTH + 1, device=device)


def losses():
    """Nats per token of each row; the first tokens are drawn anew."""
    tokens = (torch.randint(VOCAB, (len(rows), 1), device=device) + counted) % VOCAB
    logits = model(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.mT.float(), tokens[:, 1:], reduction="none").mean(1)


with lora.rows(rows), torch.no_grad():
    before = losses().view(10, ROWS).mean(1)
for _ in range(STEPS):
    with lora.rows(rows):
        losses().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
with lora.rows(rows), torch.no_grad():
    after = losses().view(10, ROWS).mean(1)

print(f"on {device}: {len(lora.adapters)} adapters, {STEPS} steps of {len(rows)} rows")
for name, first, last in zip(names, before.tolist(), after.tolist(), strict=True):
    ranks = set(lora.adapters[name].ranks.values())
    print(f"{name:11} rank {ranks.pop():2}, {len(lora.adapters[name].ranks)} linears: loss {first:.3f} -> {last:.3f}")
with lora.rows(rows[::-1]), torch.no_grad():  # every row with the adapter of another task
    print(f"with each other's adapters: loss {losses().mean():.3f}")
