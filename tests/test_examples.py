"""The programs a user copies run as they are, and show what they claim."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(script, *args):
    done = subprocess.run([sys.executable, str(ROOT / script), *args], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_mnist_bandit_learns_by_delight_and_not_by_random_rows(tmp_path):
    out = run("examples/mnist_bandit.py", "--steps", "500", "--seeds", "1", "--rates", "0.03", "--out", str(tmp_path))
    assert "DG-K 3%" in out and (tmp_path / "mnist_bandit.png").stat().st_size > 10_000
    with (tmp_path / "mnist_bandit.csv").open() as file:
        last = {row["method"]: row for row in csv.DictReader(file) if row["step"] == "500"}
    error = {name: float(row["test_error"]) for name, row in last.items()}
    assert error["DG-K 3%"] < 0.2 < 0.3 < error["random 3%"]
    assert {name: int(row["backward_rows"]) for name, row in last.items()} == {
        "PG": 50_000,
        "DG": 50_000,
        "DG-K 3%": 1_500,
        "random 3%": 1_500,
    }


@pytest.mark.slow
def test_quickstart():
    out = run("examples/quickstart.py")
    assert "before: test error" in out and "skipped=97.0%" in out


@pytest.mark.slow
def test_benchmark_of_a_step(tmp_path):
    out = run("benchmarks/step.py", "--rounds", "2", "--model", "MLP", "--out", str(tmp_path))
    with (tmp_path / "step.csv").open() as file:
        assert file.readline().startswith("# python benchmarks/step.py")
        rows = {row["step"]: row for row in csv.DictReader(file)}
    assert set(rows) >= {"full step", "kondo-gate 0.1.0, 3%", "floor, 3%: the three below", "gated, 3%"}
    assert float(rows["gated, 3%"]["saved_mb"]) < 0.1 * float(rows["full step"]["saved_mb"])
    assert "x floor" in out


def test_help_of_every_program():
    for script in ("examples/mnist_bandit.py", "benchmarks/step.py"):
        assert "usage:" in run(script, "--help")
