"""The wheel holds the package and its adapters alone, and importing it needs nothing but torch."""

import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.markers import Marker

import kondo_hooks

ROOT = Path(__file__).resolve().parent.parent
HOSTS = [
    "accelerate",
    "datasets",
    "deepspeed",
    "gymnasium",
    "lightning",
    "matplotlib",
    "mlxtend",
    "pytorch_lightning",
    "transformers",
    "trl",
]
EXTRAS = {"transformers", "accelerate", "deepspeed", "trl", "lightning", "plot", "dev"}

pytestmark = pytest.mark.slow


def run(*command, cwd, **env):
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(command, cwd=cwd, env={**clean, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tracked():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return run("git", "ls-files", cwd=ROOT).splitlines()


@pytest.fixture(scope="module")
def build(tracked, tmp_path_factory):
    """Builds "wheel" or "sdist" from a copy of the tracked files, with the installed setuptools and no network."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")
    for name in tracked:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)

    def built(kind):
        out = tmp_path_factory.mktemp(kind)
        run(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(source), cwd=out)
        (found,) = out.iterdir()
        return found

    return built


@pytest.fixture(scope="module")
def wheel(build):
    return build("wheel")


@pytest.fixture(scope="module")
def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def requirements(metadata):
    """{extra or None: names of what it requires}."""
    found = {}
    for line in metadata.get_all("Requires-Dist") or []:
        name = re.match(r"[\w.-]+", line).group().lower()
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        found.setdefault(extra.group(1) if extra else None, set()).add(name)
    return found


IMPORT = """
import json, sys
import kondo_hooks
loaded = sorted(sys.modules)
import kondo_hooks.integrations
print(json.dumps({
    "package": kondo_hooks.__file__,
    "integrations": kondo_hooks.integrations.__file__,
    "loaded": loaded,
    "then": sorted(sys.modules),
    "public": [name for name in kondo_hooks.__all__ if hasattr(kondo_hooks, name)],
}))
"""


def imported(cwd, **env):
    return json.loads(run(sys.executable, "-c", IMPORT, cwd=cwd, **env).splitlines()[-1])


def assert_no_host_library(modules):
    assert not {name.split(".")[0] for name in modules} & set(HOSTS)


def test_the_wheel_holds_every_tracked_module_and_the_type_marker(contents, tracked):
    assert "kondo_hooks/py.typed" in contents and "kondo_hooks/integrations/__init__.py" in contents
    expected = [name for name in tracked if re.fullmatch(r"kondo_hooks/[\w/]+\.py", name)]
    expected += [f"kondo_hooks/{name}" for name in tracked if re.fullmatch(r"integrations/\w+\.py", name)]
    assert len(expected) > 5 and set(expected) <= set(contents)


def test_the_wheel_holds_nothing_else(contents):
    info = f"kondo_hooks-{kondo_hooks.__version__}.dist-info/"
    others = [n for n in contents if not n.startswith(info) and not re.fullmatch(r"kondo_hooks/.*(\.py|py\.typed)", n)]
    assert others == []
    assert not [n for n in contents if re.search(r"(^|/)(tests?|benchmarks|examples|conftest)(/|\.|_)", n)]
    assert any(n.startswith(info) and n.endswith("LICENSE") for n in contents)


def test_the_installed_wheel_and_its_adapters_import_from_anywhere(wheel, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    options = ("--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--target", str(target))
    run(sys.executable, "-m", "pip", "install", *options, str(wheel), cwd=elsewhere)
    assert not (target / "tests").exists() and not (target / "integrations").exists()
    found = imported(elsewhere, PYTHONPATH=str(target))
    assert Path(found["package"]).is_relative_to(target) and Path(found["integrations"]).is_relative_to(target)
    assert found["public"] == kondo_hooks.__all__
    assert_no_host_library(found["then"])


def test_the_editable_install_and_its_adapters_import_from_anywhere_without_a_host_library(tmp_path):
    found = imported(tmp_path)
    assert Path(found["package"]) == ROOT / "kondo_hooks" / "__init__.py"
    assert Path(found["integrations"]) == ROOT / "integrations" / "__init__.py"
    assert "torch" in found["loaded"] and "kondo_hooks.handle" in found["loaded"]
    assert not [name for name in found["loaded"] if name.startswith("kondo_hooks.integrations")]
    assert_no_host_library(found["loaded"])
    assert_no_host_library(found["then"])


def test_the_wheel_needs_no_numpy(wheel, tmp_path):
    """In an environment of torch's own requirements and nothing else."""
    site = tmp_path / "site"
    site.mkdir()
    waiting, seen = ["torch"], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        found = importlib.metadata.distribution(name)
        for line in found.requires or []:
            required, _, condition = line.partition(";")
            if not condition or ("extra" not in condition and Marker(condition).evaluate()):
                waiting.append(re.match(r"[\w.-]+", required).group().lower())
        for top in {Path(str(file)).parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(found.locate_file(top)).resolve())
    assert not (site / "numpy").exists()
    options = ("--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--target", str(site))
    run(sys.executable, "-m", "pip", "install", *options, str(wheel), cwd=tmp_path)
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    told = run(str(base), "-W", "error::kondo_hooks.KondoWarning", "-I", "-c", WITHOUT_NUMPY, str(site), cwd=tmp_path)
    assert told.split() == ["False", "2", "8"]


WITHOUT_NUMPY = """
import sys
sys.path = [path for path in sys.path if "site-packages" not in path] + [sys.argv[1]]
import torch
import kondo_hooks as kondo
model = torch.nn.Linear(3, 4)
with kondo.gated(model, rate=0.25) as gate:
    logp = model(torch.randn(8, 3)).log_softmax(-1)[torch.arange(8), torch.arange(8) % 4]
    (-torch.randn(8) * logp).mean().backward()
print("numpy" in sys.modules, gate.stats.kept, gate.stats.rows)
"""


@pytest.fixture(scope="module")
def unpacked(build, tmp_path_factory):
    """The source distribution, as a user unpacks it."""
    out = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(build("sdist"), out, filter="data")
    (found,) = out.iterdir()
    return found


def test_the_source_distribution_holds_what_its_tests_need(unpacked, tracked):
    left_out = {name for name in tracked if not (unpacked / name).exists()}
    assert left_out <= {".gitignore", "MANIFEST.in"} | {name for name in tracked if name.startswith(".github/")}
    some = ("tests/test_world.py", "tests/test_house.py", "tests/test_delight.py")
    told = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *some, cwd=unpacked)
    assert re.search(r"\d+ passed", told) and "failed" not in told


def test_the_wheel_requires_torch_alone_and_has_an_extra_for_each_host(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Name"] == "kondo-hooks" and metadata["Version"] == kondo_hooks.__version__
    required = requirements(metadata)
    assert required[None] == {"torch"}
    assert set(metadata.get_all("Provides-Extra")) >= EXTRAS
    for extra in ("transformers", "accelerate", "deepspeed", "trl", "lightning"):
        assert extra in required[extra]
    assert "matplotlib" in required["plot"] and "pytest" in required["dev"]


def test_the_installed_metadata_is_that_of_the_source():
    metadata = importlib.metadata.metadata("kondo-hooks")
    assert metadata["Version"] == kondo_hooks.__version__
    assert requirements(metadata)[None] == {"torch"} and set(metadata.get_all("Provides-Extra")) >= EXTRAS
