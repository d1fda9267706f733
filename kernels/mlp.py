"""Squared-ReLU MLP: out = W2 relu(W1 x)^2.

x [..., D], up (W1) [hidden, D], down (W2) [D, hidden] -> [..., D], all of one dtype. 4 * D * hidden FLOPs a row.
"""

import torch.nn.functional as F
from torch import Tensor


def relu_squared_mlp_ref(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """W2 relu(W1 x)^2, products accumulated in fp32 by the GEMM."""
    return F.linear(F.relu(F.linear(x, up)).square(), down)
