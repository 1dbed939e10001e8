"""A transform as an object: it knows its states, shows how it was made, and is copied and pickled."""

import copy
import functools
import inspect
import io
import multiprocessing
import pickle
import sys
import types

import optree
import pytest
import torch

import funcsam as fs
from funcsam.core import tree
from funcsam.torch_optim import SharpnessAware
from tests.asserts import equal
from tests.strategies import LOSSES, Problem, call, run
from tests.zoo import ZOO, each, is_weight

PROBLEM = Problem({"w": torch.tensor([[0.5, -1.0], [2.0, 0.25]]), "b": [torch.tensor(1.5)]}, LOSSES[2])
STACKED = fs.ensemble.stack([PROBLEM.params, PROBLEM.params])
REFUSED = r"(?s)^\w+: `state` must .*, got "


def climb(rho=0.1):
    return fs.chain(fs.normalize(), fs.scale(rho))


def loss(params, x=None):
    """Of a problem, and of a batch that makes no difference."""
    return PROBLEM.loss(params)


def wanted_state(tx):
    """A state, and what makes another state its like: structure, classes and shapes."""
    state = tx.init(PROBLEM.params)
    return state, _kind(state)


def _kind(state):
    leaves, spec = optree.tree_flatten(state, none_is_leaf=True)
    return spec, [getattr(leaf, "shape", type(leaf)) for leaf in leaves]


FOREIGN = [None, (), [], {}, 0.5, "x", torch.tensor(1), torch.ones(2), object(), ({},), [()]]


@each
def test_foreign_states_are_refused(entry):
    """Whatever is not a state of this transform, those of all other entries among it, is a ValueError that says so."""
    tx = entry()
    _, own = wanted_state(tx)
    for foreign in [*FOREIGN, *(other().init(PROBLEM.params) for other in ZOO)]:
        if _kind(foreign) != own:
            with pytest.raises(ValueError, match=REFUSED):
                call_with(tx, foreign)


def call_with(tx, state):
    """One step with a state, which may be None."""
    return tx.step(PROBLEM.params, PROBLEM.grads_fn, state)


def spoiled(state):
    """States in which one leaf is something else."""
    leaves, spec = optree.tree_flatten(state)
    for position in range(len(leaves)):
        for bad in (None, "x", 0.5, (), {}, [torch.tensor(1)], torch.ones(3, 1, 2)):
            yield optree.tree_unflatten(spec, [*leaves[:position], bad, *leaves[position + 1 :]])


@each
def test_states_with_a_wrong_part_are_refused(entry):
    """Wherever it is: a counter, a moment, a state inside."""
    tx = entry()
    for state in spoiled(tx.init(PROBLEM.params)):
        with pytest.raises((ValueError, TypeError), match=REFUSED):
            call_with(tx, state)


INNER = fs.chain(fs.sam(), fs.trace())
WRAPPED = {
    "chain": fs.chain(fs.scale(2.0), INNER),
    "partition": fs.partition({"w": "w", "b": "b"}, {"w": INNER, "b": fs.identity()}),
    "masked": fs.masked(INNER, is_weight),
    "microbatch": fs.microbatch(INNER, 2),
    "microbatch of one": fs.microbatch(INNER, 1),
    "apply_if_finite": fs.apply_if_finite(INNER),
    "dynamic_loss_scale": fs.dynamic_loss_scale(INNER),
    "sharpness_aware": fs.sharpness_aware(fs.chain(fs.trace(), climb())),
    "vectorize": fs.ensemble.vectorize(INNER),
    "vectorize in a loop": fs.ensemble.vectorize(INNER, chunk_size=1),
    "vectorize of numbers": fs.ensemble.vectorize(
        lambda rho: fs.chain(fs.sam(rho), fs.trace()), {"rho": torch.ones(2)}
    ),
    "chain of vectorize": fs.chain(fs.ensemble.vectorize(INNER), fs.scale(2.0)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_states_inside_are_refused(name):
    """Foreign states and wrong parts, at any depth."""
    tx, many = WRAPPED[name], "vectorize" in name
    params, batch = (STACKED, torch.ones(2, 4)) if many else (PROBLEM.params, torch.ones(4))
    grads_fn = fs.grad_and_value(loss)
    tx.update(params, grads_fn, tx.init(params), batch)
    for state in [*FOREIGN, *spoiled(tx.init(params))]:
        with pytest.raises((ValueError, TypeError), match=REFUSED):
            tx.update(params, grads_fn, state, batch)


def test_states_of_one_model_and_of_many_are_not_mixed_up():
    """A state of members side by side is not that of one model, and the other way round."""
    one, many = fs.sgd(0.1), fs.ensemble.vectorize(fs.sgd(0.1))
    with pytest.raises(
        ValueError, match=r"^sgd: .* whose `step` is a tensor of shape \(\), got a tensor of shape \(2,\)"
    ):
        one.update(STACKED, PROBLEM.grads_fn, many.init(STACKED))
    with pytest.raises(
        ValueError, match=r"^vectorize: .* the 2 members .*, got a tensor of shape \(\) at \.step\. Make"
    ):
        many.update(STACKED, PROBLEM.grads_fn, one.init(STACKED))


@pytest.mark.parametrize(
    ("tx", "state", "text"),
    [
        (fs.sam(), (), "sam: `state` must be a SharpnessAwareState, got tuple of 0 entries."),
        (fs.scale_by_adam(), [1], "scale_by_adam: `state` must be an AdamState, got list of 1 entry."),
        (fs.normalize(), fs.scale(1.0).init(()), "normalize: `state` must be (), got ScaleState."),
        (fs.identity(), None, "identity: `state` must be (), got NoneType."),
        (fs.sgd(momentum=0.9), (), "sgd: `state` must be a tuple of 2 states, one per transform, got 0 states."),
        (fs.distributed.all_reduce_mean(), [], "all_reduce_mean: `state` must be (), got list of 0 entries."),
        (fs.masked(fs.sgd(), True), {}, "masked: `state` must have the labels ['True'], got []."),
        (
            fs.Transform(fs.sgd().init, fs.sgd().update),
            {"a": [None]},
            "Transform: `state` must be a tree of tensors, got NoneType at ['a'][0].",
        ),
        (
            fs.common_randomness(),
            fs.common_randomness().init(PROBLEM.params)._replace(generators={"cpu:1": torch.ones(1)}),
            "common_randomness: `state` must be a RandomnessState whose `generators` are states of the generators of "
            "['cpu'], got a dict of ['cpu:1'].",
        ),
    ],
    ids=str,
)
def test_messages(tx, state, text):
    """The transform, what its states are, what was given, and what to do."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        tx.update(PROBLEM.params, PROBLEM.grads_fn, state)
    assert str(caught.value) == f"{text} Make it with `init`."


def test_a_class_of_states():
    """Is a class, `()` or None."""
    with pytest.raises(TypeError, match=r"^Transform: `state` must be a class, \(\) or None, got int\.$"):
        fs.Transform(len, len, 1)


@pytest.mark.compile
def test_states_are_checked_by_compiled_steps():
    """When the step is traced."""
    step = torch.compile(fs.sgd().step, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="sgd: `state` must be a ScaleState"):
        step(PROBLEM.params, PROBLEM.grads_fn, ())


SCHEDULES = {
    "constant(value=0.1)": fs.constant(0.1),
    "cosine(value=0.1, total_steps=10)": fs.cosine(0.1, 10),
    "cosine(value=tensor(0.1), total_steps=10, end=0.0)": fs.cosine(torch.tensor(0.1), 10, end=0.0),
    "step_decay(value=1.0, total_steps=10, milestones=[0.5])": fs.step_decay(1.0, 10, milestones=[0.5]),
    "warmup_cosine(value=1.0, warmup_steps=3, total_steps=10)": fs.warmup_cosine(1.0, 3, total_steps=10),
}
REPRS = {
    "chain(sam(rho=0.05), sgd(lr=0.1, momentum=0.9))": fs.chain(fs.sam(0.05), fs.sgd(0.1, momentum=0.9)),
    "identity()": fs.identity(),
    "chain()": fs.chain(),
    "sgd()": fs.chain(fs.sgd(), fs.identity()),
    "sam(rho=tensor(0.05))": fs.sam(torch.tensor(0.05)),
    "sam(rho={'w': 0.1, 'b': [cosine(value=1, total_steps=2)]})": fs.sam({"w": 0.1, "b": [fs.cosine(1, 2)]}),
    "adam(lr=0.1, betas=(0.9, 0.99))": fs.adam(0.1, (0.9, 0.99)),
    "freeze(mask=<lambda>)": fs.freeze(lambda path, leaf: True),
    "freeze(mask=partial(is_weight, 1, leaf=(True,)))": fs.freeze(functools.partial(is_weight, 1, leaf=(True,))),
    "partition(labels=is_weight, transforms={True: sgd(), False: freeze()})": fs.partition(
        is_weight, {True: fs.sgd(), False: fs.freeze()}
    ),
    "apply_if_finite(inner=masked(inner=sam(), mask=True))": fs.apply_if_finite(fs.masked(fs.sam(), True)),
    "vectorize(tx=sam, hyper={'rho': tensor(shape=(2,))})": fs.ensemble.vectorize(fs.sam, {"rho": torch.ones(2)}),
    "sam(rho=tensor(shape=()))": fs.sam(torch.ones((), device="meta")),
    "all_reduce_mean(aux='first')": fs.distributed.all_reduce_mean(aux="first"),
    "lift(init=len, update=max)": fs.lift(len, max),
    "Transform(init=len, update=max)": fs.Transform(len, max),
    **SCHEDULES,
}


@pytest.mark.parametrize("text", REPRS)
def test_repr(text):
    """The call that made it: what was given, by name."""
    assert repr(REPRS[text]) == text


def test_repr_inside_vmap():
    """A number that differs between members has no value to show."""
    shown = []
    torch.vmap(lambda rho: (shown.append(repr(fs.sam(rho))), rho)[1])(torch.ones(2))
    assert shown == ["sam(rho=tensor(shape=()))"]


def test_signatures():
    """Stay as they were written."""
    assert list(inspect.signature(fs.sgd).parameters) == ["lr", "momentum", "dampening", "weight_decay", "nesterov"]
    assert list(inspect.signature(fs.Transform).parameters) == ["init", "update", "state", "inside", "probes"]
    assert (fs.sgd.__name__, fs.sgd.__module__) == ("sgd", "funcsam")


def test_a_chain_of_one_keeps_its_name():
    """`chain(t)` is `t`, and remembers what made it."""
    tx = fs.sam(0.3)
    assert fs.chain(tx) is tx
    assert fs.chain(fs.identity(), tx) is tx
    assert repr(tx) == "sam(rho=0.3)"


def pickled(x):
    """There and back."""
    return pickle.loads(pickle.dumps(x))


@each
@pytest.mark.parametrize("copied", [pickled, copy.deepcopy, copy.copy], ids=["pickle", "deepcopy", "copy"])
def test_copies(entry, copied):
    """A copy shows the same call and takes the same steps, from a copy of the state."""
    tx = entry()
    params, state = run(tx, PROBLEM, 1)
    twin, twin_state = copied((tx, state))
    assert repr(twin) == repr(tx)
    equal(call(twin, Problem(params, PROBLEM.loss), twin_state), call(tx, Problem(params, PROBLEM.loss), state))


def test_a_deepcopy_belongs_to_its_object():
    """A tensor that the object and its transform share is shared by their copies; functions are not copied."""
    rho = torch.tensor(0.5)
    copied, tx = copy.deepcopy([rho, fs.chain(fs.sam(rho), fs.freeze(lambda path, leaf: False))])
    (inner, _), (mine,) = tx._record[1], tx._record[1][0]._record[1]
    assert copied is mine is not rho
    assert repr(inner) == "sam(rho=tensor(0.5))"


class Anneal(fs.Transform):
    """A user's class, made with arguments of its own."""

    def __init__(self, rho):
        inner = fs.sam(rho)
        super().__init__(inner.init, inner.update)


def test_a_subclass():
    """Is its own factory."""
    for tx in (Anneal(0.3), pickled(Anneal(0.3)), copy.deepcopy(Anneal(rho=0.3))):
        assert type(tx) is Anneal
        assert repr(tx) == "Anneal(rho=0.3)"
        equal(call(tx, PROBLEM), call(fs.sam(0.3), PROBLEM))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: fs.freeze(lambda path, leaf: True),
            "freeze: `mask` must be something that pickle can save, got <lambda>.",
        ),
        (lambda: fs.chain(fs.sgd(), fs.sam(lambda step: 0.1)), "sam: `rho` must be"),
        (lambda: fs.partition(lambda path, leaf: 0, {0: fs.sgd()}), "partition: `labels` must be"),
        (lambda: fs.partition(is_weight, {True: fs.sgd({"w": lambda step: 0.1})}), "sgd: `lr` must be"),
        (lambda: fs.lift(lambda params: (), is_weight), "lift: `init` must be"),
        (
            lambda: fs.Transform(len, functools.partial(lambda: 0)),
            "Transform: `update` must be something that pickle can",
        ),
        (lambda: fs.distributed.all_reduce_mean(multiprocessing.Lock()), "all_reduce_mean: `group` must be"),
    ],
)
def test_what_cannot_be_pickled_says_why(make, text):
    """The factory, the argument, what it is, and what to do."""
    with pytest.raises(pickle.PicklingError) as caught:
        pickle.dumps(make())
    assert str(caught.value).startswith(text)
    assert str(caught.value).endswith(". Define functions with `def` at the top level of a module.")


def test_cloudpickle():
    """Saves functions by value, lambdas too."""
    cloudpickle = pytest.importorskip("cloudpickle")
    tx = pickle.loads(cloudpickle.dumps(fs.chain(fs.sgd(0.1), fs.freeze(lambda path, leaf: path[-1:] == ("w",)))))
    equal(call(tx, PROBLEM), call(fs.chain(fs.sgd(0.1), fs.freeze(is_weight)), PROBLEM))


def _spawned(queue, tx, state):
    params, _, _ = tx.step(PROBLEM.params, PROBLEM.grads_fn, state)
    queue.put([leaf.tolist() for leaf in optree.tree_leaves(params)])


def test_spawn():
    """A process that starts afresh takes the same step."""
    tx = fs.chain(fs.sam({"w": 0.1, "b": fs.cosine(0.2, 10)}), fs.masked(fs.sgd(0.1, momentum=0.9), is_weight))
    state, context = tx.init(PROBLEM.params), multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_spawned, args=(queue, tx, state))
    process.start()
    process.join(120)
    params, _, _ = call_with(tx, state)
    assert process.exitcode == 0
    assert queue.get() == [leaf.tolist() for leaf in optree.tree_leaves(params)]


def test_a_saved_transform():
    """`torch.save` keeps it beside the params."""
    file = io.BytesIO()
    torch.save({"tx": fs.sgd(0.1), "params": PROBLEM.params}, file)
    file.seek(0)
    assert repr(torch.load(file, weights_only=False)["tx"]) == "sgd(lr=0.1)"


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=repr)
def test_schedules_are_values(schedule):
    """Copies are equal, have one hash and give the same numbers."""
    for twin in (pickled(schedule), copy.deepcopy(schedule)):
        assert twin == schedule
        assert hash(twin) == hash(schedule)
        equal(twin(torch.tensor(3)), schedule(torch.tensor(3)))


def test_equal_schedules():
    """Are made by one function of equal arguments, however they were given."""
    schedule = fs.cosine(0.1, 10)
    assert schedule == fs.cosine(value=0.1, total_steps=10, end=0)
    assert fs.step_decay(1.0, 10, milestones=[0.5]) == fs.step_decay(1.0, 10, milestones=(0.5,))
    for other in (fs.cosine(0.1, 11), fs.cosine(torch.tensor(0.1), 10), fs.constant(0.1), 0.1, None):
        assert schedule != other
    assert fs.step_decay(1.0, 10, milestones=[0.5]) != fs.step_decay(1.0, 10, milestones=[0.5, 0.5])
    assert fs.constant(torch.tensor(0.1)) != fs.constant(torch.tensor(0.2))


PROBING = {
    "sam": fs.sam(),
    "asam": fs.asam(),
    "sharpness_aware": fs.sharpness_aware(climb()),
    "gsam": fs.gsam(),
    "looksam": fs.looksam(),
    "msam": fs.msam(),
    "chain": fs.chain(fs.chain(fs.trace(), fs.sam()), fs.normalize()),
    "partition": fs.partition(is_weight, {True: fs.sam(), False: fs.identity()}),
    "masked": fs.masked(fs.sam(), is_weight),
    "microbatch": fs.microbatch(fs.sam(), 2),
    "vectorize": fs.ensemble.vectorize(fs.sam()),
    "apply_if_finite": fs.apply_if_finite(fs.sam()),
    "dynamic_loss_scale": fs.dynamic_loss_scale(fs.sam()),
    "a copy": pickled(fs.chain(fs.identity(), fs.sam())),
}


@pytest.mark.parametrize("name", PROBING)
def test_an_ascent_that_probes_is_refused(name):
    """With what probes, wherever it is, here and at the front end."""
    makes = {
        "sharpness_aware": fs.sharpness_aware,
        "SharpnessAware": lambda ascent: SharpnessAware([torch.ones(1)], torch.optim.SGD, ascent, lr=0.1),
    }
    for where, make in makes.items():
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            make(PROBING[name])
        found = {name: f"{name}()" for name in ("asam", "gsam", "looksam", "msam")}
        found |= {"sharpness_aware": "sharpness_aware(ascent=chain(normalize(), scale(factor=0.1)))"}
        assert str(caught.value) == (
            f"{where}: `ascent` must map gradients to a perturbation, got {found.get(name, 'sam()')}, which asks for "
            "gradients of its own. Pass how to climb, such as `chain(normalize(), scale(rho))`."
        )


@pytest.mark.parametrize(
    "ascent",
    [
        fs.identity(),
        fs.chain(fs.common_randomness(), climb()),
        fs.chain(fs.freeze(is_weight), climb()),
        fs.chain(fs.masked(fs.scale_by_magnitude(), is_weight), fs.sgd(0.1, momentum=0.5)),
        fs.partition(is_weight, {True: climb(), False: fs.scale(0.1)}),
        fs.lift(lambda params: (), lambda grads, state, params: (tree.scale(0.1, grads), state)),
        fs.Transform(fs.sam().init, fs.sam().update),
    ],
    ids=str,
)
def test_other_ascents_are_taken(ascent):
    """All that map gradients, and what nobody can know of."""
    call(fs.sharpness_aware(ascent), PROBLEM)


def test_a_transform_says_that_it_probes():
    """Of the user's own, or inside another; of what says nothing, nothing is known."""
    sam = fs.sam()
    own = fs.Transform(sam.init_unchecked, sam.update_unchecked, fs.SharpnessAwareState, probes=True)
    assert own.prober() is own
    assert fs.chain(fs.scale(2.0), fs.masked(own, is_weight)).prober() is own
    assert fs.chain(fs.scale(2.0), fs.sgd(0.1)).prober() is None
    with pytest.raises(ValueError, match="must map gradients to a perturbation, got Transform"):
        fs.sharpness_aware(own)


def test_files_name_public_places():
    """What files of states and transforms name is where users find it, whichever module it is written in."""
    modules = [fs, *(module for module in vars(fs).values() if inspect.ismodule(module) and hasattr(module, "__all__"))]
    found = [(m, name, getattr(m, name)) for m in modules for name in m.__all__]
    saved = [x for x in found if (isinstance(x[2], type) and issubclass(x[2], tuple)) or hasattr(x[2], "__wrapped__")]
    assert len(saved) > 30
    assert [name for m, name, x in saved if (x.__module__, x.__name__) != (m.__name__, name)] == []


OLD_PLACES = {
    "funcsam.decay": fs.DecayState,
    "funcsam.finite": fs.ApplyIfFiniteState,
    "funcsam.loss_scale": fs.LossScaleState,
    "funcsam.measures.spectra": fs.measures.Eigenpairs,
    "funcsam.measures.support": fs.measures.Estimate,
    "funcsam.moments": fs.AdamState,
    "funcsam.randomness": fs.RandomnessState,
    "funcsam.scaling": fs.ScaleState,
    "funcsam.sharpness": fs.SharpnessAwareState,
}


@pytest.mark.parametrize(("module", "cls"), OLD_PLACES.items(), ids=OLD_PLACES)
def test_files_of_the_first_version_are_read(module, cls, monkeypatch, tmp_path):
    """A state that was saved when its class lay in another module is read as a state of that class."""
    old = types.ModuleType(module)
    setattr(old, cls.__name__, cls)
    with monkeypatch.context() as then:
        then.setitem(sys.modules, module, old)
        then.setattr(cls, "__module__", module)
        torch.save(cls(*map(torch.tensor, range(len(cls._fields)))), tmp_path / "state.pt")
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    assert type(found) is cls
    equal(tuple(found), tuple(map(torch.tensor, range(len(cls._fields)))))
