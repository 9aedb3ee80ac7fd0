"""verl's own worker and engine, on this machine's CPU.

verl asks for its platform when its modules are imported, so it is told here, before any of them is.
"""

import importlib.util
import os
import types

import torch

if importlib.util.find_spec("verl") is not None:
    from verl.plugin.platform.platform_cuda import PlatformCUDA
    from verl.plugin.platform.platform_manager import set_platform

    class Nothing(types.SimpleNamespace):
        """``torch.cuda`` where there is none: no memory, nothing to wait for."""

        def __getattr__(self, name):
            return lambda *_, **__: 0

    class PlatformCPU(PlatformCUDA):
        """verl has no platform for a CPU, and a function that takes one."""

        device_name = vendor_name = "cpu"

        @property
        def device_module(self):
            return Nothing(is_available=lambda: False, mem_get_info=lambda: (0, 0), get_device_name=lambda: "CPU")

        def is_available(self):
            return True

        def current_device(self):
            return torch.device("cpu")

        def communication_backend_name(self):
            return "gloo"

    set_platform(PlatformCPU())
    # Its engines are registered for cuda alone.
    os.environ.update(VERL_ENGINE_DEVICE="cuda", VERL_ENGINE_VENDOR="nvidia")
