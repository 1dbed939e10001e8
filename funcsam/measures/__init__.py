"""How sharp a solution is: pure functions of a loss, its params and a batch.

    def loss_fn(params, x, y):
        return F.cross_entropy(fs.nn.predict(model, params, buffers, x), y)

    rise = fs.measures.worst_case_sharpness(loss_fn, params, x, y, rho=0.05, steps=20)
    mean, standard_error = fs.measures.average_case_sharpness(loss_fn, params, x, y, rho=0.05)
    top = fs.measures.hessian_eigenpairs(loss_fn, params, x, y, k=5).values

All but `hessian_eigenpairs` work under `torch.vmap`: over the members of an ensemble, over radii, or both.

Two cautions. Sharpness, of any definition, predicts generalisation only weakly, and sometimes with the wrong sign
(Andriushchenko et al., 2023): report it, do not conclude from it. And near a solution that fits its data the gradient
is almost zero and points nowhere in particular, so that one step at a small radius finds almost no rise: a network that
has memorised its labels then passes for flat. Measure at several radii, with several steps, and beside the loss.

References:
    Andriushchenko et al., 2023, A Modern Look at the Relationship between Sharpness and Generalization.
    arXiv 2302.07011.
"""

from funcsam.measures.average import average_case_sharpness
from funcsam.measures.spectra import Eigenpairs, hessian_eigenpairs, hessian_trace
from funcsam.measures.support import Estimate
from funcsam.measures.worst import gradient_norm, m_sharpness, worst_case_sharpness

__all__ = [
    "Eigenpairs",
    "Estimate",
    "average_case_sharpness",
    "gradient_norm",
    "hessian_eigenpairs",
    "hessian_trace",
    "m_sharpness",
    "worst_case_sharpness",
]
