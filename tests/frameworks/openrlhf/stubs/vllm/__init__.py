"""What OpenRLHF's actor trainer imports of vLLM on its way, and does not use."""
