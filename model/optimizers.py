"""Which optimizer trains which parameter, and the one flat buffer that holds every gradient."""

import torch
from torch import Tensor, nn

from ..kernels.newton_schulz import pick_backend
from .config import TrainConfig
from .gpt import GPT, is_block_matrix
from .muon import Muon
from .muon_sharded import SharedStep

MUON_STATE, ADAMW_STATE = {"momentum"}, {"step", "exp_avg", "exp_avg_sq"}
"""What the optimizers keep of a parameter."""


class FlatGradients:
    """Every parameter's gradient as a view of one buffer: one zero, one all-reduce, one norm, nothing left out."""

    def __init__(self, module: nn.Module):
        parameters = list(module.parameters())
        self.buffer = parameters[0].new_zeros(sum(p.numel() for p in parameters), requires_grad=False)
        start = 0
        for parameter in parameters:
            parameter.grad = self.buffer[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def clip_(self, most: float) -> Tensor:
        """Scale the gradient to a global norm of at most `most`; returns the norm before, a scalar tensor."""
        norm = torch.linalg.vector_norm(self.buffer)
        self.buffer.mul_((most / (norm + 1e-6)).clamp(max=1.0))
        return norm


class Optimizers:
    """Muon for the block matrices, AdamW for everything else; each parameter is in exactly one.

    With `rates`, fp32 [4] on the model's device, the learning rates of matrices, embedding and the rest, and Muon's
    momentum, are read from there, in every replay of a CUDA graph.
    """

    def __init__(self, model: GPT, config: TrainConfig, rates: Tensor | None = None):
        matrices, embedding, rest = [], [], []
        self.names: dict[nn.Parameter, str] = {}
        for name, parameter in model.named_parameters():
            group = matrices if is_block_matrix(name) else embedding if name == "embed" else rest
            group.append(parameter)
            self.names[parameter] = name
        self.config = config
        self.peak = config.muon_lr, config.embed_lr, config.scalar_lr
        on_device = rates is not None
        *lrs, momentum = rates if on_device else (*self.peak, config.muon_momentum)
        self.muon = Muon(
            matrices,
            lr=lrs[0],
            momentum=momentum,
            weight_decay=config.muon_weight_decay,
            steps=config.newton_schulz_steps,
            backend=pick_backend(matrices[0].device),
            capturable=on_device,
        )
        self.adamw = torch.optim.AdamW(
            [{"params": embedding, "lr": lrs[1]}, {"params": rest, "lr": lrs[2]}],
            lr=lrs[1],
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.adam_weight_decay,
            fused=on_device,
            capturable=on_device and rates.is_cuda,
        )
        self.shared: SharedStep | None = None

    def share(self, gradients: Tensor, gathers: int) -> None:
        """Let the ranks of the default process group share Newton-Schulz, its results going round in `gathers` parts.

        `gradients` fp32 [N] holds those of all matrices. A step is `shared.orthogonalise` on all ranks, then
        :meth:`step_on_device`.
        """
        self.shared = SharedStep(self.muon, gradients, gathers)

    def momentum(self, step: int) -> float:
        """Muon's momentum at `step`: a line from muon_momentum_start to muon_momentum."""
        config = self.config
        share = min(step / config.muon_momentum_steps, 1.0)
        return (1 - share) * config.muon_momentum_start + share * config.muon_momentum

    def rates_at(self, step: int, lr_scale: float) -> list[float]:
        """The three learning rates times `lr_scale`, and the momentum of `step`."""
        return [*(peak * lr_scale for peak in self.peak), self.momentum(step)]

    def step(self, step: int, lr_scale: float) -> None:
        """Update all parameters with every learning rate times `lr_scale`."""
        *lrs, momentum = self.rates_at(step, lr_scale)
        groups = *self.muon.param_groups, *self.adamw.param_groups
        for group, lr in zip(groups, lrs, strict=True):
            group["lr"] = lr
        groups[0]["momentum"] = momentum
        self.muon.step()
        self.adamw.step()

    def step_on_device(self, finite: Tensor) -> None:
        """Update all parameters at the rates on the device, unless `finite`, a bool on the device, says no."""
        self.adamw.found_inf = (~finite).float()
        if self.shared is None:
            self.muon.step()
        else:
            self.shared.apply(finite)
        self.adamw.step()

    def forget_skipped(self) -> None:
        """Count skipped steps from here on."""
        for group in self.muon.param_groups:
            if "skipped_steps" in group:
                group["skipped_steps"].zero_()

    def state_tensors(self) -> dict[str, Tensor]:
        """Every state tensor under the name '<parameter>/<state>'."""
        return {
            f"{self.names[parameter]}/{key}": value
            for optimizer in (self.muon, self.adamw)
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_tensors` gave. KeyError or ValueError: what no state of these parameters is."""
        owner = {p: o for o in (self.muon, self.adamw) for group in o.param_groups for p in group["params"]}
        parameters = {name: parameter for parameter, name in self.names.items()}
        self._check_state(tensors, owner, parameters)
        for name, tensor in tensors.items():
            parameter_name, key = name.rsplit("/", 1)
            parameter = parameters[parameter_name]
            state = owner[parameter].state[parameter]
            if key in state:  # a graph may read it where it is
                state[key].copy_(tensor)
            else:
                state[key] = tensor

    def _check_state(
        self,
        tensors: dict[str, Tensor],
        owner: dict[nn.Parameter, torch.optim.Optimizer],
        parameters: dict[str, nn.Parameter],
    ) -> None:
        """Whether each parameter has all of its state or none, in its shapes: what is loaded is not looked at again."""
        kinds: dict[str, set[str]] = {}
        for name, tensor in tensors.items():
            parameter_name, _, key = name.rpartition("/")
            kinds.setdefault(parameter_name, set()).add(key)
            parameter = parameters[parameter_name]
            if tensor.shape != (torch.Size([]) if key == "step" else parameter.shape):
                raise ValueError(f"the optimizer's {name} is {list(tensor.shape)}")
            if key in ("step", "exp_avg_sq") and not ((tensor >= 0) & (tensor < torch.inf)).all():
                raise ValueError(f"the optimizer's {name} is negative or no number")
        for name, found in kinds.items():
            wanted = MUON_STATE if owner[parameters[name]] is self.muon else ADAMW_STATE
            if found != wanted:
                raise ValueError(f"the optimizer's {name} has {sorted(found)}, not {sorted(wanted)}")
