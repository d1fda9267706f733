"""Configs and launchers: what the kernels need of tensors, blocks and memory."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dispatch import aligned
from ..linear.product import FACTORS, launch_product
from . import turns
from .backward import adapter_gradient, hidden_gradient, scale_rows
from .forward import sweep
from .reference import NO_SOFTCAP

LARGEST_LOGIT = 60.0
"""Up to this softcap / temperature, V * exp(logit) is far from the limits of fp32, and no maximum has to be tracked."""


@dataclass(frozen=True)
class Tile:
    """Blocks of one kernel: two of the product it computes, one of what is summed over."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class LoraHeadNllConfig:
    """m, n and k are tokens, vocabulary and width in `sweep` (which keeps E) and `score` (which does not); tokens,
    width and vocabulary in `hidden`; columns, rank and tokens in `adapter`, whose n is not chosen."""

    sweep: Tile
    score: Tile
    hidden: Tile
    adapter: Tile


def pick_config(dtype: torch.dtype, rank: int) -> LoraHeadNllConfig:
    """Blocks for h of this dtype and adapters of this rank, 0 without.

    Milliseconds: bf16, B=64, S=256, D=512, V=1024, R=16, one NVIDIA H200, L2-warm, each kernel alone in a CUDA graph;
    those of the two sweeps are of an arithmetic with seven more instructions a logit.
    """
    if dtype == torch.float32:
        # Not tuned: small enough that nothing spills at rank 16. The sum over the vocabulary is made of blocks of 16,
        # each formed by itself: with 32, dh's error was 1.12 times PyTorch's at V=77, D=80 (NVIDIA H100).
        return LoraHeadNllConfig(
            sweep=Tile(32, 64, 32, 4, 2),
            score=Tile(32, 64, 32, 4, 2),
            hidden=Tile(32, 64, 16, 4, 2),
            adapter=Tile(64, 0, 32, 4, 2),
        )
    return LoraHeadNllConfig(
        # 0.062; two blocks an SM, one computing while the other exponentiates. 128x128 on 8 warps, one block: 0.074;
        # 128x256 on 8 warps, which spills: 0.063; 64x64: 0.078.
        # Without adapters, 98,304 rows on an NVIDIA H200: 0.275, with 3 stages 0.315, 5 stages 0.383.
        sweep=Tile(64, 128, 64, 4, 3 if rank else 4),
        # 0.048; 64x128 on 4 warps 0.051; 128x128 on 8 warps 0.054.
        score=Tile(128, 256, 64, 8, 3),
        # 0.031; 128x256 on 8 warps 0.032. cuBLAS's E W, without the adapter and the row factor: 0.025.
        # Ranks above 64 would spill 140 to 350 bytes in either of these two tiles.
        hidden=Tile(128, 128, 64, 4 if rank <= 64 else 8, 3),
        # 0.0175; 128 columns and 64 tokens 0.0181; 64 and 64 0.0191; 128 and 128 0.0184.
        adapter=Tile(64, 0, 128 if rank <= 64 else 64, 4, 2),
    )


def outputs(h: Tensor, weight: Tensor, lora_a: Tensor | None, keep: bool) -> tuple[Tensor, ...]:
    """Empty tensors: nll [B, S], the logsumexp in two terms [2, B, S], E [B, S, V], u and E B [B, S, padded R]."""
    rows = h.shape[:2]
    nll, lse = (h.new_empty(size, dtype=torch.float32) for size in (rows, (2, *rows)))
    if not keep:
        return nll, lse, *(h.new_empty(0) for _ in range(3))
    rank = 0 if lora_a is None else max(16, triton.next_power_of_2(lora_a.size(1)))
    # A row of E starts on 16 bytes: tensor descriptors want it.
    e = h.new_empty(*rows, triton.cdiv(weight.size(0), 8) * 8)[..., : weight.size(0)]
    return nll, lse, e, *(h.new_empty((*rows, rank), dtype=torch.float32) for _ in range(2))


@dataclass(frozen=True)
class Head:
    """The arguments that every launch shares; h [B, S, D]."""

    h: Tensor
    weight: Tensor
    lora_a: Tensor | None
    lora_b: Tensor | None
    slots: Tensor | None
    targets: Tensor
    softcap: float
    temperature: float

    @property
    def is_capped(self) -> bool:
        return self.softcap < NO_SOFTCAP

    @property
    def is_bounded(self) -> bool:
        """Whether exp(logit) can be summed as it is, by the quicker arithmetic for 16-bit inputs."""
        return self.h.dtype != torch.float32 and self.softcap / self.temperature <= LARGEST_LOGIT

    @property
    def is_normalised(self) -> bool:
        """Whether E has to be the gradient of nll itself: where the range of its dtype does not hold exp(logit)."""
        return self.h.dtype == torch.float16 or not self.is_bounded

    @property
    def rank(self) -> int:
        return 0 if self.lora_a is None else self.lora_a.size(1)

    @property
    def constants(self) -> dict:
        return {
            "DTYPE": getattr(triton.language, str(self.h.dtype).removeprefix("torch.")),
            "V": self.weight.size(0),
            "D": self.weight.size(1),
            "RANK": self.rank,
            "RANK_PADDED": max(16, triton.next_power_of_2(self.rank)),
        }

    def strides(self, a: Tensor | None, b: Tensor | None) -> tuple[int, int]:
        return (0, 0) if a is None else (a.stride(0), b.stride(0))

    @property
    def pool(self) -> int:
        return 0 if self.lora_a is None else self.lora_a.size(0)

    def forward(self, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """nll, logsumexp, and for the gradients E [B, S, V], u [B, S, R] and E B (empty without `keep`)."""
        nll, lse, e, u, du = outputs(self.h, self.weight, self.lora_a, keep)
        if nll.numel():
            normalise = keep and self.is_normalised
            # Slots ask for bits that do not depend on the rest of the batch, with adapters or without.
            is_plain = not self.rank and self.slots is None and self.is_capped
            if keep and not normalise and is_plain and turns.takes(self.h):
                turns.launch_sweep(self.h, self.weight, self.targets, nll, lse, e, self.softcap, self.temperature)
                return nll, lse, e, u, du
            self._sweep(nll, lse, e, u, du, keep=keep and not normalise, has_lse=False)
            if normalise:
                self._sweep(nll, lse, e, u, du, keep=True, has_lse=True)
        return nll, lse, e, u, du

    def _sweep(self, nll: Tensor, lse: Tensor, e: Tensor, u: Tensor, du: Tensor, keep: bool, has_lse: bool) -> None:
        config = pick_config(self.h.dtype, self.rank)
        tile = config.sweep if keep else config.score
        batch, tokens, width = self.h.shape
        sweep[triton.cdiv(tokens, tile.m), batch](
            TensorDescriptor.from_tensor(self.h, [1, tile.m, tile.k]),
            TensorDescriptor.from_tensor(self.weight, [tile.n, tile.k]),
            self.lora_a,
            self.lora_b,
            self.slots,
            self.targets,
            nll,
            *lse,
            e,
            u,
            du,
            tokens,
            width,
            e.stride(-2) if keep else 0,
            self.pool,
            *self.strides(self.lora_a, self.lora_b),
            self.softcap if self.is_capped else 1.0,
            (self.softcap if self.is_capped else 1.0) / self.temperature,
            1 / self.temperature,
            **self.constants,
            KEEP=keep,
            HAS_LSE=has_lse,
            BOUNDED=self.is_bounded,
            CAPPED=self.is_capped,
            BLOCK_S=tile.m,
            BLOCK_V=tile.n,
            BLOCK_D=tile.k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    def hidden_gradient(self, dnll: Tensor, lse: Tensor, e: Tensor, du: Tensor) -> Tensor:
        tile = pick_config(self.h.dtype, self.rank).hidden
        batch, tokens, width = self.h.shape
        dh = torch.empty(batch, tokens, width, dtype=self.h.dtype, device=self.h.device)
        hidden_gradient[triton.cdiv(width, tile.n), triton.cdiv(tokens, tile.m), batch](
            TensorDescriptor.from_tensor(e, [1, tile.m, tile.k]),
            TensorDescriptor.from_tensor(self.weight, [tile.k, tile.n]),
            self.lora_a,
            self.slots,
            dnll,
            None if self.is_normalised else lse[0],
            du,
            dh,
            tokens,
            self.pool,
            self.strides(self.lora_a, self.lora_b)[0],
            **self.constants,
            BLOCK_S=tile.m,
            BLOCK_D=tile.n,
            BLOCK_V=tile.k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        return dh

    def adapter_gradient(
        self, dnll: Tensor, lse: Tensor, e: Tensor, u: Tensor, du: Tensor, da: Tensor, db: Tensor, fill: bool
    ) -> None:
        """Write dA [slots, R, D] and dB [slots, V, R]; with `fill` also the zeros of slots that no row names."""
        tile = pick_config(self.h.dtype, self.rank).adapter
        (batch, tokens, width), vocabulary = self.h.shape, self.weight.size(0)
        adapter_gradient[triton.cdiv(vocabulary, tile.m) + triton.cdiv(width, tile.m), self.pool](
            self.h,
            e,
            u,
            du,
            self.slots,
            dnll,
            None if self.is_normalised else lse[0],
            da,
            db,
            batch,
            tokens,
            self.h.stride(0),
            self.h.stride(1),
            e.stride(-2),
            *self.strides(da, db),
            **self.constants,
            ROWS=triton.next_power_of_2(batch),
            FILL=fill,
            BLOCK_S=tile.k,
            BLOCK_N=tile.m,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    def plain_gradients(self, dnll: Tensor, lse: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """dh [B, S, D] and dweight [V, D] of a head without adapters."""
        rows, width = self.h.shape[:2].numel(), self.h.size(2)
        scaled, block = self.h.new_empty(rows, width), max(1, 2048 // triton.next_power_of_2(width))
        factors = self.h.new_empty(rows, dtype=torch.float32)
        scale_rows[(triton.cdiv(rows, block),)](
            self.h.contiguous(),
            dnll,
            None if self.is_normalised else lse[0],
            scaled,
            factors,
            rows,
            D=width,
            N=triton.next_power_of_2(width),
            BLOCK=block,
            num_warps=4,
        )
        e = e.flatten(0, 1)
        dh = launch_product(e, self.weight, transposed=True, epilogue=FACTORS, factors=factors)
        return dh.view(self.h.shape), e.T @ scaled


def launchable(h, weight, lora_a, lora_b, slots, targets, softcap: float, temperature: float) -> Head:
    """The head with every tensor in a layout that the kernels take, copied only where it is in none."""
    h, weight = aligned(h), aligned(weight)
    lora_a, lora_b = (t if t is None or is_packed(t) else t.contiguous() for t in (lora_a, lora_b))
    slots = None if slots is None else slots.contiguous()
    return Head(h, weight, lora_a, lora_b, slots, targets.contiguous(), softcap, temperature)


def is_packed(t: Tensor) -> bool:
    """Whether each slot's matrix is contiguous; slots may lie any number of elements apart."""
    return t[:1].is_contiguous()
