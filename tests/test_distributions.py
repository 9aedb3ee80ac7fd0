"""``log_prob`` of distributions, in the loss code and inside the model: delight without naming anything."""

import pytest
import torch
from torch import distributions as D
from torch import nn

import kondo_hooks as kondo
from tests.reference import copies, grads, kept_mask, largest_relative_difference

B, F, A = 12, 5, 3


class Heads(nn.Module):
    """Two (B, A) outputs of any sign."""

    def __init__(self, width=A):
        super().__init__()
        self.one, self.two = nn.Linear(F, width), nn.Linear(F, width)

    def forward(self, x):
        return self.one(x), self.two(x)


class Shifted(D.Normal):
    """A user's own, which asks its base class."""

    def log_prob(self, value):
        return super().log_prob(value - 0.5) + 0.0


def mixture(a, b):
    return D.MixtureSameFamily(
        D.Categorical(logits=a), D.Independent(D.Normal(torch.stack([a, b, a + b], -1).transpose(1, 2), 1.0), 1)
    )


def tanh_normal(a, b):
    return D.TransformedDistribution(D.Normal(a, b.exp()), [D.transforms.TanhTransform(cache_size=1)])


def multivariate(a, b):
    return D.MultivariateNormal(a, scale_tril=torch.diag_embed(b.exp()))


real = torch.randn(B, A, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
unit = real.sigmoid()
POLICIES = {
    "normal": (lambda a, b: D.Normal(a, b.exp()), real),
    "independent": (lambda a, b: D.Independent(D.Normal(a, b.exp()), 1), real),
    "multivariate": (multivariate, real),
    "tanh": (tanh_normal, unit * 1.6 - 0.8),
    "mixture": (mixture, real),
    "beta": (lambda a, b: D.Beta(a.exp(), b.exp()), unit),
    "dirichlet": (lambda a, b: D.Dirichlet(a.exp()), unit / unit.sum(-1, keepdim=True)),
    "one_hot": (lambda a, b: D.OneHotCategorical(logits=a), torch.eye(A, dtype=torch.float64)[torch.arange(B) % A]),
    "categorical": (lambda a, b: D.Categorical(logits=a), torch.arange(B) % A),
    "bernoulli": (lambda a, b: D.Bernoulli(logits=a), (real > 0).double()),
    "binomial": (lambda a, b: D.Binomial(5, logits=a), (unit * 5).round()),
    "poisson": (lambda a, b: D.Poisson(a.exp()), (unit * 5).round()),
    "log_normal": (lambda a, b: D.LogNormal(a, b.exp()), unit),
    "of_the_users": (lambda a, b: Shifted(a, b.exp()), real),
}


def of_rows(log_probs):
    return log_probs if log_probs.dim() == 1 else log_probs.sum(-1)


@pytest.mark.parametrize("name", POLICIES)
def test_a_distribution_in_the_loss_code_is_the_policy(name):
    make, action = POLICIES[name]
    model, reference = copies(Heads().double())
    x, advantages = torch.randn(B, F).double(), torch.randn(B).double()

    def terms(m):
        return of_rows(make(*m(x)).log_prob(action)) * -advantages

    with kondo.gated(model, rate=0.25) as gate:
        terms(model).mean().backward()
    torch.testing.assert_close(gate.last.delight, terms(reference).detach())
    (terms(reference) * kept_mask(gate.last.kept, B, torch.float64)).mean().backward()
    assert {n for n, g in grads(model).items() if g is not None} >= {
        n for n, g in grads(reference).items() if g is not None
    }
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


class ActorCritic(nn.Module):
    """Evaluates actions as PPO's implementations do, several ways."""

    def __init__(self, make, order):
        super().__init__()
        self.heads, self.critic, self.make, self.order = Heads(), nn.Linear(F, 1), make, order

    def forward(self, x):
        return self.heads(x)

    def evaluate(self, x, action):
        policy = self.make(*self.heads(x))
        parts = {"action": action, "logp": of_rows(policy.log_prob(action)), "value": self.critic(x).flatten()}
        parts["entropy"] = self.heads.two(x).sum(-1)
        return tuple(parts[name] for name in self.order)


@pytest.mark.parametrize("order", [("value", "logp", "entropy"), ("action", "logp", "entropy", "value")])
@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("mixture",)])
def test_a_distribution_inside_of_the_model_needs_the_method_and_no_more(name, order):
    make, action = POLICIES[name]
    model, reference = copies(ActorCritic(make, order).double())
    x, advantages, old = torch.randn(B, F).double(), torch.randn(B).double(), torch.randn(B).double()

    def terms(m):
        out = dict(zip(order, m.evaluate(x, action), strict=True))
        ratio = (out["logp"] - old - (out["logp"] - old).detach()).exp()
        return -ratio * advantages + 0.5 * (out["value"] - 1) ** 2 - 0.01 * out["entropy"], out["logp"]

    with kondo.gated(model, rate=0.25, method="evaluate") as gate:
        terms(model)[0].mean().backward()
    torch.testing.assert_close(gate.last.delight, -advantages * terms(reference)[1].detach())
    (terms(reference)[0] * kept_mask(gate.last.kept, B, torch.float64)).mean().backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10


def test_several_discrete_actions_stacked_and_summed():
    class MultiDiscrete(nn.Module):
        def __init__(self):
            super().__init__()
            self.pi, self.v = nn.Linear(F, 7), nn.Linear(F, 1)

        def forward(self, x, actions):
            heads = [D.Categorical(logits=part) for part in self.pi(x).split([3, 4], 1)]
            logp = torch.stack([head.log_prob(a) for head, a in zip(heads, actions.unbind(1), strict=True)], dim=1)
            return self.v(x), logp.sum(dim=1), torch.stack([head.entropy() for head in heads], dim=1).sum(dim=1)

    model, reference = copies(MultiDiscrete().double())
    x, advantages, actions = torch.randn(B, F).double(), torch.randn(B).double(), torch.randint(3, (B, 2))
    with kondo.gated(model, rate=0.25) as gate:
        value, logp, entropy = model(x, actions)
        (-(logp * advantages).mean() + 0.5 * value.pow(2).mean() - 0.01 * entropy.mean()).backward()
    torch.testing.assert_close(gate.last.delight, -advantages * reference(x, actions)[1].detach())


def test_a_name_wins_over_a_distribution_inside():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = Heads()

        def forward(self, x, a):
            one, two = self.heads(x)
            return D.Normal(one, 1.0).log_prob(a).sum(-1), two.log_softmax(-1).gather(1, a.abs().long()[:, :1])[:, 0]

    model = Two().double()
    x, advantages, a = torch.randn(B, F).double(), torch.randn(B).double(), real.clamp(-2, 2)
    with kondo.gated(model, rate=0.25, logp=1) as gate:
        density, logp = model(x, a)
        (-(logp * advantages) - 0.1 * density).mean().backward()
    torch.testing.assert_close(gate.last.delight, -advantages * logp.detach())


def test_what_the_model_detaches_is_no_policy_of_a_distribution():
    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = Heads()

        def forward(self, x, a):
            one, two = self.heads(x)
            return one, two, D.Normal(one, two.exp()).log_prob(a).sum(-1).detach()

    model = Old().double()
    x, advantages = torch.randn(B, F).double(), torch.randn(B).double()
    with kondo.gated(model, rate=0.25) as gate:
        one, two, old = model(x, real)
        logp = D.Normal(one, two.exp()).log_prob(real).sum(-1)
        (-(logp - old).exp() * advantages).mean().backward()
    torch.testing.assert_close(gate.last.delight, -advantages * logp.detach())


def test_no_trace_is_left_and_classes_made_inside_are_seen():
    before = {kind: kind.__dict__.get("log_prob") for kind in (D.Distribution, D.Normal, D.Independent, Shifted)}
    model = Heads().double()
    x, advantages = torch.randn(B, F).double(), torch.randn(B).double()
    with kondo.gated(model, rate=0.25) as gate:

        class Late(D.Normal):
            def log_prob(self, value):
                return -((value - self.loc) ** 2)

        logp = Late(model(x)[0], 1.0).log_prob(real).sum(-1)
        (-logp * advantages).mean().backward()
    torch.testing.assert_close(gate.last.delight, -advantages * logp.detach())
    assert before == {kind: kind.__dict__.get("log_prob") for kind in before}
    assert "__init_subclass__" not in D.Distribution.__dict__ and Late.log_prob.__qualname__.endswith("Late.log_prob")
    assert not hasattr(Late.log_prob, "__wrapped__")


def test_a_loss_compiled_whole_still_compiles():
    model = Heads().double()
    x, advantages = torch.randn(B, F).double(), torch.randn(B).double()

    @torch.compile(fullgraph=True, backend="eager")
    def log_prob(mean):
        return D.Normal(mean, 1.0).log_prob(real).sum(-1)

    with kondo.gated(model, rate=0.25) as gate:
        logp = gate.logp(log_prob(model(x)[0]))
        (-logp * advantages).mean().backward()
    torch.testing.assert_close(gate.last.delight, -advantages * logp.detach())


def test_log_probs_without_a_graph_are_refused_where_the_model_has_one():
    model = Heads().double()
    x = torch.randn(B, F).double()
    with kondo.gated(model, rate=0.25) as gate:
        logp = D.Normal(model(x)[0], 1.0).log_prob(real).sum(-1)
        with torch.no_grad():
            assert gate.logp(logp.detach()).equal(logp)
        with pytest.raises(kondo.DelightError, match="no graph"):
            gate.logp(logp.detach())


@pytest.mark.parametrize("form", ["neg", "minus", "sum of negatives", "negative of a sum", "twice"])
def test_the_negative_of_a_log_prob_inside_of_the_model_is_one(form):
    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = Heads()

        def forward(self, x, actions):
            one, two = self.heads(x)
            logp = D.Normal(one, two.exp()).log_prob(actions)
            return {
                "neg": lambda: logp.sum(-1).neg(),
                "minus": lambda: -logp.sum(-1),
                "sum of negatives": lambda: (-logp).sum(-1),
                "negative of a sum": lambda: torch.negative(logp.sum(-1).view(-1, 1)).squeeze(-1),
                "twice": lambda: logp.neg().neg().neg().sum(-1),
            }[form]()

    model, reference = copies(Policy().double())
    x, advantages = torch.randn(B, F, dtype=torch.float64), torch.randn(B, dtype=torch.float64)
    with kondo.gated(model, rate=0.25) as gate:
        (model(x, real) * advantages).mean().backward()
    (reference(x, real) * advantages * gate.last.factors()).mean().backward()
    assert largest_relative_difference(grads(model), grads(reference)) < 1e-10
    torch.testing.assert_close(gate.last.delight, (reference(x, real) * advantages).detach())
