"""The snippets of docs/integrations.md run as they stand, and gate what they say."""

import re

import pytest

from tests import forks

TEXT = (forks.ROOT / "docs" / "integrations.md").read_text()
SETUP, *SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.S)

# What each snippet's gate has to show at its end.
CHECK = """
import gc
import kondo_hooks
gates = [found for found in gc.get_objects() if type(found) is kondo_hooks.Gated and found.stats.steps]
assert gates and all(g.stats.kept < g.stats.rows and g.stats.forwarded < g.stats.rows_screened for g in gates), gates
assert "_compiled_call_impl" not in vars(gates[-1].model)
"""


def name(snippet):
    found = re.search(r"^(?:trainer = |fabric = |accelerator = )([\w.]+)", snippet, re.M)
    mixed = re.search(r"class MyTrainer\((.*)\)", snippet)
    return mixed[1] if mixed else found[1] + (" callback" if "KondoCallback" in snippet else "")


def test_every_host_has_a_snippet():
    wanted = ["Trainer", "Trainer callback", "GRPOTrainer", "KondoMixin, GRPOTrainer", "KondoMixin, RLOOTrainer"]
    wanted += ["SFTTrainer", "DPOTrainer", "pl.Trainer callback", "Fabric", "Accelerator"]
    assert [name(snippet) for snippet in SNIPPETS] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("snippet", SNIPPETS, ids=name)
def test_snippet(snippet, tmp_path):
    # A gate that a callback owned is gone with it, so the callback's are kept alive.
    keep = "import kondo_hooks\nkept, make = [], kondo_hooks.gated\n"
    keep += "kondo_hooks.gated = lambda *a, **k: kept.append(make(*a, **k)) or kept[-1]\n"
    program = tmp_path / "program.py"
    program.write_text(keep + SETUP + snippet + CHECK)
    done = forks.program(program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
