"""What a gate has saved and what that cost, in plain words."""

import math
from collections.abc import Iterator

from torch import Tensor

from kondo_hooks.rules.draw import bounded_noise, cheapest, inclusion, second_moment
from kondo_hooks.rules.samples import Decision
from kondo_hooks.stats import Stats


def report(name: str, stats: Stats, last: Decision | None) -> str:
    """Lines for a terminal.

    Args:
        name: of the rule, as the user wrote it.
        stats: of the gate.
        last: its last decision, if there was one.
    """
    lines = [f"kondo.gated, {name}: {stats.steps:,} steps, {stats.rows:,} samples, {_share(stats.rate)} kept"]
    if stats.rows_screened:
        lines.append(
            f"  {stats.forwarded:,} of {stats.rows_screened:,} rows built a graph: {_share(stats.skipped)} never did"
        )
    if passed := stats.rows - stats.decided:
        lines.append(f"  {passed:,} samples passed straight through, in steps without a gate")
    if last is None:
        return "\n".join([*lines, "  no decision was taken yet"])
    if math.isfinite(stats.without_gradient):
        lines.append(f"  {_share(stats.without_gradient)} of the last samples had no gradient, so to drop them is free")
    if math.isfinite(stats.noise):
        lines.append(
            f"  noise of the last draw: {stats.noise:.2f} of the gradient's second moment, at the model's outputs; "
            f"largest factor {stats.largest_factor:.3g}"
        )
    lines += _seconds(stats)
    lines += _cheaper(stats, last)
    return "\n".join(lines)


def _seconds(stats: Stats) -> Iterator[str]:
    if not (math.isfinite(stats.seconds_screen) and math.isfinite(stats.seconds_replay)):
        return
    gated = stats.seconds_screen + stats.seconds_replay
    yield (
        f"  a gated step takes {duration(stats.seconds_screen)} for its screen and all that the gate does, and "
        f"{duration(stats.seconds_replay)} for the kept rows"
    )
    if not math.isfinite(stats.seconds_ungated):
        yield "  what a step of all rows takes was not seen (warmup_steps=3 shows it)"
        return
    saved = 1 - gated / stats.seconds_ungated
    told = f"{_share(saved)} saved" if saved >= 0 else f"{_share(-saved)} more"
    yield f"  a step of all rows took {duration(stats.seconds_ungated)}: {told}, sampling and the loss code not counted"


def _cheaper(stats: Stats, last: Decision) -> Iterator[str]:
    """Rules whose gradient is right on average, by seconds times noise on the last samples."""
    fixed, full = stats.seconds_screen, stats.seconds_ungated
    if last.norm is None or not len(last.kept) or not math.isfinite(fixed + full + stats.seconds_replay):
        return
    norm = last.norm.detach().double().cpu().reshape(-1)
    total = float(norm.square().sum())
    if not (total > 0 and math.isfinite(total)):
        return
    row = stats.seconds_replay / len(last.kept)

    def cost(p: Tensor) -> float:
        return (fixed + row * float(p.sum())) * second_moment(norm, p) / total

    ways = {
        "no gate at all": full,
        'rate="lossless"': cost((norm > 0).double()),
        "noise=0.5": cost(inclusion(norm, bounded_noise(norm, 0.5))),
        'rate="auto" while it gates': cheapest(norm, fixed, row)[1],
    }
    best = min(ways, key=ways.__getitem__)
    each = ", ".join(f"{way} {duration(seconds)}" for way, seconds in ways.items())
    yield f"  seconds times noise of rules that are right on average, on the last samples: {each}; least: {best}"


def _share(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "none"


def duration(seconds: float) -> str:
    """In seconds or milliseconds, to three digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
