"""What a piece of code costs the emulated device: how often the host waits for it, and how many kernels it launches."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.device import emu


@dataclass
class Counted:
    """The counts, once the block has ended.

    Attributes:
        synchronisations: copies to and from the host, ``item``, and shapes that depend on values.
        launches: kernels.
        kernels: the same by name.
        peak_bytes: most bytes in use on any device, beyond those in use before.
    """

    synchronisations: int = 0
    launches: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0


@contextlib.contextmanager
def counted() -> Iterator[Counted]:
    """Counts what the code inside does on the emulated devices."""
    result = Counted()
    waits, launches, kernels = emu.synchronisations(), emu.launches(), Counter(emu.kernels())
    before = [emu.emu.memory_allocated(device) for device in range(emu.DEVICES)]
    for device in range(emu.DEVICES):
        emu.emu.reset_peak_memory_stats(device)
    yield result
    result.synchronisations = emu.synchronisations() - waits
    result.launches = emu.launches() - launches
    result.kernels = Counter(emu.kernels()) - kernels
    result.peak_bytes = max(emu.emu.max_memory_allocated(d) - n for d, n in enumerate(before))
