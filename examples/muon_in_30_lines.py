"""Muon for the matrices of hidden layers, AdamW for the rest: a small network learns to add modulo 23."""

from collections import OrderedDict

import torch
from klora.model import Muon, split_parameters
from torch import nn

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
hidden = {"up": nn.Linear(128, 256), "relu": nn.ReLU(), "down": nn.Linear(256, 64)}
layers = {"embed": nn.Embedding(23, 64), "flatten": nn.Flatten(), **hidden, "head": nn.Linear(64, 23)}
model = nn.Sequential(OrderedDict(layers)).to(device)

# It knows embeddings by their class, and heads by their name or by get_output_embeddings().
matrices, rest = split_parameters(model)
optimizers = Muon(matrices, lr=0.02, momentum=0.95), torch.optim.AdamW(rest, lr=3e-3)
print(f"on {device}; Muon: {[tuple(p.shape) for p in matrices]}; AdamW: {[tuple(p.shape) for p in rest]}")
pairs = torch.cartesian_prod(torch.arange(23), torch.arange(23)).to(device)
for step in range(101):
    loss = nn.functional.cross_entropy(model(pairs), pairs.sum(1) % 23)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    if step % 25 == 0:
        print(f"step {step:3}: loss {loss.item():.4f}")
