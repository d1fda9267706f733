"""Int6Linear: a drop-in for nn.Linear whose weight is frozen at six bits."""

import torch
from torch import Tensor, nn

from .layout import LAYOUT, Int6Matrix, packed_shape, quantize_int6
from .op import Backend, int6_linear


class Int6Linear(nn.Module):
    """out = x W_hat^T + bias. Buffers: packed int32 tiles, scale fp16, and `layout`, the version of the tiles.

    `group_size` None is one scale a row, 32, 64 or 128 one for so many inputs. The bias is a parameter in `dtype`.
    `weight` is no parameter: what is not trained has no gradient and no optimizer state.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        group_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        scales = (out_features,) if group_size is None else (out_features, in_features // group_size)
        shape = packed_shape(out_features, in_features)
        self.register_buffer("packed", torch.zeros(shape, dtype=torch.int32, device=device))
        self.register_buffer("scale", torch.zeros(scales, dtype=torch.float16, device=device))
        self.register_buffer("layout", torch.tensor(LAYOUT, dtype=torch.int32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.backend: Backend | None = None

    @classmethod
    def from_matrix(cls, weight: Int6Matrix, bias: Tensor | None = None) -> "Int6Linear":
        """Around `weight` and `bias` as they are, without a copy."""
        linear = cls(weight.shape[1], weight.shape[0], False, weight.group_size, device="meta")
        linear.packed, linear.scale = weight.packed, weight.scale
        linear.layout = torch.tensor(LAYOUT, dtype=torch.int32, device=weight.packed.device)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        return linear

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int | None = None, clip: float = 0.11) -> "Int6Linear":
        """`linear` quantised on its device; its bias is shared."""
        return cls.from_matrix(quantize_int6(linear.weight.detach(), group_size, clip), linear.bias)

    @property
    def weight(self) -> Int6Matrix:
        return Int6Matrix(self.packed, self.scale, (self.out_features, self.in_features))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """w_hat [out_features, in_features]"""
        return self.weight.dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return int6_linear(x, self.weight, bias, self.backend)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn, recurse: bool = True):
        """Moves as any module, but a cast of the module (`.half()`, `.to(torch.bfloat16)`) leaves the scales fp16."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float16:
            self.scale = scale.to(self.scale.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        version = state_dict.get(f"{prefix}layout")
        if version is not None and int(version) != LAYOUT:
            raise ValueError(f"{prefix}packed has layout version {int(version)}; this klora reads {LAYOUT}: pack again")
        for name in ("packed", "scale"):
            tensor, own = state_dict.get(f"{prefix}{name}"), getattr(self, name)
            if tensor is not None and (tensor.shape != own.shape or tensor.dtype != own.dtype):
                found = f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"{prefix}{name} is {found}; this module takes {own.dtype} {list(own.shape)}")
        super()._load_from_state_dict(state_dict, prefix, *rest)
