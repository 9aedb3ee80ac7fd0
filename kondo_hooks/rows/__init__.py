"""Which axis holds rows, and rows in nested containers: taken, packed, put back. Knows tensors and no gates."""
