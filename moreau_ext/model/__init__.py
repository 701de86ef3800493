"""The explained score of a model and target, one per input, with its gradient. The only user of torch.autograd."""
