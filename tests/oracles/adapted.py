"""The oracle of klora.lora: row by row, with the adapter added to a copy of the weights; and plain PyTorch's LoRA."""

import torch
from torch import Tensor, nn

Adapter = dict[str, tuple[Tensor, Tensor, float]]
"""A [r, K], B [N, r] and s by the name of their linear."""


def adapted_rows(
    model: nn.Module,
    adapters: list[Adapter | None],
    tokens: Tensor,
    dtype: torch.dtype = torch.float64,
    merged: bool = True,
) -> tuple[Tensor, list[dict[str, tuple[Tensor, Tensor]]]]:
    """Logits [B, S, V] of each row with its adapter (or none), in `dtype`, and the leaves that they were made of.

    The weight of a row is W + s B A, W^T where the module is a Conv1D; with `merged` off s (x A^T) B^T is added to the
    linear's output, as LoRA is usually written. An adapter that two rows share has one pair of leaves for both.
    """
    weights = {name: tensor.detach().to(dtype) for name, tensor in model.named_parameters()}
    modules = dict(model.named_modules())
    made: dict[int, dict] = {}
    outputs = []
    for adapter, row in zip(adapters, tokens, strict=True):
        own, hooks = dict(weights), []
        if adapter is not None:
            fresh = {n: tuple(t.detach().to(dtype).requires_grad_() for t in part[:2]) for n, part in adapter.items()}
            for name, (a, b) in made.setdefault(id(adapter), fresh).items():
                scale = adapter[name][2]
                if merged:
                    change = scale * (b @ a)
                    is_conv1d = type(modules[name]).__name__ == "Conv1D"
                    own[f"{name}.weight"] = weights[f"{name}.weight"] + (change.mT if is_conv1d else change)
                else:

                    def add(module, inputs, output, a=a, b=b, scale=scale):
                        return output + scale * (inputs[0] @ a.mT @ b.mT)

                    hooks.append(modules[name].register_forward_hook(add))
        out = torch.func.functional_call(model, own, (row[None],))
        outputs.append(getattr(out, "logits", out))
        for hook in hooks:
            hook.remove()
    return torch.cat(outputs), list(made.values())
