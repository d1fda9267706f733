"""The oracle of adapting: one document alone, chunk by chunk, with windows, loss and Adam written out.

It takes the model's forward, the adapter's layout and the learning rate from the product, and nothing else. Batches,
slots, schedules and graphs have no part in it. Adapters are float64 for a float64 model and fp32 for others.
"""

import numpy as np
import torch
from klora.ttt.adapters import AdapterLayout
from klora.ttt.protocols import learning_rate
from klora.ttt.results import Adapted


def token_nll(model, document, config, initial=None) -> list[np.ndarray]:
    """NLL [targets] of the document in each pass; `initial` [size] is the adapter it starts from, if another one."""
    device, dtype = model.embed.device, torch.float64 if model.dtype == torch.float64 else torch.float32
    layout = AdapterLayout(model.config, config)
    initial = layout.initial(config.adapter_seed).to(device, dtype) if initial is None else initial
    params = [initial[p.start : p.stop].view(1, *p.shape).clone().requires_grad_() for p in layout.parts]
    factors = [_rows(p, p.group_lr * p.scale).to(device, dtype) for p in layout.parts]
    decays = [config.weight_decay * _rows(p, p.group_lr).to(device, dtype) for p in layout.parts]
    moments = [(torch.zeros_like(param), torch.zeros_like(param)) for param in params]
    state = list(zip(params, factors, decays, moments, strict=True))
    tokens = torch.from_numpy(document.tokens.astype(np.int64)).to(device)
    chunks, taken, passes = -(-document.targets // config.chunk), 0, []
    for _ in range(config.passes):
        found = []
        for j in range(chunks):
            trains = j + 1 < chunks and j >= config.trained_from
            for step in range(config.steps_per_chunk if trains else 1):
                with torch.set_grad_enabled(trains):
                    nll = chunk_nll(model, layout, params, tokens, j, config)
                if step == 0:
                    found.append(nll.detach())
                if trains:
                    gradients = torch.autograd.grad(nll.mean(), params)
                    lr = learning_rate(config, torch.tensor([taken]), torch.tensor([chunks])).item()
                    taken += 1
                    for gradient, (param, factor, decay, (mean, square)) in zip(gradients, state, strict=True):
                        mean.mul_(config.beta1).add_(gradient, alpha=1 - config.beta1)
                        square.mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
                        denominator = (square / (1 - config.beta2**taken)).sqrt() + config.eps
                        param.data -= lr * decay * param.data
                        param.data -= lr * factor * (mean / (1 - config.beta1**taken)) / denominator
        passes.append(torch.cat(found).cpu().numpy() if found else np.zeros(0))
    return passes


def adapt(model, documents, config) -> Adapted:
    """The nats and the NLL of each document in the pass that counts."""
    found = [token_nll(model, document, config) for document in documents]
    totals = np.array([[nll.sum(dtype=np.float64) for nll in passes] for passes in found])
    kept = totals.argmin(1) if config.protocol == "min_nll" else np.full(len(documents), config.passes - 1)
    targets = np.array([document.targets for document in documents])
    nats = totals[np.arange(len(documents)), kept]
    nll = [passes[row] for passes, row in zip(found, kept, strict=True)]
    return Adapted(nats, targets, kept, ~np.isfinite(nats), nll)


def _rows(part, factors):
    """One factor, or one for each row of the part's first dimension, beside [1, *shape]."""
    return factors.view(1, -1, *[1] * (len(part.shape) - 1))


def chunk_nll(model, layout, params, tokens, j: int, config):
    """NLL of chunk j's targets, inside a window that ends with it, or where it would end were it whole."""
    first, whole = j * config.chunk, (j + 1) * config.chunk
    end, from_start = min(whole, len(tokens) - 1), config.layout == "start"
    start = max(0, (whole if from_start else end) - config.window)
    temperature = 1.0 if from_start and j <= config.trained_from else config.temperature
    adapters, head = layout.adapters(None, params)
    window = tokens[None, start:end]
    hidden = model.hidden(window, adapters, rotary_length=config.window, backend="reference")
    hidden = hidden[0, first - start :]
    z = hidden @ model.embed.to(hidden.dtype).T
    if head is not None:
        z = z + hidden @ head.a[0].to(hidden.dtype).T @ head.b[0].to(hidden.dtype).T
    cap = model.config.softcap
    logits = (cap * torch.tanh(z / cap) if cap else z) / temperature
    return -logits.log_softmax(-1).gather(1, tokens[first + 1 : end + 1, None])[:, 0]
