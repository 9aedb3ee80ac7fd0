"""The emulated device itself is as strict as a real one: what a fault of the gate would show by."""

import pytest
import torch
from torch import nn

from tests.device import emu
from tests.device.counting import counted


def test_devices_do_not_mix():
    x, y = torch.ones(2, 3, device="emu:0"), torch.ones(2, 3, device="emu:1")
    for other in (y, y.cpu(), y[0, 0]):
        with pytest.raises(RuntimeError, match="same device"):
            x + other
    assert (x + torch.tensor(2.0)).sum() == 18  # a number is no tensor of another device
    with pytest.raises(RuntimeError, match="same device"):
        x.index_select(0, torch.tensor([0]))
    with pytest.raises(RuntimeError, match="device"):
        torch.rand(2, generator=torch.Generator(), device="emu:0")


def test_memory_that_nobody_wrote_is_poisoned_and_counted():
    before = emu.emu.memory_allocated(1)
    with counted() as cost:
        x = torch.empty(100, device="emu:1")
        assert x.isnan().all()
        assert emu.emu.memory_allocated(1) == before + 400
        view = x[:10]
        del x
        assert emu.emu.memory_allocated(1) == before + 400
        del view
    assert emu.emu.memory_allocated(1) == before
    assert cost.peak_bytes == 400 + 100 + 1  # and what isnan().all() made


def test_a_device_draws_from_its_own_generator():
    host = torch.get_rng_state()
    emu.emu.manual_seed_all(3)
    a, b = torch.rand(4, device="emu:0"), torch.rand(4, device="emu:1")
    assert torch.equal(a.cpu(), b.cpu())  # seeded alike
    assert not torch.equal(a, torch.rand(4, device="emu:0"))
    state = emu.get_rng_state("emu:1")
    c = nn.functional.dropout(torch.ones(100, device="emu:1"))
    emu.set_rng_state(state, "emu:1")
    assert torch.equal(c, nn.functional.dropout(torch.ones(100, device="emu:1")))
    assert torch.equal(host, torch.get_rng_state())


def test_waits_and_kernels_are_counted():
    x = torch.arange(6.0, device="emu:0")
    for wait in (
        lambda: x.sum().item(),
        lambda: x.cpu(),
        lambda: x.nonzero(),
        lambda: bool((x > 0).all()),
        lambda: x[x > 2],
        lambda: torch.equal(x, x + 1),
        lambda: torch.accelerator.synchronize("emu:0"),
        lambda: x.copy_(torch.ones(6)),
    ):
        with counted() as cost:
            wait()
        assert cost.synchronisations == 1
    with counted() as cost:
        ((x + 1) * 2).view(2, 3).t().sum()
    assert (cost.synchronisations, cost.launches) == (0, 3)
    assert cost.kernels == {"add": 1, "mul": 1, "sum": 1}


def test_a_read_that_does_not_wait_for_another_stream_is_reported():
    x, stream = torch.ones(3, device="emu:0"), torch.Stream("emu:0")
    stream.wait_stream(torch.accelerator.current_stream())
    with stream:
        y = x + 1
    y + 1
    assert len(emu.races()) == 1
    torch.accelerator.current_stream().wait_stream(stream)
    y + 1
    assert not emu.races()
    del y  # its stream may get this memory next
    with stream:
        x + 1
    assert len(emu.races()) == 1


def test_autograd_runs_in_threads_of_the_devices():
    import threading

    threads = set()
    for device in ("emu:0", "emu:1"):
        x = torch.ones(2, device=device, requires_grad=True)
        y = x * 2
        y.register_hook(lambda _: threads.add(threading.get_ident()))
        y.sum().backward()
    assert len(threads - {threading.get_ident()}) == 2
