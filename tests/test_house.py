"""The directions in which the package's parts may import each other, and where private names of torch may stand."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kondo_hooks"
# From the ground up: a part imports itself and those before it.
ORDER = [
    *("errors", "private", "rules", "stats", "report", "rows", "same", "delight", "hosts", "core", "routes", "ranks"),
    *("handle", "api", "checking", "gate", "__init__"),
]
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path) for path in FILES}


def imports(path: Path, late: bool) -> set[str]:
    """The package's modules that a file imports; ``late`` counts those inside functions, too."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree) if late else tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kondo_hooks":
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                found.add(inside if inside in MODULES else node.module)
    return found


def part_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_import_runs_up(path: Path):
    here = ORDER.index(part_of(name_of(path)))
    # A host's adapter is imported where that host is in use, and stands above all.
    others = {module for module in imports(path, late=True) if ".integrations" not in module}
    assert not [module for module in others if ORDER.index(part_of(module)) > here]


def test_there_is_no_cycle():
    list(TopologicalSorter({name_of(path): imports(path, late=False) for path in FILES}).static_order())


def test_every_part_has_its_place():
    assert {part_of(module) for module in MODULES} == set(ORDER)


PRIVATE = re.compile(
    r"torch\._|_input_metadata|_execution_engine|_post_accumulate_grad_hooks|_pop_mode|_push_mode|parametrize\._cache_enabled"
    r"|distributed_c10d|_get_fsdp_state|_fsdp_param_groups|_sync_gradients|_call_impl|_forward_hooks_with_kwargs"
)


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "private.py"], ids=name_of)
def test_private_names_of_torch_stand_in_one_file(path: Path):
    code = "\n".join(line for line in path.read_text().splitlines() if '"torch._dynamo"' not in line)
    tree = ast.parse(code)
    for node in ast.walk(tree):  # not what is said of them
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not {name for name in names if PRIVATE.search(name) and not name.startswith("private.")}
