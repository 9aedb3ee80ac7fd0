"""A differential fuzzer: small random programs, gated and as a masked full backward; what differs is shrunk."""
