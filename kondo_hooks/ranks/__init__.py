"""Several ranks: the engines that run a model, what they agree on, the same passes everywhere."""
