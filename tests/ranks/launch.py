"""Runs a worker module on several gloo processes, and collects what each rank reports."""

import faulthandler
import importlib
import json
import os
import signal
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests import forks


def launch(module: str, ranks: int, argument: Any, timeout: float, fresh: bool = False) -> list[Any]:
    """What ``module.main(argument)`` returns on each rank; raises RuntimeError naming a rank that failed or hangs.

    ``fresh``: each rank is an interpreter of its own, not a fork.
    """
    with TemporaryDirectory() as folder:
        run_ranks(_report, ranks, (module, argument, folder), folder, timeout, fresh)
        return [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(ranks)]


def run_ranks(
    run: Any, ranks: int, arguments: tuple, folder: Path | str, timeout: float, fresh: bool = False, **extra: str
) -> None:
    """Run ``run(*arguments)`` on each rank, in torchrun's environment; what it writes is in the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started: list[BaseProcess] = []
    try:
        for rank in range(ranks):
            environment = {
                **os.environ,
                **forks.PINNED,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                **extra,
            }
            out, err = (Path(f"{folder}/{rank}.{stream}") for stream in ("out", "err"))
            started.append(forks.start(run, *arguments, out=out, err=err, environment=environment, fresh=fresh))
        deadline = time.monotonic() + timeout
        while any(p.exitcode is None for p in started):
            failed = any(p.exitcode not in (None, 0) for p in started)
            if failed:
                deadline = min(deadline, time.monotonic() + 5)  # the others may be waiting for it
            if time.monotonic() > deadline:
                _end(started)
                break
            time.sleep(0.05)
    finally:
        for process in started:
            process.kill()
            process.join()
    if any(p.exitcode for p in started):
        told = [f"--- rank {r} ({p.exitcode}) {_last(folder, r)}" for r, p in enumerate(started)]
        raise RuntimeError(f"{arguments[0]} on {ranks} ranks\n" + "\n".join(told))


def _end(started: list[BaseProcess]) -> None:
    """Kill what still runs, once it has written to its log where it is."""
    for process in started:
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(1)
    for process in started:
        process.kill()
        process.join()


def _last(folder: Path | str, rank: int) -> str:
    at, *told = (Path(f"{folder}/{rank}.{name}") for name in ("at", "out", "err"))
    said = "".join(path.read_text()[-6000:] for path in told if path.exists())
    return f"was at: {at.read_text() if at.exists() else 'start'}\n{said}"


_notes: Path | None = None


def at(where: str) -> None:
    """Note what this rank is doing, for the report if it hangs."""
    if _notes is not None:
        _notes.write_text(where)


def _report(module: str, argument: Any, folder: str) -> None:
    """A rank: what the module returns, into the folder."""
    import torch.distributed as dist

    global _notes
    # Not dump_traceback_later: it reads the frames of a thread that runs on, and can crash.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    rank = os.environ["RANK"]
    _notes = Path(f"{folder}/{rank}.at")
    result = importlib.import_module(module).main(argument)
    Path(f"{folder}/{rank}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.barrier()
    _leave()


def script_on_a_rank(path: str, *arguments: str) -> None:
    """A rank that runs a program."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    forks.as_a_script(path, *arguments)
    _leave()


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # communication threads that engines leave behind would abort an orderly exit
