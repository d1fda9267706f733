"""Adam on a pool of adapters, one step counter and one learning rate a slot.

    m <- b1 m + (1-b1) g;   v <- b2 v + (1-b2) g^2;   t <- t + 1
    p <- p - lr * group_lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

params, grads, exp_avg, exp_avg_sq [slots, P] fp32, updated in place; step int [slots]; lr fp32 [slots]; group_lr [P]
multiplies the learning rate of each parameter (SPEC's multipliers of head, Q, K, V and bias). Kingma and Ba 2015.
`slots` int [n], without repeats, chooses the rows that take part; the others keep their bits. 28 bytes a parameter.
"""

import torch
from torch import Tensor


@torch.no_grad()
def lora_adam_ref_(
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    group_lr: Tensor,
    slots: Tensor | slice = slice(None),
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-10,
) -> None:
    """One Adam step of the chosen slots, in place."""
    beta1, beta2 = betas
    step[slots] += 1
    grad = grads[slots]
    mean = exp_avg[slots] * beta1 + grad * (1 - beta1)
    square = exp_avg_sq[slots] * beta2 + grad * grad * (1 - beta2)
    exp_avg[slots], exp_avg_sq[slots] = mean, square
    count = step[slots].to(params.dtype)[:, None]
    denominator = (square / (1 - beta2**count)).sqrt_().add_(eps)
    params[slots] -= lr[slots][:, None] * group_lr * (mean / (1 - beta1**count)) / denominator
