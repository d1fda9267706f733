"""One kernel without the rest of klora: newton_schulz beside the same iteration in plain PyTorch.

    python one_kernel_alone.py

Newton-Schulz orthogonalises a matrix with products alone; Muon does it to every update. On a GPU klora takes all
matrices of the list in the same few launches. On a CPU both are PyTorch: the times there say nothing about the kernel.
"""

import sys

import torch
from klora.kernels import newton_schulz
from torch.utils.benchmark import Timer

A, B, C = 3.4445, -4.7750, 2.0315  # the coefficients of Muon, "jordan"


def plain(matrices):
    results = []
    for matrix in matrices:
        x = matrix.to(dtype)
        x = x.mT if x.size(0) > x.size(1) else x
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = A * x + (B * gram + C * (gram @ gram)) @ x
        results.append(x.mT if matrix.size(0) > matrix.size(1) else x)
    return results


torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype, width, blocks = (torch.bfloat16, 512, 10) if device == "cuda" else (torch.float32, 128, 4)
shapes = [(width, width), (width // 2, width), (3 * width, width), (width, 3 * width)] * blocks
matrices = [torch.randn(shape, device=device) for shape in shapes]

print(f"klora.model was imported: {'klora.model' in sys.modules}")
wide = matrices[1]  # a square matrix of noise has a singular value near 0, which five steps do not lift to 1
before, after = torch.linalg.svdvals(wide), torch.linalg.svdvals(newton_schulz(wide).float())
print(f"singular values of a {list(wide.shape)} matrix before: {before.min():.2f} to {before.max():.2f}")
print(f"and after: {after.min():.2f} to {after.max():.2f}")

pairs = zip(newton_schulz(matrices), plain(matrices), strict=True)
difference = max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)
print(f"largest relative difference between the two: {difference:.1e}")

print(f"on {device}: {len(matrices)} matrices of width {width} in {dtype}")
for name, function in (("plain PyTorch", plain), ("klora", newton_schulz)):
    timer = Timer("function(matrices)", globals={"function": function, "matrices": matrices})
    print(f"{name}: {timer.blocked_autorange(min_run_time=0.5).median * 1e3:.3f} ms")
