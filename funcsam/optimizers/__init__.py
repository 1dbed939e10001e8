"""Base optimizers: chains with the names, defaults and conventions of torch.optim."""
