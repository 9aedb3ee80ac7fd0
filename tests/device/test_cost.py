"""How often a gated step makes the host wait, how many kernels of its own it launches, and what it holds."""

import pytest

from benchmarks.launches import LOGITS, cases, gated_step, own_kernels, plain_step

CASES = cases()
# Waits, own kernels and, where the model is nearly all logits, peak bytes beyond the plain loop's in units of these.
MOST = {
    "mlp": (1, 20, None),
    "mlp, price": (2, 20, None),
    "mlp, drawn": (2, 25, None),
    "mlp, random rows": (1, 20, None),
    "mlp, lossless": (2, 25, None),
    "mlp, noise": (2, 25, None),
    "mlp, function": (2, 25, None),
    "language model": (1, 20, 0.0),
    "loss inside": (1, 25, 0.0),
    "loss inside, bfloat16": (1, 25, 0.0),
    "language model, noise": (2, 25, 0.0),
    "screen first": (1, 15, 0.0),
    "window 8": (2 * 8 + 2, 8 * 200, None),
    "window 64": (2 * 64 + 2, 64 * 200, None),
    "noise, window 8": (2 * 8 + 2, 8 * 200, None),
    "noise, window 64": (2 * 64 + 2, 64 * 200, None),
    "language model, window 8": (2 * 8 + 2, 8 * 500, 2.1),
}


def test_every_case_has_a_bound():
    assert MOST.keys() == CASES.keys()


@pytest.mark.parametrize("name", MOST)
def test_what_a_step_costs(name: str):
    case, (waits, kernels, bytes_) = CASES[name], MOST[name]
    case.run().backward()
    plain, ours = plain_step(case), gated_step(case)
    assert plain.synchronisations == 0
    assert 0 < ours.synchronisations <= waits
    assert own_kernels(case, ours) <= kernels
    if bytes_ is not None:
        assert ours.peak_bytes - plain.peak_bytes <= bytes_ * LOGITS
