"""Greedy shrinking: whatever can go, goes, while the verdict stays."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from tests.fuzz.programs import Program, Term, normal
from tests.fuzz.run import Verdict, run
from tests.fuzz.writing import source

_SIZES = ("batch", "length", "hidden", "actions", "calls", "steps")


def shrink(p: Program, verdict: Verdict, runner: Callable[[Program], Verdict] = run, limit: int = 400) -> Program:
    """The smallest program found whose verdict is alike; ``limit`` bounds the programs run."""
    runs = 0
    smaller = True
    while smaller:
        smaller = False
        for candidate in _candidates(p):
            if runs >= limit:
                return p
            candidate = normal(candidate)
            if candidate == p or _weight(candidate) >= _weight(p):
                continue
            runs += 1
            if _same(runner(candidate), verdict):
                p, smaller = candidate, True
                break
    return p


def _same(a: Verdict, b: Verdict) -> bool:
    return a.alike == b.alike


def _candidates(p: Program) -> Iterator[Program]:
    default = Program()
    for name in ("blocks", "terms", "extras", "options"):
        values: tuple[Any, ...] = getattr(p, name)
        for i in range(len(values)):
            rest = values[:i] + values[i + 1 :]
            if rest or name not in ("terms", "options"):
                yield dataclasses.replace(p, **{name: rest or getattr(default, name)})
    for field in dataclasses.fields(p):
        if field.name not in (*_SIZES, "blocks", "terms", "extras"):
            yield dataclasses.replace(p, **{field.name: getattr(default, field.name)})
    for i, term in enumerate(p.terms):
        for plain in (Term(term.kind), Term("pg", term.reduction, term.coef)):
            yield dataclasses.replace(p, terms=(*p.terms[:i], plain, *p.terms[i + 1 :]))
    for name in _SIZES:
        size = getattr(p, name)
        least = 4 if name == "hidden" else 1 if name in ("calls", "steps") else 2
        for smaller in sorted({least, size - 1, getattr(default, name)}):
            if least <= smaller < size:
                yield dataclasses.replace(p, **{name: smaller})


def _weight(p: Program) -> tuple[int, int, str]:
    default = Program()
    changed = sum(getattr(p, f.name) != getattr(default, f.name) for f in dataclasses.fields(p) if f.name not in _SIZES)
    parts = len(p.blocks) + len(p.terms) + len(p.extras) + len(p.options) + sum(t != Term(t.kind) for t in p.terms)
    parts += sum(t.kind != "pg" for t in p.terms)
    return changed + parts, sum(getattr(p, name) for name in _SIZES), repr(p)


def script(p: Program, verdict: Verdict) -> str:
    """The program as a file that reproduces the verdict when it is run."""
    return (
        f'"""{verdict.kind}: {verdict.message.splitlines()[0][:100]}"""\n\n{source(p)}\n\n'
        "# How it is used: the calls, the gate's options and the comparison.\n"
        "from tests.fuzz.programs import Program, Term\nfrom tests.fuzz.run import check\n\n"
        f"PROGRAM = {p!r}\ncheck(globals())\n"
    )
