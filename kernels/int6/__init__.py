"""int6: weights at six bits, their quantiser, two packed layouts, and a linear that reads them."""

from typing import TYPE_CHECKING

from ...lazy import lazy_exports
from .reference import (
    CODE_MAX,
    GROUP_SIZES,
    GroupSize,
    Int6Weight,
    dequantize_int6_ref,
    is_group_size,
    pack_int6_ref,
    packed_words,
    pick_group_size,
    quantize_int6_ref,
    relative_error,
    unpack_int6_ref,
)

if TYPE_CHECKING:
    from .layout import LAYOUT, Int6Matrix, pack_int6, packed_shape, quantize_int6, unpack_int6
    from .linear import Int6Linear, Int6LinearWeight
    from .op import Int6Config, int6_linear, int6_linear_dx, int6_linear_ref, pick_config, pick_config_dx

__all__ = [
    "CODE_MAX",
    "GROUP_SIZES",
    "GroupSize",
    "LAYOUT",
    "Int6Config",
    "Int6Linear",
    "Int6LinearWeight",
    "Int6Matrix",
    "Int6Weight",
    "dequantize_int6_ref",
    "int6_linear",
    "int6_linear_dx",
    "int6_linear_ref",
    "is_group_size",
    "pack_int6",
    "pack_int6_ref",
    "packed_shape",
    "packed_words",
    "pick_config",
    "pick_config_dx",
    "pick_group_size",
    "quantize_int6",
    "quantize_int6_ref",
    "relative_error",
    "unpack_int6",
    "unpack_int6_ref",
]

__getattr__, __dir__ = lazy_exports(__name__)
