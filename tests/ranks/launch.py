"""Runs a worker module on several gloo processes, and collects what each rank reports."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]


def launch(module: str, ranks: int, argument: Any, timeout: float) -> list[Any]:
    """What ``module.main(argument)`` returns on each rank; raises RuntimeError naming a rank that failed or hangs."""
    with TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        started = []
        for rank in range(ranks):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                "TOKENIZERS_PARALLELISM": "false",
            }
            command = [sys.executable, "-m", "tests.ranks.launch", module, json.dumps(argument), f"{folder}/{rank}"]
            with open(f"{folder}/{rank}.log", "w") as log:
                process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            started.append(process)
        deadline = time.monotonic() + timeout
        while any(p.poll() is None for p in started):
            failed = any(p.poll() not in (None, 0) for p in started)
            if failed:
                deadline = min(deadline, time.monotonic() + 5)  # the others may be waiting for it
            if time.monotonic() > deadline:
                _end(started)
                break
            time.sleep(0.05)
        if any(p.returncode for p in started):
            told = [f"--- rank {r} ({p.returncode}) {_last(folder, r)}" for r, p in enumerate(started)]
            raise RuntimeError(f"{module} on {ranks} ranks\n" + "\n".join(told))
        return [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(ranks)]


def _end(started: list[subprocess.Popen]) -> None:
    """Kill what still runs, once it has written to its log where it is."""
    for process in started:
        process.send_signal(signal.SIGUSR1)
    time.sleep(1)
    for process in started:
        process.kill()
        process.wait()


def _last(folder: str, rank: int) -> str:
    at = Path(f"{folder}/{rank}.at")
    return f"was at: {at.read_text() if at.exists() else 'start'}\n{Path(f'{folder}/{rank}.log').read_text()[-6000:]}"


def at(where: str) -> None:
    """Note what this rank is doing, for the report if it hangs."""
    Path(f"{sys.argv[-1]}.at").write_text(where)


if __name__ == "__main__":
    import faulthandler
    import importlib

    import torch.distributed as dist

    # Not dump_traceback_later: it reads the frames of a thread that runs on, and can crash.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)

    result = importlib.import_module(sys.argv[1]).main(json.loads(sys.argv[2]))
    Path(f"{sys.argv[3]}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)  # communication threads that engines leave behind would abort an orderly exit
