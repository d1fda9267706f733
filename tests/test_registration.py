"""Ops run on the GPU of their tensors, whichever GPU is current."""

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import klora.kernels
import pytest
import torch
from klora.kernels.registration import custom_op, device_of


def tensor_on(device: str) -> Mock:
    device = torch.device(device)
    return Mock(spec=torch.Tensor, device=device, is_cuda=device.type == "cuda")


@pytest.mark.parametrize("arguments", [lambda t: (t,), lambda t: (2, "x", None, t), lambda t: (1.0, [t, t], "y")])
def test_the_device_is_that_of_the_first_tensor(arguments, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: chosen.append(device) or nullcontext())
    for device in ("cuda:1", "cpu"):
        with device_of(*arguments(tensor_on(device)), tensor_on("cuda:0")):
            pass
    assert chosen == [torch.device("cuda:1")]
    with device_of(), device_of([], (), "z"):
        pass
    assert len(chosen) == 1


def test_the_schema_and_the_result_are_the_functions_own():
    @custom_op("klora_test::scaled", mutates_args=("x",))
    def scaled(x: torch.Tensor, parts: list[torch.Tensor], factor: float = 2.0) -> torch.Tensor:
        x.mul_(factor)
        return x + parts[0]

    x = torch.ones(3)
    assert torch.equal(scaled(x, [torch.ones(3)], factor=4.0), torch.full((3,), 5.0)) and torch.equal(
        x, 4 * torch.ones(3)
    )
    schema = str(torch.ops.klora_test.scaled.default._schema)
    assert schema == "klora_test::scaled(Tensor(a0!) x, Tensor[] parts, float factor=2.) -> Tensor"


def test_no_op_is_registered_without_its_device():
    sources = Path(klora.kernels.__file__).parent.rglob("*.py")
    direct = [path.name for path in sources if "torch.library.custom_op(" in path.read_text()]
    assert direct == ["registration.py"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_an_op_on_the_second_gpu_while_the_first_is_current():
    x, weight = torch.randn(64, 128, device="cuda:1").bfloat16(), torch.randn(96, 128, device="cuda:1").bfloat16()
    with torch.cuda.device(0):
        x.requires_grad_()
        out = klora.kernels.linear(x, weight)
        out.sum().backward()
    exact = x.detach().double() @ weight.double().T
    assert out.device.index == 1 and ((out.double() - exact).norm() < 0.01 * exact.norm()).item()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(64, 128), rtol=0.02, atol=0.1)
