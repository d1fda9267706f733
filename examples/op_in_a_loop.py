"""One op in an ordinary PyTorch training loop: a squared-ReLU MLP learns what another one computes.

    python op_in_a_loop.py

`relu_squared_mlp(x, up, down)` is W2 relu(W1 x)^2 with gradients. CUDA tensors take the Triton kernels, CPU tensors the
reference in PyTorch.
"""

import torch
from klora.kernels import relu_squared_mlp, relu_squared_mlp_ref
from torch import nn

WIDTH, HIDDEN, BATCH, STEPS = 64, 256, 512, 100


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(HIDDEN, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(WIDTH, HIDDEN) / HIDDEN**0.5)

    def forward(self, x):  # [BATCH, WIDTH] -> [BATCH, WIDTH]
        return relu_squared_mlp(x, self.up, self.down)


def relative_error(x, exact):
    return ((x.double() - exact).norm() / exact.norm()).item()


torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
student, teacher = MLP().to(device), MLP().to(device).requires_grad_(False)
optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
for step in range(STEPS):
    x = torch.randn(BATCH, WIDTH, device=device)
    loss = (student(x) - teacher(x)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step in (0, STEPS - 1):
        print(f"step {step + 1:3}: loss {loss.item():.4f}")

with torch.no_grad():
    inputs = x, student.up, student.down
    exact = relu_squared_mlp_ref(*(tensor.double() for tensor in inputs))
    op, reference = relu_squared_mlp(*inputs), relu_squared_mlp_ref(*inputs)
print(f"on {device}, relative error against float64:", end=" ")
print(f"op {relative_error(op, exact):.1e}, reference {relative_error(reference, exact):.1e}")
