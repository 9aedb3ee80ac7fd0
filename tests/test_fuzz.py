"""Random programs, gated and as a masked full backward (``tests/fuzz``; more of them: ``make fuzz N=20000``)."""

import dataclasses

import pytest
import torch

from kondo_hooks.core import arrival as population
from kondo_hooks.core import passes
from tests.fuzz.programs import Program, Term, normal, numbered
from tests.fuzz.run import run
from tests.fuzz.shrink import script, shrink

PROGRAMS, CHUNKS, SEED = 300, 6, 17
LARGE = Program(
    seed=5,
    batch=6,
    inputs="sequence",
    extras=("H",),
    blocks=("layer_norm", "gru", "dropout"),
    value=True,
    container="dict",
    arrangement="flat",
    terms=(Term("value", "mean", 0.5), Term("ppo", "mean"), Term("entropy", "mean", 0.04)),
    options=(("micro_batch_size", 4), ("rate", 0.5)),
    calls=2,
    steps=2,
)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_programs_have_the_gradient_of_a_masked_backward_or_are_told_why_not(chunk):
    for number in range(chunk, PROGRAMS, CHUNKS):
        p = numbered(SEED, number)
        verdict = run(p)
        if verdict.is_finding:
            small = shrink(p, verdict, limit=200)
            pytest.fail(f"program {number} of seed {SEED}: {verdict.message}\n{script(small, run(small))}")


def test_most_random_programs_are_exact():
    verdicts = [run(numbered(SEED + 1, number)) for number in range(40)]
    assert sum(v.kind == "exact" for v in verdicts) >= 20
    assert not any(v.kind == "invalid" for v in verdicts)


def rolled(monkeypatch):
    """Kept rows get each other's gradients."""
    with_gradients = passes.replay.__globals__["with_gradients"]

    def fault(*args):
        replayed = with_gradients(*args)
        replayed.grads = [g.roll(1, 0) for g in replayed.grads]
        return replayed

    monkeypatch.setitem(passes.replay.__globals__, "with_gradients", fault)
    monkeypatch.setattr("kondo_hooks.core.audit.Audit.__call__", lambda *_: None)  # it would see that


def rescaled(monkeypatch):
    """Delight is read 25 times too large where a loss has two terms."""
    find_scales = population.find_scales
    monkeypatch.setattr("kondo_hooks.core.reader.find_scales", lambda *args: [s / 25 for s in find_scales(*args)])


def raising(monkeypatch):
    """The replay fails with an error of its own."""

    def fault(*_):
        raise IndexError("list index out of range")

    monkeypatch.setitem(passes.replay.__globals__, "with_gradients", fault)


@pytest.mark.parametrize(
    ("plant", "kind", "message"),
    [(rolled, "wrong", "gradient"), (rescaled, "wrong", "delight of another scale"), (raising, "crash", "IndexError")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_planted_fault_is_found_and_shrunk(monkeypatch, plant, kind, message):
    assert run(LARGE).kind == "exact"
    plant(monkeypatch)
    verdict = run(LARGE)
    assert verdict.kind == kind and message in verdict.message
    small = shrink(LARGE, verdict, limit=150)
    assert run(small).alike == verdict.alike
    assert not small.blocks and len(small.terms) == 1 and len(repr(small)) < 120
    names = {"__name__": "program"}
    exec(compile(script(small, verdict).replace("check(globals())", ""), "<script>", "exec"), names)
    assert run(names["PROGRAM"], names).alike == verdict.alike


def test_a_program_is_what_its_repr_says():
    for number in range(50):
        p = numbered(0, number)
        assert eval(repr(p), {"Program": Program, "Term": Term}) == p == normal(p)
        assert dataclasses.replace(p, seed=p.seed) == p


def test_a_run_leaves_the_random_stream_and_the_threads_alone():
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    run(Program(blocks=("dropout",)))
    assert torch.equal(before, torch.get_rng_state()) and torch.get_num_threads() == threads
