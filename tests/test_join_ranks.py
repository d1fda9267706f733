"""How ranks meet: which variables they want, what they say where they cannot, and whose run a restart goes on with."""

import socket
import threading

import pytest
import torch
import torch.distributed as dist
from klora.model import parallel
from klora.model.config import ConfigError
from klora.model.parallel import Ranks, join_ranks, met
from klora.ttt.queue import queue_of_processes
from test_ranks import free_port
from test_train import ALONE


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"MASTER_ADDR": ""}, "^RANK and WORLD_SIZE are set, but MASTER_ADDR not; set the address and a free port"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "but MASTER_ADDR and MASTER_PORT not; .* or start the ranks by torch"),
        ({"MASTER_PORT": "http"}, "^the environment has MASTER_PORT=http; allowed for one of several ranks: 0 to 6"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999; .*: 0 to 65535"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two; .*: whole numbers from 1"),
        ({"RANK": "first"}, "RANK=first; .*: 0 to 1"),
        ({"RANK": "2"}, "RANK=2; .*: 0 to 1"),
        ({"RANK": "-1"}, "RANK=-1; .*: 0 to 1"),
    ],
)
def test_ranks_that_cannot_meet_say_so(monkeypatch, given, says):
    about = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, text in (about | given).items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=says), join_ranks("cpu"):
        pass


def test_ranks_whose_port_is_taken_say_so(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        about = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, text in about.items():
            monkeypatch.setenv(name, text)
        says = f"RANK and WORLD_SIZE are set, but the ranks cannot meet at 127.0.0.1:{port}: .* address already in use"
        with pytest.raises(ConfigError, match=says), join_ranks("cpu"):
            pass
        with pytest.raises(ConfigError, match=says):
            queue_of_processes()


def test_a_first_rank_whose_machine_nobody_knows_says_so_at_once(monkeypatch):
    about = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "nobody.invalid", "MASTER_PORT": "29400"}
    for name, text in about.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(parallel.dist, "TCPStore", None)  # which would look for it for two minutes
    with pytest.raises(ConfigError, match="the ranks cannot meet at nobody.invalid:29400: .*(?i:name)"):
        met()


def test_a_rank_waits_for_the_first_without_asking_pytorch_and_not_for_ever(monkeypatch):
    """PyTorch's C++ hears no signal and shows a stack every minute."""
    made, servers, store = [], [], dist.HashStore()
    monkeypatch.setattr(parallel.dist, "TCPStore", lambda *given, **more: made.append(given) or store)
    for name, text in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("MASTER_PORT", str(port := free_port()))
    monkeypatch.setattr(parallel, "JOIN", 0.3)
    with pytest.raises(ConfigError, match=f"cannot meet at 127.0.0.1:{port}: .*refused"):
        met()
    assert not made
    monkeypatch.setattr(parallel, "JOIN", 60.0)
    first = threading.Timer(0.5, lambda: servers.append(socket.create_server(("127.0.0.1", port))))
    first.start()
    assert met()[1:] == (1, 2) and made == [("127.0.0.1", port, None, False, parallel.CALL)]
    first.join()
    servers[0].close()


def test_ranks_of_one_machine_are_not_put_on_one_gpu(monkeypatch):
    for name, text in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, text)
    says = "names one GPU and 2 processes run here; give --device cuda"
    with pytest.raises(ConfigError, match=says), join_ranks("cuda:1"):
        pass
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    with pytest.raises(ConfigError, match="LOCAL_WORLD_SIZE=0; .*: whole numbers from 1"), join_ranks("cuda:1"):
        pass


def test_the_first_rank_of_a_machine_is_its_own(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert ALONE.is_first_here and not Ranks(1, 2, device).is_first_here
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert Ranks(8, 16, device).is_first_here
    assert ALONE.alive.tolist() == [1] and ALONE.alive.dtype == torch.int32


def test_only_a_run_that_this_launcher_began_is_gone_on_with(monkeypatch):
    """A folder that held another run was refused, and its refusal may have been what the launcher started again."""
    device, store = torch.device("cpu"), dist.HashStore()
    first, second = (Ranks(rank, 2, device, store=store) for rank in range(2))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    second.begin()
    assert not ALONE.has_begun and not first.has_begun and not second.has_begun
    first.begin()
    assert not ALONE.has_begun and first.has_begun and second.has_begun
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not first.has_begun
