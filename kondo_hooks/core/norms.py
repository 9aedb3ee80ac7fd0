"""The norm of each sample's gradient at the model's outputs, which a backward brings for nothing."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kondo_hooks.core.arrival import Arrival


def find_norms(
    arrivals: Sequence[Arrival], tokens: bool, careful: bool, spread: bool, tell: Callable[[Arrival, int], None]
) -> None:
    """Add to each call's signal the norm of its samples' gradients, (B,), or of its positions', (B, P).

    Where several outputs have a gradient, or another call on the same rows, each counts by its share:
    ``n_i^2 = mean_out(total) * sum_out(|g_out,i|^2 / sum_j |g_out,j|^2)``, which for one output is the norm itself.

    Args:
        arrivals: the calls of one backward, with their signals.
        tokens: whether samples are positions.
        careful: no sample that has a gradient may come out as zero, however small it is.
        spread: an output without positions counts at all of a row's; else it does not, and ``tell`` is told of it.
    """
    # Outputs of one kind: of calls that return alike, and are the first, or second, on their rows.
    found: dict[tuple[tuple[str, ...], int, int], list[tuple[Arrival, Tensor]]] = {}
    calls: Counter[int] = Counter()
    for a in arrivals:
        leader = a.follows or a
        if leader.signal is None:
            continue
        nth = calls[id(leader)]
        calls[id(leader)] += 1
        for i, grad in enumerate(a.grads):
            if grad is not None and a.call.rows[i] is not None:
                norm = _norm(a, i, grad, tokens, careful)
                if norm is None and spread:
                    norm = _norm(a, i, grad, False, careful)
                    norm = None if norm is None else norm.unsqueeze(1).expand(-1, leader.signal.valid.shape[1])
                if norm is None:
                    tell(a, i)
                else:
                    norm = norm.to(leader.signal.advantages.device)
                    found.setdefault((tuple(a.call.paths), i, nth), []).append((leader, norm))
    if len(found) == 1:
        (each,) = found.values()
        for leader, norm in each:
            _note(leader, norm)
        return
    totals = {key: sum(_squares(norm).sum() for _, norm in each) for key, each in found.items()}
    if not totals:
        return
    mean = sum(totals.values()) / len(totals)
    squares: dict[int, Tensor] = {}
    leaders: dict[int, Arrival] = {}
    for key, each in found.items():
        for leader, norm in each:
            share = _squares(norm) / totals[key] * mean
            share = torch.where(norm == 0, 0, share.clamp_min(torch.finfo(share.dtype).tiny))
            leaders[id(leader)] = leader
            squares[id(leader)] = share + squares[id(leader)] if id(leader) in squares else share
    for name, leader in leaders.items():
        _note(leader, squares[name].sqrt())


def _note(leader: Arrival, norm: Tensor) -> None:
    assert leader.signal is not None
    signal = leader.signal
    signal.norm = norm.expand(signal.valid.shape[: norm.dim()])
    if norm.dim() > 1:  # a token without an advantage may have a gradient of another term
        signal.valid = signal.valid | (signal.norm != 0)


def _norm(a: Arrival, i: int, grad: Tensor, tokens: bool, careful: bool) -> Tensor | None:
    where, leader = a.call.rows[i], a.follows or a
    assert where is not None and leader.signal is not None
    rows = where.first(grad)
    rows = torch.view_as_real(rows.resolve_conj()) if rows.is_complex() else rows
    if not tokens:
        return _of(rows, 1, careful)
    positions = leader.signal.valid.shape[1]
    has_positions = a is not leader or i == a.source or a.positions.get(i, False)
    if positions == 1:
        return _of(rows, 1, careful).unsqueeze(1)
    if not has_positions:
        return None
    if a.offset == 0 and rows.dim() > 1:
        for axes in range(2, rows.dim() + 1):
            if rows.shape[1:axes].numel() == positions:
                return _of(rows, axes, careful).reshape(len(rows), positions)
    if rows.dim() < 2 or rows.shape[1] < a.offset + positions:
        return None  # positions that are not known, which only a rule by norms would need
    return _of(rows, 2, careful)[:, a.offset : a.offset + positions]


def _of(rows: Tensor, leading: int, careful: bool) -> Tensor:
    """Over all but the leading axes. Where that must be careful, squares stay in the range of their type.

    On the CPU float64 would take many times as long, so what float32 loses there comes from the sum of magnitudes.
    """
    if rows.dim() <= leading:
        return rows.abs().to(torch.promote_types(rows.dtype, torch.float32))
    axes = tuple(range(leading, rows.dim()))
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if careful and rows.device.type not in ("cpu", "mps"):
        return torch.linalg.vector_norm(rows, 2, axes, dtype=torch.float64).to(dtype)
    norm: Tensor = torch.linalg.vector_norm(rows, 2, axes, dtype=dtype)
    if not careful:
        return norm
    sizes = torch.linalg.vector_norm(rows, 1, axes, dtype=dtype)
    return torch.where((norm == 0) | norm.isinf(), sizes, norm)


def _squares(norm: Tensor) -> Tensor:
    return norm.to(torch.float32 if norm.device.type == "mps" else torch.float64).square()
