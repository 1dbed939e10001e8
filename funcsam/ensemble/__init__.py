"""Many models at once: stacked trees, one entry per member along the first axis, and one vectorised step.

    params, buffers = fs.ensemble.init(build, seeds=range(16))
    tx = fs.ensemble.vectorize(fs.chain(fs.sam(0.05), fs.sgd(0.1)), in_dims=(0, None, None))
    state = tx.init(params)
    params, state, (loss, buffers) = tx.step(params, grads_fn, state, buffers, x, y)
    logits = fs.ensemble.predict(model, params, buffers, x)

`grads_fn` and `model` are those of one member. `torch.save` and `torch.load` keep an ensemble, whose trees hold nothing
but tensors; `fs.nn.load(build(), *fs.ensemble.member((params, buffers), 3))` is one of its members as a plain module.
"""

from funcsam.ensemble.members import bootstrap, init, member, size, stack, unstack
from funcsam.ensemble.metrics import average, calibration_error, disagreement, nll
from funcsam.ensemble.outputs import predict
from funcsam.ensemble.step import vectorize

__all__ = [
    "average",
    "bootstrap",
    "calibration_error",
    "disagreement",
    "init",
    "member",
    "nll",
    "predict",
    "size",
    "stack",
    "unstack",
    "vectorize",
]
