"""Errors and warnings of the gate."""

import sys
import warnings


class DelightError(RuntimeError):
    """Delight cannot be known from what the gate saw; the message says what to name.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> model, x = torch.nn.Linear(8, 4), torch.randn(6, 8)
        >>> with kondo.gated(model, rate=0.5):  # a regression has no policy
        ...     model(x).pow(2).mean().backward()
        Traceback (most recent call last):
        ...
        kondo_hooks.errors.DelightError: ...
    """


class PackError(RuntimeError):
    """Rows hold many texts, and the gate cannot cut them into these; the message says why.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> class Pooled(torch.nn.Embedding):
        ...     def forward(self, ids, position_ids):
        ...         return super().forward(ids).mean(1)  # one value for both texts
        >>> model, ids, positions = Pooled(9, 4), torch.arange(6)[None], torch.tensor([[0, 1, 2, 0, 1, 2]])
        >>> with kondo.gated(model, noise=0.5):
        ...     model(ids, position_ids=positions).pow(2).sum().backward()
        Traceback (most recent call last):
        ...
        kondo_hooks.errors.PackError: ...
    """


class PrefixError(RuntimeError):
    """With ``unit="prefix"``: the rows of this model cannot be cut after their last kept position.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> class LooksAhead(torch.nn.Embedding):
        ...     def forward(self, ids):
        ...         return super().forward(ids).flip(1).cumsum(1).flip(1)
        >>> model, ids = LooksAhead(9, 4), torch.randint(0, 9, (6, 8))
        >>> with kondo.gated(model, noise=0.5, unit="prefix"):
        ...     (-model(ids).log_softmax(-1)[..., 0] * torch.randn(6, 1)).mean().backward()
        Traceback (most recent call last):
        ...
        kondo_hooks.errors.PrefixError: ...
    """


class ReplayMismatchError(RuntimeError):
    """The replay of the kept rows did not reproduce what the screen returned for them.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> class Centred(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x - x.mean(0))  # a row's output depends on the others
        >>> model, x = Centred(8, 4), torch.randn(6, 8)
        >>> with kondo.gated(model, rate=0.5):
        ...     (-model(x).log_softmax(-1)[:, 0] * torch.randn(6)).mean().backward()
        Traceback (most recent call last):
        ...
        kondo_hooks.errors.ReplayMismatchError: ...
    """


class RankError(RuntimeError):
    """Another rank could not take its step; the message names it and says why.

    Examples:
        >>> import kondo_hooks as kondo
        >>> issubclass(kondo.RankError, RuntimeError)  # raised on every rank but the one that failed
        True
    """


def no_batch_axis(path: str, batch: int) -> str:
    """The message for a loss that uses an output which has no rows."""
    return (
        f"gated: the loss uses output {path or 'of the model'}, which has no batch axis of size {batch}, so its "
        "gradient cannot be split into rows. Compute scalar losses outside the model, expand per-model values "
        "(a log_std, say) to the batch inside it, or call it on a batch (x[None])."
    )


def overwritten_input(name: str) -> str:
    """The message for a replay that differs where the model writes into its input."""
    return (
        f"gated: the model writes into its input {name} in place (x /= 255, x[mask] = 0), so a replay meets what the "
        "screen left there. Let it make a new tensor (x = x / 255), or pass it a clone."
    )


def unknown_batch(batch: int, sizes: list[int], batch_dim: int) -> str:
    """The message for inputs of several sizes, where no run of one row shows which is the number of rows."""
    return (
        f"gated: the inputs of this call have sizes {', '.join(map(str, sizes))} on axis {batch_dim}; {batch}, which "
        "most of its tensors share, is taken for the number of rows. If that is wrong, keep what rows share (a mask of "
        "positions) out of the call, in a buffer say."
    )


def unbatched(features: int) -> str:
    """The message for a call whose only axis turned out to hold features."""
    return (
        f"gated: the model was called without a batch axis, and cannot be run on one of {features} values alone: they "
        "are features and no rows. Call it on a batch of one row, x[None]."
    )


def no_rows_in_loss(tensor: str) -> str:
    """The message for a term of the model's own loss that is not a sum over rows."""
    return (
        f"gated: {tensor} has no row for each sample (a router's balancing loss? a fused loss that is given the head's "
        "weight?), so that term cannot be split into rows. Leave a router's out, or take it on the kept rows alone: "
        "gated(..., shared_loss='kept'). Give a fused loss the kept rows alone, chosen before the forward "
        "(docs/frameworks/liger.md)."
    )


def coupled_rows(tensor: str) -> str:
    """The message for a loss of the model's own that comes out otherwise when fewer rows are there."""
    return (
        f"gated: {tensor} is not the same for the kept rows alone: the model's loss compares rows with each other (a "
        "contrastive loss), or is no sum over rows. Call the model without its loss, and compute that outside of it "
        "from the embeddings, which do have rows. No gradient was changed."
    )


def met_rows_not_run(parameter: str) -> str:
    """The message for a loss that applies a parameter to outputs of which only the kept rows were run."""
    return (
        f"gated: after preselect() the loss code applies {parameter} to the outputs, and dropped rows, which were not "
        "run, reach it with what stands in for them. Take the kept rows alone (outputs[kept]), mask the others in the "
        "loss, or gate what holds that parameter, too (method=)."
    )


def predicts_padding(output: str) -> PackError:
    """The error for labels that the model shifts, where the loss uses what a text predicts of the padding after it."""
    return PackError(
        f"gated: {output} is one short of the tokens, and the loss uses what a text's last token predicts where "
        "padding follows, which belongs to no text: mask it in the loss."
    )


def failed_replay(call: str, rows: int, batch: int, error: Exception) -> str:
    """The message for a model that cannot run on the kept rows alone.

    Args:
        call: which, with the shapes that it was given.
        rows: how many are kept.
        batch: of how many.
        error: what the model raised.
    """
    return (
        f"gated: the gate's replay of {rows} of {batch} rows of {call} failed in the model: {type(error).__name__}: "
        f"{str(error).rstrip('.')}. Has an input no batch axis? Call the model on a batch, x[None] (x.unsqueeze(0)). "
        "Are rows regrouped in the model (the steps of a recurrent sequence)? Make a sequence one row, "
        "(sequences, T, ...). Are rows on another axis? Name it with batch_dim=. No gradient was changed."
    )


def unknown_axis(output: str, shape: tuple[int, ...], batch: int, axis: int) -> str:
    """The message for an output that has the batch size on several axes, where no run could tell which holds rows."""
    return (
        f"gated: {output} has shape {shape}: {batch}, the batch size, stands on more than one axis, and the gate could "
        f"not find out which holds the rows: it takes axis {axis}. If that is wrong, name the axis with batch_dim=."
    )


def rows_not_in_blocks(output: str, shape: tuple[int, ...], batch: int) -> str:
    """The message for rows that are flattened into another axis in an order that was not confirmed."""
    return (
        f"gated: {output} has shape {shape}, in which {batch} rows are flattened with another axis, and no run of "
        "fewer rows confirms that each row is a block of its own (time first? a layer that mixes rows?). Return it "
        "with the rows on an axis of their own, (B, T, ...) or (T, B, ...); name that with batch_dim= if it is not 0."
    )


def unknown_positions(output: str, shape: tuple[int, ...], by_row: bool) -> str:
    """The message for an output of which it is not known whether, or where, it has the tokens that were chosen."""
    taken = "its rows count where any of their tokens is kept" if by_row else "its first axis is taken for the tokens"
    return (
        f"gated: unit='token': the loss also uses {output}, whose rows have the shape {shape}, and the gate could not "
        f"find out which axis holds the tokens, if any: {taken}. If that is not what you mean, leave unit='sample'."
    )


class KondoWarning(UserWarning):
    """Something that the gate does, or cannot do, that the user should know of.

    Examples:
        >>> import warnings, kondo_hooks as kondo
        >>> warnings.simplefilter("error", kondo.KondoWarning)  # stop where the gate would only warn
        >>> warnings.resetwarnings()
    """


class WarnOnce:
    """Gives each kind of warning once."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def is_new(self, kind: str) -> bool:
        """Whether this kind was not given yet."""
        return kind not in self._given

    def __call__(self, kind: str, message: str) -> None:
        """Warn unless this kind was given before."""
        if kind not in self._given:
            self._given.add(kind)
            warnings.warn(message, KondoWarning, stacklevel=_users_frame())


def _users_frame() -> int:
    """How many frames above the caller the user's own code is."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("kondo_hooks", "torch"):
        frame = frame.f_back
        level += 1
    return level


def add_note(error: BaseException, note: str) -> None:
    """``BaseException.add_note``, which Python has from 3.11 on; before, the note stands behind the message."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.args = ("\n".join([*map(str, error.args[:1]), note]), *error.args[1:])


def no_policy_in_terms(name: str) -> str:
    """The message for a loss of the model's own that is a regression, or made of ratios."""
    return (
        f"gated: no policy was found in the model's own loss: {name} holds squares of errors or ratios of "
        "probabilities, and no multiples of a log-prob, so delight is not known. Use a rule that needs none "
        "(noise=0.5, rate='auto', rate='lossless', priority='norm'), or gate what gives the policy, by method=."
    )
