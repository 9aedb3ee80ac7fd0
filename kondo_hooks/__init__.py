"""Skip most backward passes of a policy-gradient step, for real, with one line.

import kondo_hooks as kondo

with kondo.gated(model, rate=0.03):
    ...  # the training loop, unchanged
"""

from kondo_hooks import rules
from kondo_hooks.api import gated
from kondo_hooks.checking import Checked, Way, check
from kondo_hooks.errors import DelightError, KondoWarning, PackError, PrefixError, RankError, ReplayMismatchError
from kondo_hooks.gate import (
    KondoGate,
    KondoGateConfig,
    KondoGateOutput,
    KondoTrainer,
    dg_loss,
    expected_confidence_baseline,
    pg_loss,
)
from kondo_hooks.handle import Gated
from kondo_hooks.rules.config import SelectionConfig, additive
from kondo_hooks.rules.samples import Decision, Rows, Signal
from kondo_hooks.rules.selection import Selector
from kondo_hooks.stats import Stats

__version__ = "0.2.0"

__all__ = [
    "Checked",
    "Decision",
    "DelightError",
    "Gated",
    "KondoGate",
    "KondoGateConfig",
    "KondoGateOutput",
    "KondoTrainer",
    "KondoWarning",
    "PackError",
    "PrefixError",
    "RankError",
    "ReplayMismatchError",
    "Rows",
    "SelectionConfig",
    "Selector",
    "Signal",
    "Stats",
    "Way",
    "additive",
    "check",
    "dg_loss",
    "expected_confidence_baseline",
    "gated",
    "pg_loss",
    "rules",
]
