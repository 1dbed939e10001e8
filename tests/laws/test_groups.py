"""Parameter groups: each group of leaves goes its own way, and the seed's groups are one expression."""

import optree
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import funcsam as fs
from tests.asserts import close, equal
from tests.strategies import Problem, call, flat, problems, run, spied, structural, unflat
from tests.zoo import each, is_weight

labelled = st.sampled_from(["sam", "sgd", "adam"])


@st.composite
def grouped(draw):
    """A problem, and a tree of labels for its leaves."""
    problem = draw(problems())
    return problem, optree.tree_map(lambda leaf: draw(labelled), problem.params)


def on(labels, *chosen):
    """A vector that is True where an entry belongs to one of the groups."""
    return lambda tree: flat(optree.tree_map(lambda label, leaf: torch.full_like(leaf, label in chosen), labels, tree))


def gradient(problem):
    """The gradient as a function of a vector."""
    return lambda w: flat(Problem(unflat(w, problem.params), problem.loss).grads)


@given(drawn=grouped(), rho=st.floats(2**-6, 1))
def test_a_probing_group_moves_alone(drawn, rho):
    """Its gradient is that at `w + e`, where `e` lies in the group; the others keep that of the params."""
    problem, labels = drawn
    g, mine = gradient(problem), on(labels, "sam")(problem.params).bool()
    w = flat(problem.params)
    own = torch.where(mine, g(w), 0.0)
    assume(own.norm() > 1e-3)
    wanted = torch.where(mine, g(w + rho * own / own.norm()), -0.5 * g(w))
    tx = fs.partition(labels, {"sam": fs.sam(rho), "sgd": fs.sgd(0.5), "adam": fs.scale(-0.5)})
    close(flat(call(tx, problem)[0]), wanted, rtol=1e-7)


def test_leaves_that_stay_do_not_hide_those_that_move():
    """A perturbation that is zero on one leaf of a group is a perturbation all the same."""
    params = {"a": torch.tensor(1.0), "b": torch.tensor(1.0), "c": torch.tensor(1.0)}

    def cube(params, batch):
        return sum(w**3 for w in params.values()) * batch

    def update(params, grads_fn, state, *batch):
        grads, aux = grads_fn({**params, "b": params["b"] + 0.5}, *batch)
        return grads, state, aux

    tx = fs.masked(fs.Transform(lambda params: (), update), {"a": True, "b": True, "c": False})
    updates = tx.update(params, fs.grad_and_value(cube), tx.init(params), torch.tensor(2.0))[0]
    equal(updates, {"a": torch.tensor(6.0), "b": torch.tensor(13.5), "c": torch.tensor(6.0)})


@given(drawn=grouped())
def test_evaluations_of_groups(drawn):
    """One at the params, and one more for each group that probes and has leaves; what is perturbed is its own."""
    problem, labels = drawn
    tx = fs.partition(labels, {"sam": fs.sam(0.3), "sgd": fs.sgd(0.5), "adam": fs.asam(0.3)})
    spy, seen = spied(problem.grads_fn)
    tx.update(problem.params, spy, tx.init(problem.params))
    used = set(optree.tree_leaves(labels))
    assert len(seen) == 1 + len(used & {"sam", "adam"})
    equal(seen[0], problem.params)
    for point, label in zip(seen[1:], sorted(used & {"sam", "adam"}, reverse=True), strict=True):
        moved = flat(optree.tree_map(torch.sub, point, problem.params))
        assert not moved[~on(labels, label)(problem.params).bool()].any()


@each
@structural
@given(problem=problems())
def test_one_group_is_the_transform(entry, problem):
    """A partition with one label, and a mask that is True everywhere."""
    alone, aux = (
        run(entry(), problem, 2)[0],
        entry().update(problem.params, problem.grads_fn, entry().init(problem.params))[2],
    )
    for tx in (fs.partition("all", {"all": entry()}), fs.masked(entry(), True)):
        close(run(tx, problem, 2)[0], alone)
        equal(tx.update(problem.params, problem.grads_fn, tx.init(problem.params))[2], aux)


@each
@structural
@given(problem=problems())
def test_masked_out_leaves_pass(entry, problem):
    """Where a mask is False the gradient is that of the params, untouched; nowhere is it `identity()`."""
    updates, _ = call(fs.masked(entry(), is_weight), problem)
    for path, got, wanted in zip(
        optree.tree_paths(updates), optree.tree_leaves(updates), optree.tree_leaves(problem.grads), strict=True
    ):
        if not is_weight(path, None):
            equal(got, wanted)
    equal(call(fs.masked(entry(), False), problem)[0], problem.grads)


@given(problem=problems(), rho=st.floats(2**-6, 1))
def test_a_masked_out_leaf_is_not_perturbed(problem, rho):
    """Its perturbation is exactly zero: with `masked(sam)`, and with `freeze` in the ascent."""
    others = lambda path, leaf: not is_weight(path, leaf)  # noqa: E731
    for tx in (
        fs.masked(fs.sam(rho), is_weight),
        fs.sharpness_aware(fs.chain(fs.freeze(others), fs.normalize(), fs.scale(rho))),
    ):
        spy, seen = spied(problem.grads_fn)
        tx.update(problem.params, spy, tx.init(problem.params))
        for path, a, b in zip(
            optree.tree_paths(problem.params), *map(optree.tree_leaves, (seen[-1], problem.params)), strict=True
        ):
            if not is_weight(path, None):
                equal(a, b)


@each
@structural
@given(problem=problems())
def test_frozen_leaves_stay(entry, problem):
    """At the end of any chain, and as a group of its own; the others move as if alone."""
    params, _ = run(fs.chain(entry(), fs.freeze(is_weight)), problem, 2)
    for path, got, wanted in zip(
        optree.tree_paths(params), optree.tree_leaves(params), optree.tree_leaves(problem.params), strict=True
    ):
        if is_weight(path, None):
            equal(got, wanted)
    equal(run(fs.chain(entry(), fs.freeze()), problem, 2)[0], problem.params)


@given(problem=problems())
def test_labels_as_tree_prefix_and_function(problem):
    """All three say the same."""
    pick = lambda path, leaf: "w" if is_weight(path, leaf) else "rest"  # noqa: E731
    transforms = {"w": fs.sam(0.1), "rest": fs.scale(2.0)}
    full = optree.tree_map_with_path(pick, problem.params)
    equal(call(fs.partition(full, transforms), problem), call(fs.partition(pick, transforms), problem))
    nested = Problem({"a": problem.params, "b": problem.params}, problem.loss)
    prefix, spelled = {"a": "w", "b": "rest"}, lambda path, leaf: "w" if path[0] == "a" else "rest"
    equal(call(fs.partition(prefix, transforms), nested), call(fs.partition(spelled, transforms), nested))


@given(problem=problems(), decay=st.floats(0.1, 0.9))
def test_a_chain_of_groups(problem, decay):
    """One ascent over all leaves, then a base optimizer for each group."""
    pick = lambda path, leaf: is_weight(path, leaf)  # noqa: E731
    tx = fs.chain(fs.sam(0.2), fs.partition(pick, {True: fs.sgd(0.1, momentum=decay), False: fs.sgd(0.3)}))
    probe, _ = call(fs.sam(0.2), problem)
    rates = optree.tree_map_with_path(lambda path, leaf: -0.1 if is_weight(path, leaf) else -0.3, problem.params)
    close(call(tx, problem)[0], optree.tree_map(lambda rate, g: rate * g, rates, probe))


def test_groups_that_slice_the_batch():
    """A group that looks at slices asks again; the others share the gradient of the whole."""
    w = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.5, -1.0])}
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    grads_fn = fs.grad_and_value(lambda w, x: torch.cos(x @ (w["a"] * w["b"])).mean())
    for size in (None, 1):
        tx = fs.partition({"a": "m", "b": "g"}, {"m": fs.microbatch(fs.sam(0.1), 2, 0, size), "g": fs.identity()})
        updates, _, aux = tx.update(w, grads_fn, tx.init(w), x)
        whole, loss = grads_fn(w, x)
        halves = [fs.masked(fs.sam(0.1), {"a": True, "b": False}) for _ in range(2)]
        parts = [half.update(w, grads_fn, half.init(w), x[2 * k : 2 * k + 2])[0]["a"] for k, half in enumerate(halves)]
        close((updates, aux), ({"a": sum(parts) / 2, "b": whole["b"]}, loss), rtol=1e-6)


def test_the_gradient_of_a_batch_is_shared():
    """Two evaluations with a batch too: at the params, and where the one group that probes has climbed to."""
    w = {"a": torch.ones(2), "b": torch.ones(2)}
    spy, seen = spied(fs.grad_and_value(lambda w, x: torch.cos(x @ (w["a"] * w["b"])).mean()))
    tx = fs.partition({"a": "m", "b": "g"}, {"m": fs.sam(0.1), "g": fs.sgd(0.1)})
    tx.update(w, spy, tx.init(w), torch.ones(4, 2))
    assert len(seen) == 2


class Seed:
    """The seed's step, transcribed: groups with numbers of their own under one global norm."""

    def __init__(self, groups):
        self.groups = groups
        self.momentum = [torch.zeros_like(w) for group in groups for w in group["params"]]

    def step(self, grads_of):
        """One step; `grads_of` takes and returns the leaves in the order of the groups."""
        leaves = [(group, w) for group in self.groups for w in group["params"]]
        grads = grads_of([w for _, w in leaves])
        sizes = [w.abs() if group["adaptive"] else torch.ones_like(w) for group, w in leaves]
        norm = torch.stack([(t * g).norm() for t, g in zip(sizes, grads, strict=True)]).norm()
        climbed = [w + group["rho"] * t * t * g / norm for (group, w), t, g in zip(leaves, sizes, grads, strict=True)]
        probe = grads_of(climbed)
        for k, ((group, w), g) in enumerate(zip(leaves, probe, strict=True)):
            g = g + group["weight_decay"] * w
            self.momentum[k] = 0.9 * self.momentum[k] + g
            w -= group["lr"] * self.momentum[k]


def test_the_seeds_param_groups():
    """Per-group lr, weight decay, rho and adaptivity in one expression."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2)).double()
    params, buffers = fs.nn.split(model)
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(2, (8,))
    loss_fn = fs.nn.loss_fn(model, lambda model, x, y: torch.nn.functional.cross_entropy(model(x), y))
    grads_fn = fs.grad_and_value(loss_fn, has_aux=True)

    matrix = lambda path, leaf: leaf.ndim > 1  # noqa: E731
    tx = fs.chain(
        fs.asam(rho=optree.tree_map(lambda w: 2.0 if w.ndim > 1 else 0.05, params), mask=matrix),
        fs.partition(matrix, {True: fs.sgd(0.1, 0.9, weight_decay=5e-3), False: fs.sgd(0.02, 0.9)}),
    )

    names = sorted(params, key=lambda name: params[name].ndim < 2)
    numbers = {
        True: {"rho": 2.0, "adaptive": True, "lr": 0.1, "weight_decay": 5e-3},
        False: {"rho": 0.05, "adaptive": False, "lr": 0.02, "weight_decay": 0.0},
    }
    seed = Seed(
        [
            {"params": [params[name].clone() for name in names if (params[name].ndim > 1) is wide], **numbers[wide]}
            for wide in (True, False)
        ]
    )
    state, now = tx.init(params), params
    for _ in range(4):
        now, state, _ = tx.step(now, grads_fn, state, buffers, x, y)
        seed.step(
            lambda leaves: list(
                (lambda g: [g[name] for name in names])(
                    grads_fn(dict(zip(names, leaves, strict=True)), buffers, x, y)[0]
                )
            )
        )
    reached = dict(zip(names, (w for group in seed.groups for w in group["params"]), strict=True))
    close(now, {name: reached[name] for name in now})


BAD = [
    (
        lambda: fs.partition("a", {"a": 0.1}),
        TypeError,
        "partition: `transforms` must hold Transforms, got float for 'a'.",
    ),
    (lambda: fs.masked(0.1, True), TypeError, "masked: `inner` must be a Transform, got float."),
    (
        lambda: fs.partition({"w": "a", "b": "c"}, {"a": fs.sgd()}).init({"w": torch.ones(1), "b": torch.ones(1)}),
        ValueError,
        "partition: `transforms` must have every label, got none for 'c' at ['b'].",
    ),
    (
        lambda: fs.partition({"v": "a"}, {"a": fs.sgd()}).init({"w": torch.ones(1)}),
        ValueError,
        "a prefix tree must match the structure of `params`, got {'v': 'a'}",
    ),
    (
        lambda: fs.masked(fs.sam(), {"w": 1}).init({"w": torch.ones(1)}),
        TypeError,
        "a `mask` must hold booleans, got int",
    ),
    (
        lambda: fs.freeze(lambda path, leaf: None).update(torch.ones(1), lambda w: w, ()),
        TypeError,
        "a `mask` must hold booleans, got NoneType",
    ),
    (
        lambda: fs.partition("a", {"a": fs.sgd()}).update(torch.ones(1), lambda w: w, {"b": ()}),
        ValueError,
        "partition: `state` must have the labels ['a'], got ['b']. Make it with `init`.",
    ),
    (
        lambda: fs.masked(fs.sgd(), True).update(torch.ones(1), lambda w: w, ()),
        ValueError,
        "masked: `state` must have the labels ['True'], got tuple of 0 entries. Make it with `init`.",
    ),
]


@pytest.mark.parametrize(("make", "error", "text"), BAD, ids=[text for *_, text in BAD])
def test_bad_groups_are_refused(make, error, text):
    with pytest.raises(error) as caught:
        make()
    assert text in str(caught.value)
