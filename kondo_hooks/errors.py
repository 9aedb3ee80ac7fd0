"""Errors and warnings of the gate."""

import sys
import warnings


class DelightError(RuntimeError):
    """Delight cannot be known from what the gate saw; the message says what to name."""


class ReplayMismatchError(RuntimeError):
    """The replay of the kept rows did not reproduce what the screen returned for them."""


class RankError(RuntimeError):
    """Another rank could not take its step; the message names it and says why."""


def no_batch_axis(path: str, batch: int) -> str:
    """The message for a loss that uses an output which has no rows."""
    return (
        f"gated: the loss uses output {path or 'of the model'}, which has no batch axis of size {batch}, so its "
        "gradient cannot be split into rows. Compute scalar losses outside the model, expand per-model values "
        "(a log_std, say) to the batch inside it, or call it on a batch (x.unsqueeze(0))."
    )


def no_rows_in_loss(tensor: str) -> str:
    """The message for a term of the model's own loss that is not a sum over rows."""
    return (
        f"gated: {tensor} has no row for each sample (a router's balancing loss?), so that term cannot be split into "
        "rows. Leave it out, or take it on the kept rows alone: gated(..., shared_loss='kept')."
    )


def coupled_rows(tensor: str) -> str:
    """The message for a loss of the model's own that comes out otherwise when fewer rows are there."""
    return (
        f"gated: {tensor} is not the same for the kept rows alone: the model's loss compares rows with each other (a "
        "contrastive loss), or is no sum over rows. Call the model without its loss, and compute that outside of it "
        "from the embeddings, which do have rows. No gradient was changed."
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
        f"{error}. If an input has no batch axis, call it on a batch, x[None] (x.unsqueeze(0)); if rows that belong "
        "together are regrouped in the model (the steps of a recurrent sequence), make a sequence one row, "
        "(sequences, T, ...); if rows are on another axis, name it with batch_dim=. No gradient was changed."
    )


class KondoWarning(UserWarning):
    """Something that the gate does, or cannot do, that the user should know of."""


class WarnOnce:
    """Gives each kind of warning once."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def given(self, kind: str) -> bool:
        """Whether this kind was given."""
        return kind in self._given

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
