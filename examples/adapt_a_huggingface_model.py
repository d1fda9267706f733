"""Adapt a Hugging Face model to each document while it reads it, many documents side by side.

    python adapt_a_huggingface_model.py

The Llama is tiny and trained for a few seconds; with a folder of your own it is AutoModelForCausalLM.from_pretrained.
Every document repeats a few names that no other document has, so there is something to learn while reading it. A chunk
is scored before the adapter learns from it: the adapted bits per byte are a valid score.
"""

import random

import torch
from klora.ttt import adapt_hf, ttt_preset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STEPS, ROWS, LENGTH = 80, 4, 128
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def text(seed, sentences=60):
    """Sentences about five people with names of six random letters."""
    draw = random.Random(seed)
    names = ["".join(draw.choices(LETTERS, k=6)).capitalize() for _ in range(5)]
    verbs = ["meets", "calls", "asks", "follows", "thanks", "remembers"]
    return "".join(f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(names)}.\n" for _ in range(sentences))


torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
texts = [text(seed) for seed in range(100)]

bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
bpe.train_from_iterator(
    texts,
    trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    ),
)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, tie_word_embeddings=True)).to(device)
stream = torch.tensor([token for text in texts for token in [tokenizer.eos_token_id, *tokenizer.encode(text)]])
optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
for step in range(STEPS):
    starts = torch.randint(len(stream) - LENGTH, (ROWS, 1))
    rows = stream[starts + torch.arange(LENGTH)].to(device)
    loss = model(rows, labels=rows).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, STEPS - 1):
        print(f"on {device}: step {step + 1}, loss {loss.item():.3f} nats per token")

config = ttt_preset("hf").override({"chunk": 64, "window": 256, "lr": 0.005, "lora_rank": 4})
unseen = [text(seed) for seed in range(1000, 1008)]
result = adapt_hf(model, tokenizer, unseen, config)

totals = result.totals()
print(
    f"{totals['documents']} unseen documents: {totals['base_bpb']:.4f} bits per byte, adapted "
    f"{totals['adapted_bpb']:.4f} ({config.protocol}); valid: {not result.why_not_valid}"
)
for one in result.documents:
    print(f"document {one.name}, {one.tokens:,} tokens: {one.base_bpb:.4f} -> {one.adapted_bpb:.4f}")
