"""The reference, over PyTorch's SDPA backends.

    out_h = softmax(q_h K_g^T / sqrt(d), causal) V_g           head h reads key/value group g = h // (H / G)

q [B, S, H, d], k and v [B, S, G, d] -> [B, S, H, d]. 2*B*H*S^2*d FLOPs forward (half of the square is masked).
A backend that was asked for by name and cannot run raises: nothing falls back in silence.
"""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def causal_attention_ref(q: Tensor, k: Tensor, v: Tensor, backend: str = "math") -> Tensor:
    """Causal attention of `q` [B, Sq, H, d] over `k` and `v` [B, Sk, G, d] -> [B, Sq, H, d], of one float dtype.

    H is a multiple of G. Sq = Sk, or Sq = 1: one new token after a cache. `backend` is PyTorch's: "cudnn", "flash",
    "efficient" or "math". One token is a matrix-vector product, which cuDNN refuses and flash gains nothing at: it
    takes "math". Autograd gives the gradients of q, k and v.
    RuntimeError: the backend does not run these tensors.

    Example: out = causal_attention_ref(q, k, v)
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.size(2) == 1:
        backend = "math"
    with sdpa_kernel(BACKENDS[backend]):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1, enable_gqa=q.size(1) != k.size(1))
    return out.transpose(1, 2)
