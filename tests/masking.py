"""The reference for TRL's trainers: their own loss with the gradient of dropped rows masked."""

import torch


def masking(kind):
    """``kind`` with the terms of rows masked: each call of the loss takes the next mask from ``masks``."""

    class Masked(kind):
        masks = ()

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            logps, entropies, *others = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            if torch.is_grad_enabled():
                keep = next(self.masks).view(-1, 1)
                for tensor in (logps, entropies):
                    if tensor is not None and tensor.requires_grad:
                        tensor.register_hook(lambda grad, keep=keep: grad * keep)
            return logps, entropies, *others

    return Masked
