"""Int6Linear: a drop-in for nn.Linear whose weight is frozen at six bits."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import LAYOUT, SCALE_DTYPES, Int6Matrix, from_layout_1, packed_shape, quantize_int6, scale_shapes
from .op import Backend, int6_linear
from .reference import GROUP_SIZES, GroupSize, is_group_size


@dataclass(frozen=True, eq=False)
class Int6LinearWeight(Int6Matrix):
    """What `Int6Linear.weight` is: an Int6Matrix with what models ask of a weight without computing with it.

    `F.linear(x, linear.weight, bias)` works and is `int6_linear`. Every other function of PyTorch, and every attribute
    that is not here, is an error that says what to do instead. PyTorch's own fused paths (nn.TransformerEncoderLayer)
    see `__torch_function__` and take their plain path.
    """

    dtype: torch.dtype = torch.float32
    """the module's: what a dense weight would have here"""

    requires_grad = False
    ndim = 2

    def size(self, dim: int | None = None) -> tuple[int, int] | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 2

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return int6_linear(*args, **{"x" if name == "input" else name: v for name, v in (kwargs or {}).items()})
        raise TypeError(f"{getattr(func, '__name__', func)} takes no weight of an Int6Linear: {_INSTEAD}")

    def __rmatmul__(self, other):  # a Tensor's `@` asks here once the above has refused
        raise TypeError(f"@ takes no weight of an Int6Linear: {_INSTEAD}")

    def __getattr__(self, name: str):
        raise AttributeError(f"the weight of an Int6Linear has no {name!r}: {_INSTEAD}")


_INSTEAD = (
    "it is packed at six bits. Call the module or F.linear, take .dequantize(dtype) for a dense copy, or leave this "
    "linear as it is (quantize_linears(..., keep=...))"
)


def take_layout_1(state: dict[str, Tensor], prefix: str, shape: tuple[int, int]) -> None:
    """Repack what `state` has below `prefix`, of a weight of `shape` (N, K), where that is of layout 1."""
    packed, version = state.get(f"{prefix}packed"), state.get(f"{prefix}layout")
    if packed is not None and version is not None and version.tolist() == 1:
        state[f"{prefix}packed"] = from_layout_1(packed, shape)
        state[f"{prefix}layout"] = torch.full_like(version, LAYOUT)


class Int6Linear(nn.Module):
    """out = x W_hat^T + bias, x [..., in_features] -> [..., out_features] in x's dtype: bfloat16, float16 or float32.

    Buffers: packed int32 tiles, scale fp16 or fp32, and `layout`, the version of the tiles. `group_size` None is one
    scale a row, 32, 64 or 128 one for so many inputs. The bias is a parameter in `dtype`. `weight` is no parameter:
    what is not trained has no gradient and no optimizer state. x and the bias get gradients. `dtype` is that of the
    weight that this stands for; casts of the module change it. Under autocast x is cast as nn.Linear would cast it.

    ValueError: a group size that does not divide in_features, a state dict of another layout, shape or dtype, or with a
    dense weight. A state dict may have other groups: the module takes them over. One of layout 1 is repacked.

    Example: out = Int6Linear.from_linear(torch.nn.Linear(64, 128))(x)
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
        if not is_group_size(group_size, in_features):
            allowed = f"{', '.join(map(str, GROUP_SIZES))} that divide in_features, or None for one scale a row"
            raise ValueError(f"group_size={group_size} with in_features={in_features}; allowed: {allowed}")
        self.in_features, self.out_features = in_features, out_features
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        scales = (out_features,) if group_size is None else (out_features, in_features // group_size)
        shape = packed_shape(out_features, in_features)
        self.register_buffer("packed", torch.zeros(shape, dtype=torch.int32, device=device))
        self.register_buffer("scale", torch.zeros(scales, dtype=torch.float16, device=device))
        self.register_buffer("layout", torch.tensor(LAYOUT, dtype=torch.int32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.backend: Backend | None = None

    @classmethod
    def from_matrix(
        cls, weight: Int6Matrix, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> "Int6Linear":
        """Around `weight` and `bias` as they are, without a copy; a bias that is a Parameter stays that Parameter.

        `dtype` is the bias's where it is left out, and the default dtype without a bias.
        """
        if dtype is None and bias is not None:
            dtype = bias.dtype
        linear = cls(weight.shape[1], weight.shape[0], False, weight.group_size, device="meta", dtype=dtype)
        linear.packed, linear.scale = weight.packed, weight.scale
        linear.layout = torch.tensor(LAYOUT, dtype=torch.int32, device=weight.packed.device)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        linear.bias = bias
        return linear

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        group_size: GroupSize = "auto",
        clip: float | None = None,
        second_moment: Tensor | None = None,
    ) -> "Int6Linear":
        """`linear` quantised on its device by :func:`quantize_int6`, in its mode; its bias is the same Parameter.

        A linear on "meta" gives an Int6Linear on "meta", for weights that are loaded later and bring their groups.
        """
        if linear.weight.is_meta:
            rows, columns = linear.weight.shape
            groups = None if group_size == "auto" else group_size
            made = cls(columns, rows, False, groups, device="meta", dtype=linear.weight.dtype)
            made.bias = linear.bias
        else:
            matrix = quantize_int6(linear.weight, group_size, clip, second_moment)
            made = cls.from_matrix(matrix, linear.bias, linear.weight.dtype)
        return made.train(linear.training)

    @property
    def weight(self) -> Int6LinearWeight:
        return Int6LinearWeight(self.packed, self.scale, (self.out_features, self.in_features), dtype=self.dtype)

    @property
    def matrix(self) -> Int6Matrix:
        """The weight as the op takes it."""
        return Int6Matrix(self.packed, self.scale, (self.out_features, self.in_features))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """w_hat [out_features, in_features]"""
        return self.weight.dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return int6_linear(x, self.matrix, bias, backend=self.backend)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn, recurse: bool = True):
        """Moves as any module, but a cast of the module (`.half()`, `.to(torch.bfloat16)`) leaves the scales."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scale.device)).dtype
        return self

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        if f"{prefix}weight" in state_dict:
            instead = "load the dense weights first and quantise then"
            raise ValueError(f"{prefix}weight is a dense weight and this module holds six bits; {instead}")
        take_layout_1(state_dict, prefix, (self.out_features, self.in_features))
        version = state_dict.get(f"{prefix}layout")
        if version is not None and int(version) != LAYOUT:
            raise ValueError(f"{prefix}packed has layout version {int(version)}; this klora reads {LAYOUT}: pack again")
        scales = scale_shapes(self.out_features, self.in_features)
        for name, dtypes, shapes in (
            ("packed", (torch.int32,), [tuple(self.packed.shape)]),
            ("scale", SCALE_DTYPES, scales),
        ):
            tensor, own = state_dict.get(f"{prefix}{name}"), getattr(self, name)
            if tensor is not None and (tuple(tensor.shape) not in shapes or tensor.dtype not in dtypes):
                found = f"{tensor.dtype} {list(tensor.shape)}"
                allowed = f"{' or '.join(map(str, dtypes))} {' or '.join(str(list(shape)) for shape in shapes)}"
                raise ValueError(f"{prefix}{name} is {found}; this module takes {allowed}")
            if tensor is not None and (tensor.dtype, tensor.shape) != (own.dtype, own.shape):
                setattr(self, name, own.new_empty(tensor.shape, dtype=tensor.dtype))
        super()._load_from_state_dict(state_dict, prefix, *rest)
