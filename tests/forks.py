"""Processes forked from one that has imported the libraries, which takes longer than most of the work itself.

Each is as a new interpreter that has just imported them: it has its own gates, process groups and environment. What
it shares with its siblings is the seed of Python's hashes.
"""

import contextlib
import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
PINNED = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}


@functools.cache
def _forked() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.libraries"])
    with mock.patch.dict(os.environ, PINNED), contextlib.chdir(ROOT):
        forkserver.ensure_running()
    return context


def start(
    run: Callable[..., Any],
    *arguments: Any,
    out: Path,
    err: Path,
    environment: Mapping[str, str],
    cwd: Path = ROOT,
    fresh: bool = False,
) -> BaseProcess:
    """A process that runs ``run(*arguments)``; ``fresh``: in an interpreter of its own, which imports for itself."""
    context = multiprocessing.get_context("spawn") if fresh else _forked()
    process = context.Process(target=_run, args=(run, arguments, out, err, dict(environment), cwd))
    with mock.patch.dict(os.environ, environment):
        process.start()
    return process


def _run(
    run: Callable[..., Any], arguments: tuple, out: Path, err: Path, environment: dict[str, str], cwd: Path
) -> None:
    for path, stream in ((out, 1), (err, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, stream)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    run(*arguments)


def program(
    path: Path | str, *arguments: str, cwd: Path = ROOT, timeout: float = 230, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What ``python path *arguments`` does: its exit status, and what it writes."""
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        where = {"out": out, "err": err, "environment": {**os.environ, **PINNED, **environment}, "cwd": cwd}
        process = start(as_a_script, str(path), *arguments, **where)
        try:
            process.join(timeout)
        finally:
            process.kill()
            process.join()
        return subprocess.CompletedProcess([path, *arguments], process.exitcode, out.read_text(), err.read_text())


def as_a_script(path: str, *arguments: str) -> None:
    """Run a program in this process, which then imports from the program's folder and not from the tests'."""
    told = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [str(Path(path).parent), *[p for p in sys.path if p in told or p not in ("", str(ROOT))]]
    sys.argv[:] = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def compile_nothing() -> None:
    """Keep DeepSpeed from compiling, for a minute, an operator of inference that no test calls."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
