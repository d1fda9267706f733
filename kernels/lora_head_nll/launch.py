"""Configs and launchers: what the kernels need of tensors, blocks and memory."""

import functools
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from ..dispatch import DTYPES, aligned, cdiv, empty_aligned, is_packed, next_power_of_2, padded_rank
from ..linear.product import FACTORS, launch_product
from ..tile import tiled
from . import turns
from .backward import adapter_gradient, hidden_gradient, scale_rows
from .forward import sweep
from .reference import NO_SOFTCAP

IN_TRITON = {dtype: getattr(tl, str(dtype).split(".")[1]) for dtype in DTYPES}

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


@functools.cache
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


def empty_outputs(h: Tensor, weight: Tensor, lora_a: Tensor | None, keep: bool) -> tuple[Tensor, ...]:
    """Empty tensors: nll [B, S], the logsumexp in two terms [2, B, S], E [B, S, V], u and E B [B, S, padded R]."""
    batch, tokens, _ = h.shape
    fp32 = {"dtype": torch.float32}
    nll, lse = h.new_empty(batch, tokens, **fp32), h.new_empty(2, batch, tokens, **fp32)
    if not keep:
        return nll, lse, h.new_empty(0), h.new_empty(0), h.new_empty(0)
    rank = 0 if lora_a is None else padded_rank(lora_a.size(1))
    e = empty_aligned(h, batch, tokens, weight.size(0))
    return nll, lse, e, h.new_empty(batch, tokens, rank, **fp32), h.new_empty(batch, tokens, rank, **fp32)


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

    @classmethod
    def of(cls, h, weight, lora_a, lora_b, slots, targets, softcap: float, temperature: float) -> "Head":
        """Every tensor in a layout that the kernels take, copied only where it is in none."""
        lora_a, lora_b = (t if t is None or is_packed(t) else t.contiguous() for t in (lora_a, lora_b))
        slots = None if slots is None else slots.contiguous()
        return cls(aligned(h), aligned(weight), lora_a, lora_b, slots, targets.contiguous(), softcap, temperature)

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
    def pool(self) -> int:
        return 0 if self.lora_a is None else self.lora_a.size(0)

    def shared(self, tile: Tile) -> dict:
        """What the kernels over h and the vocabulary take alike."""
        return dict(
            slots_ptr=self.slots, S=self.h.size(1), DTYPE=IN_TRITON[self.h.dtype],
            V=self.weight.size(0), D=self.weight.size(1), RANK=self.rank, RANK_PADDED=padded_rank(max(1, self.rank)),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    def forward(self, outputs: tuple[Tensor, ...], keep: bool) -> None:
        """Write `outputs`, as of :func:`empty_outputs`; with `keep` those that the gradients want too."""
        nll, lse, e, u, du = outputs
        if not nll.numel():
            return
        normalise = keep and self.is_normalised
        # Slots ask for bits that do not depend on the rest of the batch, with adapters or without.
        is_plain = not self.rank and self.slots is None and self.is_capped
        if keep and not normalise and is_plain and turns.takes(self.h):
            turns.launch_sweep(self.h, self.weight, self.targets, nll, lse, e, self.softcap, self.temperature)
            return
        self._sweep(nll, lse, e, u, du, keep=keep and not normalise, has_lse=False)
        if normalise:
            self._sweep(nll, lse, e, u, du, keep=True, has_lse=True)

    def _sweep(self, nll: Tensor, lse: Tensor, e: Tensor, u: Tensor, du: Tensor, keep: bool, has_lse: bool) -> None:
        config = pick_config(self.h.dtype, self.rank)
        tile = config.sweep if keep else config.score
        batch, tokens, width = self.h.shape
        a, b, softcap = self.lora_a, self.lora_b, self.softcap if self.is_capped else 1.0
        sweep[(cdiv(tokens, tile.m) * batch,)](
            h_desc=tiled(self.h, 1, tile.m, tile.k), weight_desc=tiled(self.weight, tile.n, tile.k),
            lora_a_ptr=a, lora_b_ptr=b, targets_ptr=self.targets, nll_ptr=nll, lse_ptr=lse[0], top_ptr=lse[1],
            e_ptr=e, u_ptr=u, du_ptr=du, width=width, stride_e=e.stride(-2) if keep else 0, slots=self.pool,
            stride_a=0 if a is None else a.stride(0), stride_b=0 if b is None else b.stride(0),
            softcap=softcap, gain=softcap / self.temperature, scale=1 / self.temperature,
            KEEP=keep, HAS_LSE=has_lse, BOUNDED=self.is_bounded, CAPPED=self.is_capped,
            BLOCK_S=tile.m, BLOCK_V=tile.n, BLOCK_D=tile.k, **self.shared(tile),
        )  # fmt: skip

    def backward(
        self,
        dnll: Tensor,
        lse: Tensor,
        e: Tensor,
        u: Tensor,
        du: Tensor,
        dh: Tensor,
        dweight: Tensor | None,
        dlora_a: Tensor | None,
        dlora_b: Tensor | None,
        fill: bool,
    ) -> None:
        """Write dh [B, S, D], and what else is given; with `fill` also zeros for the slots that no row names."""
        dnll = dnll.contiguous()
        if not self.h.numel():
            for grad in (dweight, dlora_a, dlora_b) if fill else ():
                if grad is not None:
                    grad.zero_()
            return
        row_lse = None if self.is_normalised else lse[0]
        if self.lora_a is not None:
            self._adapter_gradient(dnll, row_lse, e, u, du, dlora_a, dlora_b, fill)
        if dweight is not None:
            scaled, factors = self._scaled_rows(dnll, row_lse)
            torch.mm(e.flatten(0, 1).T, scaled, out=dweight)
            if self.lora_a is None:
                launch_product(
                    e.flatten(0, 1), self.weight, transposed=True, epilogue=FACTORS, factors=factors,
                    result=dh.view(scaled.shape),
                )  # fmt: skip
                return
        self._hidden_gradient(dnll, row_lse, e, du, dh)

    def _hidden_gradient(self, dnll: Tensor, lse: Tensor | None, e: Tensor, du: Tensor, dh: Tensor) -> None:
        tile = pick_config(self.h.dtype, self.rank).hidden
        batch, tokens, width = self.h.shape
        hidden_gradient[(cdiv(width, tile.n) * cdiv(tokens, tile.m) * batch,)](
            e_desc=tiled(e, 1, tile.m, tile.k), weight_desc=tiled(self.weight, tile.k, tile.n),
            lora_a_ptr=self.lora_a, dnll_ptr=dnll, lse_ptr=lse, du_ptr=du, dh_ptr=dh, slots=self.pool,
            stride_a=0 if self.lora_a is None else self.lora_a.stride(0),
            BLOCK_S=tile.m, BLOCK_D=tile.n, BLOCK_V=tile.k, **self.shared(tile),
        )  # fmt: skip

    def _adapter_gradient(
        self, dnll: Tensor, lse: Tensor | None, e: Tensor, u: Tensor, du: Tensor, da: Tensor, db: Tensor, fill: bool
    ) -> None:
        """dA [slots, R, D] and dB [slots, V, R]."""
        tile = pick_config(self.h.dtype, self.rank).adapter
        (batch, _, width), vocabulary = self.h.shape, self.weight.size(0)
        adapter_gradient[((cdiv(vocabulary, tile.m) + cdiv(width, tile.m)) * self.pool,)](
            h_ptr=self.h, e_ptr=e, u_ptr=u, du_ptr=du, dnll_ptr=dnll, lse_ptr=lse, da_ptr=da, db_ptr=db, B=batch,
            stride_hb=self.h.stride(0), stride_hs=self.h.stride(1), stride_e=e.stride(-2), stride_da=da.stride(0),
            stride_db=db.stride(0), ROWS=next_power_of_2(batch), FILL=fill, BLOCK_S=tile.k, BLOCK_N=tile.m,
            **self.shared(tile),
        )  # fmt: skip

    def _scaled_rows(self, dnll: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor]:
        """h times the factors of E's rows [B S, D], and these factors."""
        rows, width = self.h.shape[:2].numel(), self.h.size(2)
        scaled, factors = self.h.new_empty(rows, width), self.h.new_empty(rows, dtype=torch.float32)
        padded = next_power_of_2(width)
        block = max(1, 2048 // padded)
        scale_rows[(cdiv(rows, block),)](
            h_ptr=self.h.contiguous(), dnll_ptr=dnll, lse_ptr=lse, out_ptr=scaled, factors_ptr=factors, rows=rows,
            D=width, N=padded, BLOCK=block, num_warps=4,
        )  # fmt: skip
        return scaled, factors
