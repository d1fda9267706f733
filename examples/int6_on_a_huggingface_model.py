"""The linears of a Hugging Face model at six bits: swap them, save, load into a fresh model, undo.

    python int6_on_a_huggingface_model.py

The model is a small LlamaForCausalLM with random weights if transformers is installed, else a module with the same
linears. Pre-trained weights go the same way: AutoModelForCausalLM.from_pretrained(...) in the place of `build()`.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from klora.model import load_quantized, quantize_linears, save_quantized
from torch import nn

VOCAB, WIDTH, HIDDEN, BLOCKS, HEADS = 1000, 256, 688, 2, 4

try:
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError:
    LlamaForCausalLM = None


class Block(nn.Module):
    """A Llama block without rotary embedding."""

    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x):  # [B, S, WIDTH]
        y = self.norm(x)
        q, k, v = (p(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(y)) * self.up_proj(y))


class SmallLlama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens):
        return SimpleNamespace(logits=self.lm_head(self.layers(self.embed_tokens(tokens))))


def build(seed):
    torch.manual_seed(seed)
    if LlamaForCausalLM is None:
        return SmallLlama().eval().to(device)
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": BLOCKS}
    config = LlamaConfig(**sizes, num_attention_heads=HEADS, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval().to(device)


@torch.no_grad()
def logits(model):
    return model(tokens).logits


device = "cuda" if torch.cuda.is_available() else "cpu"
model = build(seed=0)
print(f"on {device}: {type(model).__name__}")
tokens = torch.arange(64, device=device)[None]
dense = logits(model)

report = quantize_linears(model)  # in place
print(report)
int6 = logits(model)
print(f"logits: relative error {((int6 - dense).norm() / dense.norm()).item():.1%}")

with TemporaryDirectory() as folder:
    path = Path(folder) / "int6.safetensors"
    save_quantized(model, path)
    loaded = load_quantized(build(seed=1), path)
    print(f"saved {path.stat().st_size:,} bytes; loaded, the same logits: {torch.equal(logits(loaded), int6)}")

report.undo()
print(f"undone, the dense logits: {torch.equal(logits(model), dense)}")
