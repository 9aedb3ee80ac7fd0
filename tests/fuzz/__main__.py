"""``python -m tests.fuzz --count 20000``: run random programs, and print what differs as small as it gets."""

import argparse
import collections
import dataclasses
import itertools
import multiprocessing
import re
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from tests.fuzz.programs import Program, numbered
from tests.fuzz.run import Verdict, run
from tests.fuzz.shrink import script, shrink

SIZES = dict.fromkeys(("seed", "batch", "length", "hidden", "actions", "calls", "steps"), 1)


def _one(job: tuple[int, int]) -> tuple[int, Verdict]:
    torch.set_num_threads(1)
    return job[1], run(numbered(*job))


def _shrunk(job: tuple[int, int, Verdict]) -> Program:
    torch.set_num_threads(1)
    return shrink(numbered(*job[:2]), job[2])


def _some(groups: list[list[tuple[int, Verdict]]], n: int) -> list[tuple[int, Verdict]]:
    """``n`` of the findings, taken in turn from each group."""
    turns = itertools.zip_longest(*groups)
    return [found for turn in turns for found in turn if found is not None][:n]


def main() -> int:
    """Run, shrink, print; returns how many kinds of findings there were."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first program")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--show", type=int, default=20, help="how many findings to shrink and print")
    parser.add_argument("--out", type=Path, help="folder for the scripts of what was found")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no more programs after these")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds

    jobs = [(options.seed, number) for number in range(options.start, options.start + options.count)]
    kinds: collections.Counter[str] = collections.Counter()
    told: collections.Counter[str] = collections.Counter()
    warned: collections.Counter[str] = collections.Counter()
    findings: dict[tuple[str, str], list[tuple[int, Verdict]]] = collections.defaultdict(list)
    whole = 0
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        for number, verdict in tqdm(pool.imap_unordered(_one, jobs, chunksize=20), total=len(jobs), mininterval=5):
            kinds[verdict.kind] += 1
            if time.monotonic() > end:
                pool.terminate()
                break
            whole += verdict.whole and not verdict.warned
            warned.update({_summary(text) for text in verdict.warned})
            if verdict.kind in ("told", "invalid"):
                told[f"{verdict.kind}: {_summary(verdict.message)}"] += 1
            if verdict.kind == "invalid":
                tqdm.write(f"invalid: {number}")
            if verdict.is_finding:
                findings[verdict.alike].append((number, verdict))

    print(", ".join(f"{count} {kind}" for kind, count in kinds.most_common()), f"of {kinds.total()} programs")
    print(f"{whole} replayed every row without a word")
    for title, counter in (("told", told), ("warned", warned)):
        print(f"\n{title}:")
        for text, count in counter.most_common():
            print(f"{count:6d}  {text}")
    for alike, found in sorted(findings.items(), key=lambda item: -len(item[1])):
        print(f"\n{len(found)} x {alike[0]}: {found[0][1].message.splitlines()[0][:200]}")
        print(f"  programs {[number for number, _ in found[:12]]}")
    chosen = _some(list(findings.values()), options.show)
    small: dict[str, list[int]] = collections.defaultdict(list)
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        jobs_left = [(options.seed, number, verdict) for number, verdict in chosen]
        for (number, verdict), p in zip(chosen, pool.imap(_shrunk, jobs_left), strict=True):
            known = small[f"{verdict.kind} {dataclasses.replace(p, **SIZES)!r}"]
            known.append(number)
            if len(known) > 1:
                continue
            print(f"\n{verdict.kind} {number}: {verdict.message.splitlines()[0][:160]}\n  {p!r}", flush=True)
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / f"{verdict.kind}_{number}.py").write_text(script(p, run(p)))
    return len(findings)


def _summary(message: str) -> str:
    text = message.splitlines()[0].replace("the output (", "(")
    text = re.sub(r"(?:\.\w+|\[[^\]]*\])*\.?\w* ?\([\d, #]*\)(, )?", "#", text)  # names of outputs and shapes
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "#", text)[:150]


if __name__ == "__main__":
    sys.exit(main() > 0)
