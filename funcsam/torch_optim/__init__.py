"""A `torch.optim` front end: loops with `loss.backward()` around the same pure parts.

    optimizer = fs.torch_optim.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9, model=model)
    for x, y in batches:
        def closure():
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss
        loss = optimizer.step(closure)

There is no mathematics here: the ascent is a chain of transforms, and the descent is the base optimizer's.
"""

from funcsam.torch_optim.optimizer import Optimizer
from funcsam.torch_optim.two_step import SAM, SharpnessAware

__all__ = ["SAM", "Optimizer", "SharpnessAware"]
