"""How often a plain step changes from one file of the package to another, counted while it runs.

    python docs/count_files.py

Prints the number, and the files in the order in which the step comes to them first. A step is a call of the model, the
loss, and the backward with its decision and replay: here of an MLP on one process, the third one.
"""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import torch
from torch import nn

import kondo_hooks as kondo

PACKAGE = str(Path(kondo.__file__).parent)


def count() -> tuple[int, list[str]]:
    """Changes of file, and the files in the order of their first appearance."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x, actions, u = torch.randn(64, 8), torch.randint(0, 4, (64, 1)), torch.randn(64)
    visited: list[str] = []

    def look(frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(PACKAGE) and (not visited or visited[-1] != file):
            visited.append(file)

    with kondo.gated(model, rate=0.1):
        for step in range(3):
            sys.setprofile(look if step == 2 else None)
            (-(model(x).log_softmax(-1).gather(1, actions)[:, 0] * u).mean()).backward()
            sys.setprofile(None)
    return len(visited) - 1, [str(Path(file).relative_to(PACKAGE)) for file in Counter(visited)]


if __name__ == "__main__":
    changes, files = count()
    print(f"{changes} changes of file, among {len(files)}: {', '.join(files)}")
