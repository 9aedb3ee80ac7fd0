"""Which rows, and how many: pure tensors, no model."""
