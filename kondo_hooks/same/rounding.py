"""How far the same rows may come out otherwise in a batch of another size, when nothing ties them to other rows."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

# How far rounding in another order carries a log-prob, in nats, and at most any value, relative to its column.
_NATS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}
_MOST = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.25, torch.bfloat16: 0.5}
_SAMPLE = 4096


@dataclass
class Checks:
    """How strictly replays are held against their screens.

    Attributes:
        tolerance: largest relative difference, as the user gave it; None to go by the type and by controls.
        reruns: whether a control may run. Not where a pass has collectives in it, which other ranks would not make.
        types: that the model computes in.
        noise: by the output's path, the relative difference that controls have shown to be rounding.
    """

    tolerance: float | None = None
    reruns: bool = True
    types: frozenset[torch.dtype] = frozenset()
    noise: dict[str, float] = field(default_factory=dict)

    def limit(self, path: str, dtype: torch.dtype, usual: float, holds: str) -> "Limit":
        """What may differ in an output.

        Args:
            path: of the output.
            dtype: the least precise type that it was computed in.
            usual: relative difference that is usual for it.
            holds: "log-probs" (or their negative), which come of logits that are larger, or "logits"; their
                differences count in nats.
        """
        absolute = {"log-probs": _NATS[dtype], "logits": 4 * torch.finfo(dtype).eps}.get(holds, 0.0)
        if self.tolerance is not None:
            return Limit(self.tolerance, absolute, 0.0)
        most = max(_MOST[dtype], 10 * usual)
        if not self.reruns:
            return Limit(min(3 * usual, most), absolute, 0.0)
        return Limit(max(usual, min(2 * self.noise.get(path, 0.0), most)), absolute, most)


@dataclass(frozen=True)
class Limit:
    """What may differ: ``relative`` of the measure and ``absolute``; up to ``most`` of it if a control agrees."""

    relative: float
    absolute: float
    most: float

    def allows(self, apart: Tensor, measure: Tensor) -> Tensor:
        """(columns,) whether each column's difference is within it; False for NaN."""
        return apart <= self.relative * measure + self.absolute

    def excess(self, apart: Tensor, measure: Tensor) -> float:
        """The largest difference relative to its column's measure; infinite where it is no number."""
        ratio = apart / (measure + self.absolute).clamp_min(torch.finfo(apart.dtype).tiny)
        return float(ratio.nan_to_num(torch.inf).max())


def by_column(values: Tensor, row_axis: int) -> Tensor:
    """(rows, columns) of an output: its last axis, unless that holds the rows; a complex number is two columns."""
    if values.is_complex():
        values = torch.view_as_real(values).flatten(-2)
    return values.reshape(-1, values.shape[-1] if values.dim() > 1 and row_axis != values.dim() - 1 else 1)


def differences(ours: Tensor, theirs: Tensor, used: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each column's largest difference where it is used, and its largest value among those that differ.

    Args:
        ours, theirs: (rows, columns).
        used: the same, False where a difference does not matter.

    Returns:
        Two tensors (columns,), in float32 or better.
    """
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    apart = (ours - theirs).abs().masked_fill(same if used is None else same | ~used, 0)
    size = theirs.abs().masked_fill(same, 0)
    dtype = torch.float64 if apart.dtype == torch.float64 else torch.float32
    return apart.amax(0).to(dtype), size.amax(0).to(dtype)


def measure(values: Tensor) -> Tensor:
    """(columns,) the largest ordinary magnitude in each column of (rows, columns).

    A value that stands more than once at the top, or far above the others, is a mask's: it is no measure.
    """
    size = values[:: max(1, len(values) // _SAMPLE)].abs()
    size = size if size.dtype == torch.float64 else size.float()
    size = size.masked_fill(~size.isfinite(), torch.nan)
    repeated = size == size.nan_to_num(0).amax(0)
    size = size.masked_fill(repeated & (repeated.sum(0) > 1), torch.nan)
    middle = size.nanmedian(0).values.nan_to_num(0)
    middle = torch.where(middle > 0, middle, size.nanmean(0).nan_to_num(0))
    return size.masked_fill(size > 100 * middle, 0).nan_to_num(0).amax(0)
