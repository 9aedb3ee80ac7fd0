"""The emulated device, compiled once for each version of torch and of its source."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("emu.cpp")


class NoCompilerError(Exception):
    """There is no C++ compiler on this machine."""


def library() -> Path:
    """The shared library, built now if nobody has built it yet; half a minute.

    Raises:
        NoCompilerError: if there is no compiler to build it with.
        RuntimeError: with the compiler's words if it fails.
    """
    key = hashlib.sha256(f"{torch.__version__}|{os.uname().machine}".encode() + SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"kondo-hooks-emu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    built = folder / f"emu-{key}.so"
    if built.exists():
        return built
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NoCompilerError("no C++ compiler (g++ or clang++) at hand to build the emulated device")
    with open(folder / f"emu-{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two workers may ask at once
        if not built.exists():
            _compile(compiler, built)
    return built


def _compile(compiler: str, built: Path) -> None:
    root = Path(torch.__file__).parent
    partial = built.with_suffix(f".{os.getpid()}.tmp")
    command = [compiler, "-O0", "-std=c++20", "-fPIC", "-shared", str(SOURCE), "-o", str(partial)]
    command += [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-L{root}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root}/lib"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulated device does not compile:\n{done.stderr[-4000:]}")
    partial.replace(built)
