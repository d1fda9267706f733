"""Train a small model, load it, score unseen documents, then score them while it adapts to each.

    python score_and_adapt.py

Every generated document repeats a few names that no other document has, so there is something to learn while reading
it. The protocol is `score_first`: a chunk is scored before the adapter learns from it, so the adapted bits
per byte are a valid score.
"""

import random
from pathlib import Path
from tempfile import TemporaryDirectory

import klora
import numpy as np
import torch
from klora.model import GPT, Muon, Tokenizer, preset, save_artifact, split_parameters

STEPS, ROWS, LENGTH = 60, 4, 128
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def document(seed, sentences=80):
    """Sentences about five people with names of six random letters."""
    draw = random.Random(seed)
    names = ["".join(draw.choices(LETTERS, k=6)).capitalize() for _ in range(5)]
    verbs = ["meets", "calls", "asks", "follows", "thanks", "remembers"]
    times = ["today", "at noon", "in the evening", "once more"]
    return "".join(
        f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(names)} {draw.choice(times)}.\n"
        for _ in range(sentences)
    )


torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
texts = [document(seed) for seed in range(100)]
unseen = {f"document {seed}": document(seed) for seed in range(1000, 1003)}

tokenizer = Tokenizer.train(texts, vocab_size=512)
stream = torch.from_numpy(np.concatenate([tokenizer.encode(text) for text in texts]).astype(np.int64))
config = preset("tiny").override({"vocab_size": tokenizer.vocab_size}).model
model = GPT(config)
model.configure(device, torch.bfloat16 if device.type == "cuda" else torch.float32)  # picks the kernels on a GPU
matrices, rest = split_parameters(model)
optimizers = Muon(matrices, lr=0.02, momentum=0.95), torch.optim.AdamW(rest, lr=0.01)
for step in range(STEPS):
    starts = torch.randint(len(stream) - LENGTH, (ROWS, 1))
    rows = stream[starts + torch.arange(LENGTH + 1)].to(device)
    loss = model.nll(rows[:, :-1], rows[:, 1:]).mean()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    if step in (0, STEPS - 1):
        print(f"step {step + 1}: loss {loss.item():.3f} nats per token")

with TemporaryDirectory() as folder:
    path = Path(folder) / "names.klora"
    summary = save_artifact(path, model.state_dict(), config, tokenizer.to_bytes(), provenance={"made by": __file__})
    lm = klora.load(path)
print(f"on {lm.device.type}: an artifact of {summary.bytes:,} bytes, matrices at six bits; {lm}")

base = lm.score(unseen).totals()["base_bpb"]
adapted = lm.adapt(unseen)
print(f"unseen documents: {base:.4f} bits per byte, adapted {adapted.totals()['adapted_bpb']:.4f} (score_first)")
for one in adapted.documents:
    print(f"{one.name}, {one.tokens:,} tokens: {one.base_bpb:.4f} -> {one.adapted_bpb:.4f}")
