"""The suite on other versions of torch, and a table of what passed: ``make versions``.

Each environment is ``.venv-versions/<torch>``, made from ``constraints-<torch>.txt``. The tests that look at the tree
itself (lint, packaging, committed tables) and those that time something are of the development environment alone.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OF_THE_TREE = ("test_packaging", "test_evidence", "test_examples", "test_house", "test_fuzz", "test_device")
HOSTS = ("transformers", "trl", "accelerate", "peft", "lightning", "deepspeed")
ASK = f"""
import importlib.metadata as m, json, platform
found = {{"python": platform.python_version()}}
for name in {("torch", *HOSTS)!r}:
    try:
        found[name] = m.version(name).split("+")[0]
    except m.PackageNotFoundError:
        found[name] = ""
print(json.dumps(found))
"""


def run(python: Path, *arguments: str) -> dict[str, str]:
    """What an environment has installed, and how many tests passed in it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    row = json.loads(subprocess.run([python, "-c", ASK], check=True, capture_output=True, text=True).stdout)
    ignored = [f"--ignore=tests/{name}.py" for name in OF_THE_TREE] + [
        "--ignore=tests/device",
        "--ignore=tests/frameworks",
    ]
    command = [python, "-m", "pytest", "-q", "-n", "2", "-m", "not slow", *ignored, *arguments]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    for kind in ("passed", "failed", "skipped"):
        found = re.search(rf"(\d+) {kind}", lines[-1])
        row[kind] = found[1] if found else "0"
    return row


def main() -> None:
    rows = [run(ROOT / ".venv-versions" / version / "bin" / "python") for version in sys.argv[1:]]
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")
    if any(row["failed"] != "0" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
