"""The reference, over PyTorch's SDPA backends.

    out_h = softmax(q_h K_g^T / sqrt(d), causal) V_g           head h reads key/value group g = h // (H / G)

q [B, S, H, d], k and v [B, S, G, d] -> [B, S, H, d]. 2*B*H*S^2*d FLOPs forward (half of the square is masked).
Documents side by side in a row are kept apart by `start` int32 [B, S], where each token's document starts: token i sees
start_i to i. The reference writes a mask [B, 1, S, S] for it.

A backend that was asked for by name and cannot run raises: nothing falls back in silence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..dispatch import custom_op, expect

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def is_grouped(q: Tensor, k: Tensor) -> bool:
    """Whether q [B, H, S, d] has other heads than k. A bool under torch.compile too, where sizes may be symbols."""
    return True if q.size(1) != k.size(1) else False  # noqa: SIM210


def document_starts(tokens: Tensor, bos: int) -> Tensor:
    """Where the document of each of `tokens` int [B, S] starts: the last `bos` up to it, else the row; int32 [B, S].

    Example: start = document_starts(tokens, bos=1)
    """
    position = torch.arange(tokens.size(1), dtype=torch.int32, device=tokens.device)
    return torch.where(tokens == bos, position, 0).cummax(1).values


@custom_op("klora::packed_starts", mutates_args=())
def _packed_starts_op(cu_seqlens: Tensor, total: int) -> Tensor:
    """An op of its own: PyTorch 2.11's Inductor searches a slice from the start of what it is a slice of."""
    token = torch.arange(total, dtype=torch.int32, device=cu_seqlens.device)
    return cu_seqlens[torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)]


_packed_starts_op.register_fake(lambda cu_seqlens, total: cu_seqlens.new_empty(total))


def packed_starts(cu_seqlens: Tensor, total: int) -> Tensor:
    """Where the document of each of `total` tokens starts: int32 [1, total], the `start` of causal_attention.

    `cu_seqlens` int32 [documents + 1] are the cumulative lengths of documents packed one after the other. Nothing waits
    for the GPU. ValueError: another shape or dtype.

    Example: start = packed_starts(torch.tensor([0, 3, 8], dtype=torch.int32), total=8)
    """
    expect("cu_seqlens", cu_seqlens, ("documents + 1",), (torch.int32,))
    if not cu_seqlens.numel():
        raise ValueError("cu_seqlens is empty; wanted int32 [documents + 1], which begins with 0")
    return _packed_starts_op(cu_seqlens, total)[None]


def check_cu_seqlens(cu_seqlens: Tensor, total: int) -> None:
    """Raise ValueError unless `cu_seqlens` int32 [documents + 1] begins with 0, never falls and ends within `total`.

    It reads the device: for debugging.

    Example: check_cu_seqlens(torch.tensor([0, 3, 8], dtype=torch.int32), total=8)
    """
    expect("cu_seqlens", cu_seqlens, ("documents + 1",), (torch.int32,))
    entries = cu_seqlens.tolist()
    if not entries or entries[0] or entries != sorted(entries) or entries[-1] > total:
        raise ValueError(
            f"cu_seqlens is {entries}; allowed: from 0 on, none below the one before, up to {total} tokens"
        )


def causal_attention_ref(q: Tensor, k: Tensor, v: Tensor, backend: str = "math", start: Tensor | None = None) -> Tensor:
    """Causal attention of `q` [B, Sq, H, d] over `k` and `v` [B, Sk, G, d] -> [B, Sq, H, d], of one float dtype.

    H is a multiple of G. Sq = Sk, or Sq = 1: one new token after a cache. `backend` is PyTorch's: "cudnn", "flash",
    "efficient" or "math". One token is a matrix-vector product, which cuDNN refuses and flash gains nothing at: it
    takes "math". With `start` [B, Sk], Sq = Sk, no token sees one of another document. Autograd gives the gradients of
    q, k and v.
    RuntimeError: the backend does not run these tensors.

    Example: out = causal_attention_ref(q, k, v)
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.size(2) == 1:
        backend = "math"
    mask = None
    if start is not None:
        key = torch.arange(k.size(2), device=q.device)
        mask = ((start[:, :, None] <= key) & (key <= key[:, None]))[:, None]
    is_causal = q.size(2) > 1 and mask is None
    with sdpa_kernel(BACKENDS[backend]):
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=is_grouped(q, k))
    return out.transpose(1, 2)
