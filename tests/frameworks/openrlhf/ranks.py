"""The recipes on several ranks, each with rows of its own."""

from tests.frameworks.openrlhf import cpu
from tests.frameworks.openrlhf.trainers import compared


def main(options):
    found = []
    with cpu.without_cuda():
        for name, rule, given in options:
            case = compared(name, rule, **given)
            stats = case["gate"].stats
            told = {key: case[key] for key in ("difference", "from plain", "tokens", "full")}
            norms = [case[which]["actor_grad_norm"] for which in ("logged", "masked")]
            found.append(told | {"kept": stats.kept, "rows": stats.rows, "norms": norms})
    return found
