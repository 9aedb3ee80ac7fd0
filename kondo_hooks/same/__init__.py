"""What a replay has to see again as the screen saw it: module state, random numbers, autocast, rounding."""
