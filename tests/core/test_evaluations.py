"""The branch that saves a gradient, the gradient in hand, and what a combination is given."""

import functools
import re
import weakref

import pytest
import torch

import funcsam as fs
from tests.asserts import equal

TRUE, FALSE = torch.tensor(True), torch.tensor(False)
ONE, TWO = {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}
W = torch.tensor([1.0, -2.0])


def branches():
    """Two functions, and the list of what has been called."""
    called = []

    def yes():
        called.append("yes")
        return ONE

    def no():
        called.append("no")
        return TWO

    return yes, no, called


@pytest.mark.parametrize("pick", [True, False, TRUE, FALSE], ids=str)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_plain_code_calls_one(pick, mode):
    yes, no, called = branches()
    with mode():
        found = fs.either(pick, yes, no)
    assert found is (ONE if pick else TWO)
    assert called == ["yes" if pick else "no"]


@pytest.mark.parametrize("pick", [True, False])
def test_a_bool_is_known_anywhere(pick):
    """Under `torch.func` too."""
    yes, no, called = branches()
    torch.func.grad(lambda x: x * fs.either(pick, yes, no)["w"].sum())(torch.tensor(1.0))
    assert called == ["yes" if pick else "no"]


def test_vmap_calls_both_and_chooses_for_each_member():
    yes, no, called = branches()
    found = torch.vmap(lambda pick: fs.either(pick, yes, no))(torch.stack([TRUE, FALSE]))
    equal(found, {"w": torch.tensor([[1.0], [2.0]])})
    assert called == ["yes", "no"]


@pytest.mark.parametrize("pick", [TRUE, FALSE], ids=str)
def test_grad_calls_both(pick):
    """And differentiates the one that is picked."""
    slope = torch.func.grad(lambda x: fs.either(pick, lambda: 2 * x, lambda: 3 * x))(torch.tensor(1.0))
    equal(slope, torch.tensor(2.0 if pick else 3.0))


def test_meta_has_no_value_to_look_at():
    yes, no, called = branches()
    assert fs.either(TRUE.to("meta"), lambda: yes()["w"].to("meta"), lambda: no()["w"].to("meta")).is_meta
    assert called == ["yes", "no"]


@pytest.mark.compile
@pytest.mark.parametrize("pick", [TRUE, FALSE], ids=str)
def test_one_graph_for_both(pick):
    @torch.compile(backend="aot_eager", fullgraph=True)
    def chosen(pick, x):
        return fs.either(pick, lambda: (x, {"a": 2 * x}), lambda: (x + 1, {"a": x}))

    equal(chosen(pick, W), (W, {"a": 2 * W}) if pick else (W + 1, {"a": W}))


@pytest.mark.parametrize(
    ("pick", "got"),
    [
        (1, "int"),
        (None, "NoneType"),
        (torch.tensor(1), "torch.int64 of shape ()"),
        (torch.tensor([True]), "torch.bool of shape (1,)"),
    ],
    ids=str,
)
def test_other_picks_are_refused(pick, got):
    text = f"either: `pick` must be a bool or a boolean tensor of shape (), got {got}."
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        fs.either(pick, lambda: ONE, lambda: TWO)


@pytest.mark.parametrize(
    ("other", "error", "text"),
    [
        ({}, ValueError, "either: `no` must have the structure of `yes`, got no leaf at ['w']."),
        ({"w": torch.ones(1), "b": torch.ones(1)}, ValueError, "either: `no` must have the structure of `yes`, got a"),
        ({"w": torch.ones(2)}, ValueError, "either: `no` must have the shapes of `yes`, got (2,) for (1,) at ['w']."),
        ({"w": torch.ones(())}, ValueError, "either: `no` must have the shapes of `yes`, got () for (1,) at ['w']."),
        (
            {"w": torch.ones(1, dtype=torch.float64)},
            ValueError,
            "either: `no` must have the dtypes of `yes`, got torch.float64 for torch.float32 at ['w'].",
        ),
        ({"w": 2.0}, TypeError, "either: `no` must hold tensors only, got float at ['w']."),
    ],
    ids=str,
)
def test_branches_that_differ_are_refused(other, error, text):
    """Where both are called."""
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        torch.vmap(lambda pick: fs.either(pick, lambda: ONE, lambda: other))(torch.stack([TRUE, FALSE]))
    with pytest.raises(TypeError, match=r"^either: `yes` must hold tensors only, got float at "):
        torch.vmap(lambda pick: fs.either(pick, lambda: {"w": 1.0}, lambda: ONE))(torch.stack([TRUE, FALSE]))


def test_a_gradient_in_hand():
    """It is the answer at any params and for any batch; an ascent turns it into its perturbation."""
    grads = torch.tensor([3.0, 4.0])
    assert fs.given(grads)(W, 1, 2) == (grads, ())
    climb = fs.chain(fs.normalize(), fs.scale(0.5))
    equal(climb.update(W, fs.given(grads), climb.init(W))[0], torch.tensor([0.3, 0.4]))
    with pytest.raises(ValueError, match=r"^update: `grads` must have the shapes of `params`"):
        climb.update(W, fs.given(torch.ones(3)), climb.init(W))


def test_a_combination_is_given_the_step():
    """0, 1, 2, ..., int64 of shape ()."""
    seen = []

    def combine(grads, probe, step):
        seen.append(step)
        return probe

    tx = fs.sharpness_aware(fs.scale(0.1), combine)
    state = tx.init(W)
    for _ in range(3):
        _, state, _ = tx.update(W, lambda w: w, state)
    equal(seen, [torch.tensor(k) for k in range(3)])


class Old:
    """Takes two."""

    def __call__(self, grads, probe):
        return probe


MAKES = {
    "sharpness_aware": lambda combine: fs.sharpness_aware(fs.scale(0.1), combine),
    "SharpnessAware": lambda combine: fs.torch_optim.SharpnessAware([W], torch.optim.SGD, fs.scale(0.1), combine),
}


@pytest.mark.parametrize("where", MAKES)
@pytest.mark.parametrize(
    ("combine", "shown"),
    [
        (lambda grads, probe: probe, "(grads, probe)"),
        (lambda grads, probe, step, more: probe, "(grads, probe, step, more)"),
        (lambda grads, probe, *, step: probe, "(grads, probe, *, step)"),
        (Old(), "(grads, probe)"),
        (functools.partial(lambda a, b, c: c, 1), "(b, c)"),
    ],
    ids=["two", "four", "a keyword", "an object", "partial"],
)
def test_a_combination_of_other_arguments_is_refused(where, combine, shown):
    """Where it is given, not where it is called."""
    text = (
        f"{where}: `combine` must take three arguments, `(grads, probe, step)`, got a function of {shown}. "
        "Let it take the step, too, also where it makes no use of it."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        MAKES[where](combine)


class Unsigned:
    """A function whose signature cannot be seen."""

    __signature__ = "none"

    def __call__(self, grads, probe, step):
        return probe


@pytest.mark.parametrize("where", MAKES)
@pytest.mark.parametrize(
    "combine",
    [None, lambda *args: args[1], lambda grads, probe, step, more=1: probe, Unsigned(), functools.partial(max, 1), max],
    ids=["none", "any number", "a default", "unsigned", "a partial builtin", "a builtin"],
)
def test_other_combinations_are_taken(where, combine):
    MAKES[where](combine)


def combined(x):
    """A step of a transform that is made inside, as hyperparameters that are traced need."""
    tx = fs.sharpness_aware(fs.scale(x), lambda grads, probe, step: fs.tree.scale(x, probe))
    return tx.update(W, lambda w: w, tx.init(W))[0]


@pytest.mark.compile
def test_a_combination_inside_compiled_code():
    x = torch.tensor(0.5)
    equal(torch.compile(combined, backend="eager", fullgraph=True)(x), combined(x))
    equal(
        torch.compile(lambda x: fs.gsam(0.1, x).update(W, lambda w: w**3, fs.gsam().init(W))[0], backend="eager")(x),
        fs.gsam(0.1, x).update(W, lambda w: w**3, fs.gsam().init(W))[0],
    )


class Spy(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps weak references to all that is computed."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(x) for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        return out


SIZE = 1000
KEPT = {
    "sam": (fs.sam(0.1), 1),
    "asam": (fs.asam(0.1), 1),
    "several ascents": (fs.sharpness_aware(fs.scale(0.1), steps=3), 1),
    "when": (fs.sharpness_aware(fs.scale(0.1), when=lambda step: step >= 0), 2),
    "gsam": (fs.gsam(0.1), 2),
    "looksam": (fs.looksam(0.1), 2),
    "msam": (fs.msam(0.1), 1),
}


@pytest.mark.parametrize("name", KEPT)
def test_nothing_else_is_held_at_the_probe(name):
    """Where memory peaks, the point is alive, and the first gradient if it is needed; the offset is not."""
    tx, wanted = KEPT[name]
    w = torch.linspace(-1, 1, SIZE)
    state, alive = tx.init(w), []
    spy = Spy()

    def grads_fn(params):
        alive.append(sum(x is not None and x.numel() == SIZE for x in (ref() for ref in spy.made)))
        return params**3

    with spy:
        tx.update(w, grads_fn, state)
    assert alive[-1] == wanted
