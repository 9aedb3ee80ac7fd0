"""What the evidence scripts share: runs that write as they end, can be resumed, and are drawn from their files.

A *task* is a frozen dataclass: its fields name one run, and are the first columns of the rows that it leaves in a CSV.
A run whose rows are in the file is not made again, so a script that was stopped goes on where it was, and one that is
asked for more seeds adds them. What else a run depends on, its code and its settings, the file cannot tell: after a
change of those, write to another folder.
"""

import argparse
import multiprocessing
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import style
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student
from tqdm import tqdm

style.use()
import matplotlib.pyplot as plt  # noqa: E402

Rows = list[dict[str, Any]]

_FLOAT = "%.5g"


def _name(task: Any) -> tuple[str, ...]:
    """A task's fields as a CSV spells them."""
    return tuple(_FLOAT % value if isinstance(value, float) else str(value) for value in asdict(task).values())


def parser(doc: str, seeded: bool = True) -> argparse.ArgumentParser:
    """The options that the evidence scripts share; ``seeded`` runs are one for each seed, several at a time."""
    parsed = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if seeded:
        parsed.add_argument("--seeds", type=int, default=5)
        parsed.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parsed.add_argument("--quick", action="store_true", help="a small run that shows the main orderings, in a minute")
    parsed.add_argument("--draw", action="store_true", help="print and draw from the files in --out, and run nothing")
    parsed.add_argument("--out", type=Path, default=Path("out"), help="folder of the CSV files and pictures")
    return parsed


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def header(packages: Iterable[str] = (), threads: int = 1) -> str:
    """The command, the versions and the device, as the first line of a CSV."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "kondo-hooks", *packages))
    device = device_name() if threads == 1 else f"{device_name()}, {threads} threads"
    return f"# python {shlex.join(sys.argv)} | {versions} | {device}"


def read(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise SystemExit(f"{path} does not exist: run without --draw first")
    return pd.read_csv(path, comment="#", keep_default_na=False, na_values=[""])


def collect(
    tasks: Sequence[Any],
    work: Callable[[Any], Rows],
    path: Path,
    workers: int,
    packages: Iterable[str] = (),
    threads: int = 1,
) -> pd.DataFrame:
    """Run the tasks that the file at ``path`` does not hold yet, and add the rows of each as it ends.

    The file is replaced as a whole, so that all rows of a run are in it or none, and holds its runs in the order of the
    tasks, whichever worker ended first.

    Args:
        tasks: frozen dataclasses of one class.
        work: a module's function from a task to its rows, without the task's own fields.
        path: the CSV.
        workers: processes; with 1 the tasks run in this one.
        packages: further packages whose versions matter.
        threads: of torch, in each process.

    Raises:
        SystemExit: if the file holds runs that were not asked for, or was made with other versions or on another
            device; it is left alone.
        ValueError: if a run leaves no rows, or rows with other columns than the runs before it.
    """
    wanted = {_name(task): task for task in tasks}
    first, columns, runs = header(packages, threads), "", dict[tuple[str, ...], str]()
    if path.exists():
        made, columns, runs = _held(path, [field.name for field in fields(tasks[0])])
        if made.split(" | ")[1:] != first.split(" | ")[1:]:
            raise SystemExit(f"{path} was made elsewhere ({made.partition(' | ')[2]}): give another --out")
        if strange := set(runs) - set(wanted):
            raise SystemExit(f"{path} holds runs that were not asked for, such as {min(strange)}: give another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    remaining = [task for name, task in wanted.items() if name not in runs]
    with tqdm(total=len(remaining), desc=path.stem, unit="run", smoothing=0) as bar:
        for task, rows in _results(remaining, work, workers, threads):
            frame = pd.DataFrame([{**asdict(task), **row} for row in rows])
            names, _, text = frame.to_csv(index=False, float_format=_FLOAT, lineterminator="\n").partition("\n")
            if not rows or names != (columns or names):
                raise ValueError(f"{task} left {len(rows)} rows of {names}, where the file has {columns}")
            columns, runs[_name(task)] = names, text
            renewed = path.with_suffix(".part")
            renewed.write_text("".join([f"{first}\n{columns}\n", *(runs[name] for name in wanted if name in runs)]))
            renewed.replace(path)
            bar.update()
    return read(path)


def collect_each(
    files: dict[str, tuple[Callable[[Any], Rows], Sequence[Any]]], args: argparse.Namespace
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Collect the files that were asked for, each a work and its tasks by the file's name, and read those that exist.

    Yields:
        Name and rows of a file, once it is complete.

    Raises:
        SystemExit: as :func:`collect`, and if there is nothing to read.
    """
    found = False
    for name, (work, tasks) in files.items():
        path = args.out / f"{name}.csv"
        if not args.draw and args.only in (None, name):
            collect(tasks, work, path, args.workers)
        if path.exists():
            found = True
            yield name, read(path)
    if not found:
        raise SystemExit(f"{args.out} holds none of {', '.join(files)}: run without --draw first")


def _held(path: Path, key: list[str]) -> tuple[str, str, dict[tuple[str, ...], str]]:
    """A file's first line, its columns, and the lines of each run."""
    made, columns, *lines = path.read_text().splitlines(keepends=True)
    frame = pd.read_csv(path, comment="#", dtype=str, keep_default_na=False)
    runs: dict[tuple[str, ...], str] = {}
    for name, line in zip(frame[key].itertuples(index=False, name=None), lines, strict=True):
        runs[name] = runs.get(name, "") + line
    return made.rstrip("\n"), columns.rstrip("\n"), runs


def _results(tasks: list[Any], work: Callable[[Any], Rows], workers: int, threads: int) -> Iterable[tuple[Any, Rows]]:
    if workers == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield from ((task, work(task)) for task in tasks)
        finally:
            torch.set_num_threads(before)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        running = {pool.submit(work, task): task for task in tasks}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def interval(values: "pd.Series[float]") -> float:
    """Half of the 95% interval of the mean, by Student's t; 0 of a single value."""
    known = values.dropna()
    return float(student.ppf(0.975, len(known) - 1) * known.sem()) if len(known) > 1 else 0.0


def spread(values: "pd.Series[float]", form: str = "{:.1f}") -> str:
    """``mean +- half of the 95% interval``; of a single value, the value."""
    mean = form.format(values.mean())
    return f"{mean} +- {form.format(interval(values))}" if values.count() > 1 else mean


def reached(runs: pd.DataFrame, target: float) -> pd.DataFrame:
    """For each seed that reached it, the first row whose error is at most ``target``."""
    return runs[runs.error <= target].sort_values("step").groupby("seed").first()


def cost(runs: pd.DataFrame, target: float) -> dict[str, str]:
    """What it took to reach an error, means over seeds; or how many seeds did, if not all."""
    first, seeds = reached(runs, target), runs.seed.nunique()
    cell = f"{len(first)} of {seeds} seeds"
    if len(first) == seeds:
        cell = f"{first.step.mean():,.0f} | {first.backward_rows.mean():,.0f} | {spread(first.seconds)}"
    return {f"{target:.0%}: steps | rows | seconds": cell}


def curve(axis: Axes, runs: pd.DataFrame, x: str, y: str = "error", **style: Any) -> None:
    """The mean over seeds at each step, with its 95% interval as a band."""
    at = runs.groupby("step")
    across, mean = at[x].mean() if x != "step" else pd.Series(sorted(runs.step.unique())), at[y].mean()
    half = at[y].apply(interval).to_numpy()
    axis.plot(across.to_numpy(), mean.to_numpy(), **style)
    low, high = (mean.to_numpy() + sign * half for sign in (-1, 1))
    axis.fill_between(across.to_numpy(), low.clip(min=0), high, color=style.get("color"), alpha=0.12, lw=0)


def points(axis: Axes, values: "pd.Series[float]", by: "pd.Series[float]", label: str, aside: float = 1.0) -> None:
    """The mean of ``values`` at each value of ``by``, with its 95% interval, in the method's colour.

    Args:
        axis: where.
        values: of all runs.
        by: what is along the x axis, alike indexed.
        label: the method.
        aside: factor on x, so that intervals do not hide each other.
    """
    at = values.groupby(by)
    mean, color = at.mean(), style.color(label)
    axis.plot(mean.index * aside, mean, "o-", color=color, ms=4, label=label)
    axis.errorbar(mean.index * aside, mean, at.apply(interval), fmt="none", ecolor=color, elinewidth=1)


def save(figure: Figure, path: Path) -> None:
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"wrote {path}")


def print_table(table: pd.DataFrame | Rows, title: str) -> None:
    print(f"\n{title}\n{pd.DataFrame(table).to_string(index=False)}")
