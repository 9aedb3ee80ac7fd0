"""How many samples are kept, which, and how they weigh; and rules that others have published."""

from kondo_hooks.rules.published import Rule, cppo, pods, positive, random, surprising

__all__ = ["Rule", "cppo", "pods", "positive", "random", "surprising"]
