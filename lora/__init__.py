"""LoRA adapters on the linears of anyone's model: many unlike adapters in one pool, in one batch, in one step.

    y_b = x_b W^T + bias + s_b B_b (A_b drop(x_b))        s = alpha / rank, b a row of the batch

find.py finds the linears, attach.py takes them and gives them back; pool.py holds the adapters, adapters.py names them;
linear.py is the product, mlp.py an MLP as one op; peft.py reads and writes PEFT's files; optimizer.py is Adam on the
pool; attention.py puts klora's attention into a model of transformers. Of klora.model, reading.py alone is needed, but
for base="int6".
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_exports

if TYPE_CHECKING:
    from .adapters import Adapters
    from .attach import Lora, attach
    from .attention import Attention, set_attention
    from .optimizer import LoraAdam
    from .pool import LoraError

__all__ = ["Adapters", "Attention", "Lora", "LoraAdam", "LoraError", "attach", "set_attention"]

__getattr__, __dir__ = lazy_exports(__name__)
