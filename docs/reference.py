"""The whole idea in thirty lines, for a model that takes and returns one tensor with rows on axis 0.

``tests/test_reference.py`` holds ``kondo.gated`` against it. What the package adds is everything else that programs do.
"""

import torch


class Screened(torch.autograd.Function):
    """The outputs of a forward without a graph; its backward is a replay of the rows worth one."""

    @staticmethod
    def forward(ctx, anchor, model, x, advantages, actions, rate):
        with torch.no_grad():
            logits = model(x)
        ctx.model, ctx.x, ctx.rate = model, x, rate
        ctx.delight = advantages * -logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]
        return logits

    @staticmethod
    def backward(ctx, g):
        k = max(1, round(ctx.rate * len(g)))
        kept = ctx.delight.topk(k).indices
        with torch.enable_grad():
            replayed = ctx.model(ctx.x[kept])  # the only forward that builds a graph
        replayed.backward(g[kept])
        return None, None, None, None, None, None


def gated_call(model, x, advantages, actions, rate):
    """Call ``model`` on ``x``; whatever loss is made of the result, its backward costs a share of the rows."""
    anchor = torch.zeros((), requires_grad=True)  # so that a backward reaches the node
    return Screened.apply(anchor, model, x, advantages, actions, rate)
