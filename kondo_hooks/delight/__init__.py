"""Advantage and surprisal found: told, in distributions, in the loss code, at the model's outputs."""
