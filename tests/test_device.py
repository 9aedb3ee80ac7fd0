"""An accelerator is emulated, and the tests in ``tests/device`` run on it in a process of their own.

Registering such a device changes a whole process: torch takes it for the machine's accelerator from then on.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device.build import NoCompilerError, library
from tests.ranks.launch import launch

ROOT = Path(__file__).parent.parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "device").glob("test_*.py"))


@pytest.fixture(scope="module")
def built() -> Path:
    try:
        return library()
    except NoCompilerError as error:
        pytest.skip(f"not tested on an emulated device: {error}")


@pytest.mark.parametrize("file", FILES)
def test_on_the_emulated_device(file: str, built: Path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"KONDO_EMULATED_DEVICE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"


def test_ranks_exchange_over_their_process_group_wherever_the_model_is(built: Path):
    options = {"plain": {}, "balance": {"balance": True}, "micro-batches": {"micro_batch_size": 2}}
    first, second = launch("tests.device.on_ranks", 2, {"fails": False, "options": options}, 200)
    for name in options:
        found = first[name], second[name]
        assert all(each["difference"] < 1e-10 and not each["races"] for each in found)
        assert sum(each["kept"] for each in found) == 12
        if name == "balance":
            assert [each["forwarded"] for each in found] == [6, 6]


def test_all_ranks_on_devices_fail_together(built: Path):
    healthy, failing = launch("tests.device.on_ranks", 2, {"fails": True, "options": {"plain": {}}}, 200)
    assert "NaN" in failing["plain"]["error"] and "rank 1" in healthy["plain"]["error"]


def test_a_decision_of_all_ranks_waits_as_often_however_many_there_are(built: Path):
    of_two, of_three = (
        launch("tests.device.on_ranks", n, {"fails": False, "counts": True}, 200)[0]["waits"] for n in (2, 3)
    )
    assert of_two[-1] == of_three[-1] <= 4


NAMES = "zeros ones empty full arange rand randn randint randperm tensor eye linspace empty_strided"
MAKE = {f"torch.{name}" for name in NAMES.split()}


@pytest.mark.parametrize("path", sorted((ROOT / "kondo_hooks").rglob("*.py")), ids=lambda path: path.name)
def test_tensors_of_the_gates_own_name_their_device(path: Path):
    """Or they would be made on the user's default device."""
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and ast.unparse(call.func) in MAKE:
            assert "device" in {keyword.arg for keyword in call.keywords}, f"{path.name}:{call.lineno}"


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NoCompilerError, match="no C\\+\\+ compiler"):
        library()
