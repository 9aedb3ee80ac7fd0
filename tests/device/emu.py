"""Registers the emulated device in this process: ``torch.device("emu:0")``, ``"emu:1"``, ``torch.emu``."""

import contextlib
import ctypes
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.device.build import library

NAME = "emu"
DEVICES = 2


def _load() -> ctypes.CDLL:
    torch.utils.rename_privateuse1_backend(NAME)
    loaded = ctypes.CDLL(str(library()))
    for name in ("bytes", "peak_bytes", "launches", "synchronisations", "kernels", "races", "get_rng_state"):
        getattr(loaded, f"emu_{name}").restype = ctypes.c_int64
    for name in ("kernels", "races"):
        getattr(loaded, f"emu_{name}").argtypes = [ctypes.c_char_p, ctypes.c_int64]
    loaded.emu_get_rng_state.argtypes = [ctypes.c_int, ctypes.c_void_p]
    loaded.emu_set_rng_state.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int64]
    loaded.emu_manual_seed.argtypes = [ctypes.c_int, ctypes.c_uint64]
    return loaded


_emu = _load()


def _index(device: object) -> int:
    if device is None:
        return _emu.emu_current_device()
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return _emu.emu_current_device() if index is None else index


def get_rng_state(device: object = None) -> Tensor:
    state = torch.empty(_emu.emu_get_rng_state(0, None), dtype=torch.uint8, device="cpu")
    _emu.emu_get_rng_state(_index(device), state.data_ptr())
    return state


def set_rng_state(state: Tensor, device: object = None) -> None:
    assert state.device.type == "cpu" and state.is_contiguous()
    _emu.emu_set_rng_state(_index(device), state.data_ptr(), state.numel())


def manual_seed(seed: int) -> None:
    _emu.emu_manual_seed(_index(None), seed)


def manual_seed_all(seed: int) -> None:
    """As on CUDA: all devices are seeded alike, so two of them draw the same numbers."""
    for device in range(DEVICES):
        _emu.emu_manual_seed(device, seed)


@contextlib.contextmanager
def on_device(device: object) -> Iterator[None]:
    before = _emu.emu_current_device()
    _emu.emu_set_device(_index(device))
    try:
        yield
    finally:
        _emu.emu_set_device(before)


def _text(function: object) -> list[str]:
    size = function(None, 0)
    buffer = ctypes.create_string_buffer(size + 1)
    function(buffer, size)
    return buffer.value.decode().splitlines()


def races() -> list[str]:
    """Accesses since the last look that nothing put in order with what another stream does to the same memory."""
    return _text(_emu.emu_races)


def kernels() -> dict[str, int]:
    """How often each kernel was launched so far."""
    return {name: int(count) for name, count in (line.split() for line in _text(_emu.emu_kernels))}


def launches() -> int:
    return _emu.emu_launches()


def synchronisations() -> int:
    """How often the host waited for a device so far: copies, ``item``, shapes that depend on values."""
    return _emu.emu_synchronisations()


def _register() -> types.ModuleType:
    module = types.ModuleType(f"torch.{NAME}")
    vars(module).update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        _initialized=True,
        _is_in_bad_fork=lambda: False,
        device_count=lambda: DEVICES,
        current_device=_emu.emu_current_device,
        set_device=lambda device: _emu.emu_set_device(_index(device)),
        device=on_device,
        synchronize=lambda device=None: torch.accelerator.synchronize(_index(device)),
        get_rng_state=get_rng_state,
        set_rng_state=set_rng_state,
        manual_seed=manual_seed,
        manual_seed_all=manual_seed_all,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
        memory_allocated=lambda device=None: _emu.emu_bytes(_index(device)),
        max_memory_allocated=lambda device=None: _emu.emu_peak_bytes(_index(device)),
        reset_peak_memory_stats=lambda device=None: _emu.emu_reset_peak(_index(device)),
    )
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return sys.modules[f"torch.{NAME}"]


def _fused_lstm_cell(
    x: Tensor, h: Tensor, c: Tensor, x_bias: Tensor | None = None, h_bias: Tensor | None = None
) -> Any:
    gates = x + h if x_bias is None or h_bias is None else x + h + x_bias + h_bias
    i, f, g, o = gates.chunk(4, 1)
    cell = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell, gates.detach()


def _fused_gru_cell(x: Tensor, h: Tensor, state: Tensor, x_bias: Tensor | None, h_bias: Tensor | None = None) -> Any:
    if x_bias is not None and h_bias is not None:
        x, h = x + x_bias, h + h_bias
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, 1), h.chunk(3, 1)
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return n + (xz + hz).sigmoid() * (state - n), x.detach()


def _register_cells() -> torch.library.Library:
    """torch takes it for granted that an accelerator has these two, which the CPU has not."""
    aten = torch.library.Library("aten", "IMPL")
    aten.impl("_thnn_fused_lstm_cell", _fused_lstm_cell, "AutogradPrivateUse1")
    aten.impl("_thnn_fused_gru_cell", _fused_gru_cell, "AutogradPrivateUse1")
    return aten


emu = _register()
_cells = _register_cells()
