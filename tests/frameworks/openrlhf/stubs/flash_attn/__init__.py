"""What OpenRLHF imports of flash-attn, which has no CPU build: the padding of packed rows, in plain PyTorch."""
