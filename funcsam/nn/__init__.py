"""Modules to pure functions and back.

    params, buffers = fs.nn.split(model)
    loss_fn = fs.nn.loss_fn(model, lambda model, x, y: F.cross_entropy(model(x), y))
    grads_fn = fs.grad_and_value(loss_fn, has_aux=True)
    state = tx.init(params)
    for x, y in batches:
        params, state, (loss, buffers) = tx.step(params, grads_fn, state, buffers, x, y)
    fs.nn.load(model, params, buffers)

Buffers go in with the batch and come out as `aux`, so that running statistics are those of the pass at the params:
probes leave no trace in them, whatever the type of the module that writes them.
"""

from funcsam.nn.loss import loss_fn, predict
from funcsam.nn.modules import load, split

__all__ = ["load", "loss_fn", "predict", "split"]
