"""Ensembles: every member takes the steps it would take alone."""

import dataclasses
import gc
import io
import math
import weakref
from collections import OrderedDict

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import modeling_outputs

import funcsam as fs
from tests.asserts import close, defaults, equal
from tests.modules import MODULES, Recurrent, allocated, batches, built, loss, pure_loop, sam
from tests.strategies import ensembles, reals, structural, tensors, trees

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # where `vmap` loops itself
SEEDS = (3, 1, 2)
batched = pytest.mark.parametrize("name", [name for name, case in MODULES.items() if case.vmap])
every = pytest.mark.parametrize("name", MODULES)


def build(name):
    """What makes one member."""
    return lambda: MODULES[name].build().double()


def together(name, tx=None, data=None, dims=(0, None, None), trees=None, **options):
    """Three steps of all members: `(params, buffers, losses)`."""
    many = fs.ensemble.vectorize(sam() if tx is None else tx, in_dims=dims, **options)
    trees = fs.ensemble.init(build(name), SEEDS) if trees is None else trees
    return pure_loop(built(MODULES[name]), batches() if data is None else data, tx=many, trees=trees)


def alone(name, **options):
    """The same, member by member."""
    runs = []
    for seed in SEEDS:
        params, buffers, losses = pure_loop(built(MODULES[name], seed), batches(), **options)
        runs.append((params, buffers, torch.stack(losses)))
    params, buffers, losses = fs.ensemble.stack(runs)
    return params, buffers, list(losses.T)


@batched
def test_an_ensemble_is_a_loop_over_its_members(name):
    """Params, buffers and losses, from the same seeds, on a batch that they share."""
    close(together(name), alone(name), rtol=1e-7)


@every
def test_an_ensemble_without_vmap(name):
    """`chunk_size=1` takes whatever module there is."""
    close(together(name, chunk_size=1), alone(name), rtol=1e-7)


@pytest.mark.parametrize("chunk_size", [2, 3, 5])
def test_chunk_size_changes_nothing(chunk_size):
    close(together("batch norm", chunk_size=chunk_size), together("batch norm"), rtol=1e-7)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_batches_of_their_own(chunk_size):
    """Along any axis, for each argument."""
    generator = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(5, 3, 4, generator=generator, dtype=torch.float64), torch.randint(4, (3, 5), generator=generator))
        for _ in range(3)
    ]
    params, buffers, losses = together("batch norm", data=data, dims=(0, 1, 0), chunk_size=chunk_size)
    for k, seed in enumerate(SEEDS):
        own = [(x[:, k], y[k]) for x, y in data]
        wanted = pure_loop(built(MODULES["batch norm"], seed), own)
        close(fs.ensemble.member((params, buffers), k), wanted[:2], rtol=1e-7)
        close(torch.stack(losses)[:, k], torch.stack(wanted[2]), rtol=1e-7)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_a_sweep_is_one_run(chunk_size):
    """Each member has a radius and a learning rate of its own."""
    hyper = {"rho": torch.tensor([0.0, 0.1, 0.5]), "lr": torch.tensor([0.1, 0.05, 0.2], dtype=torch.float64)}
    chain = lambda rho, lr: fs.chain(fs.sam(rho), fs.sgd(lr, momentum=0.9))  # noqa: E731
    many = fs.ensemble.vectorize(chain, hyper, in_dims=(0, None, None), chunk_size=chunk_size)
    params, _, _ = pure_loop(
        built(MODULES["batch norm"]), batches(), tx=many, trees=fs.ensemble.init(build("batch norm"), SEEDS)
    )
    for k, seed in enumerate(SEEDS):
        tx = chain(*(values[k].item() for values in hyper.values()))
        close(
            fs.ensemble.member(params, k), pure_loop(built(MODULES["batch norm"], seed), batches(), tx=tx)[0], rtol=1e-6
        )


def test_a_schedule_swept():
    """A schedule may start from a number of each member's own."""
    lrs = torch.tensor([0.1, 0.4], dtype=torch.float64)
    for schedule in (
        fs.constant,
        lambda lr: fs.cosine(lr, 4),
        lambda lr: fs.step_decay(lr, 4),
        lambda lr: fs.warmup_cosine(lr, 1, 4),
    ):
        many = fs.ensemble.vectorize(lambda lr, schedule=schedule: fs.sgd(schedule(lr)), {"lr": lrs})
        w, state = torch.ones(2, dtype=torch.float64), many.init(torch.ones(2, dtype=torch.float64))
        for _ in range(3):
            w, state, _ = many.step(w, lambda w: w, state)
        wanted = torch.ones(2, dtype=torch.float64)
        for k in range(3):
            wanted = wanted - torch.stack([schedule(lr.item())(torch.tensor(k)) for lr in lrs]) * wanted
        close(w, wanted)


@batched
def test_one_member_going_nan_leaves_the_others(name):
    """As they were, to rounding."""
    trees = fs.ensemble.init(build(name), SEEDS)
    poisoned = optree.tree_map(lambda leaf: leaf.clone().index_fill_(0, torch.tensor([1]), torch.nan), trees[0])
    after, before = together(name, trees=(poisoned, trees[1])), together(name)
    for k in (0, 2):
        close(fs.ensemble.member(after[:2], k), fs.ensemble.member(before[:2], k), rtol=1e-12)


def test_init_is_the_seeds_modules_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    params, buffers = fs.ensemble.init(build("batch norm"), SEEDS)
    equal(torch.get_rng_state(), before)
    for k, seed in enumerate(SEEDS):
        equal(fs.ensemble.member((params, buffers), k), fs.nn.split(built(MODULES["batch norm"], seed)))


def test_init_holds_one_module_at_a_time():
    alive, most = weakref.WeakSet(), []

    def one():
        gc.collect()
        most.append(len(alive))
        module = nn.Linear(2, 2)
        alive.add(module)
        return module

    fs.ensemble.init(one, range(5))
    assert max(most) == 0


@given(members=trees().flatmap(lambda tree: st.integers(1, 4).map(lambda n: [tree] * n)))
@structural
def test_unstack_undoes_stack(members):
    equal(fs.ensemble.unstack(fs.ensemble.stack(members)), members)


@given(ensemble=ensembles())
@structural
def test_members_come_out_as_they_went_in(ensemble):
    stacked = fs.ensemble.stack(ensemble.members)
    assert fs.ensemble.size(stacked) == 3
    equal(fs.ensemble.unstack(stacked), ensemble.members)
    equal(fs.ensemble.member(stacked, -1), ensemble.members[2])


def test_a_member_is_a_copy():
    """Whoever writes to it leaves the ensemble as it is."""
    stacked = {"w": torch.ones(3, 2)}
    for each in (fs.ensemble.member(stacked, 1), *fs.ensemble.unstack(stacked)):
        each["w"].zero_()
    equal(stacked, {"w": torch.ones(3, 2)})


def test_save_load_and_take_one_out(tmp_path):
    """An ensemble goes on from a file exactly, and a member is a plain module."""
    model = built(MODULES["batch norm"])
    many = fs.ensemble.vectorize(sam(), in_dims=(0, None, None))
    grads_fn = fs.grad_and_value(fs.nn.loss_fn(model, loss), has_aux=True)
    params, buffers = fs.ensemble.init(build("batch norm"), SEEDS)
    state = many.init(params)
    runs = []
    for batch in batches():
        runs.append((params, buffers, state))
        params, state, (_, buffers) = many.step(params, grads_fn, state, buffers, *batch)
    torch.save(runs[1], file := io.BytesIO())
    file.seek(0)
    w, b, s = torch.load(file, weights_only=True)
    for batch in batches()[1:]:
        w, s, (_, b) = many.step(w, grads_fn, s, b, *batch)
    equal((w, b, s), (params, buffers, state))

    module = fs.nn.load(build("batch norm")(), *fs.ensemble.member((params, buffers), 1)).eval()
    x = batches()[0][0]
    close(module(x).detach(), fs.ensemble.predict(model, params, buffers, x)[1], rtol=1e-9)


@every
def test_predictions_of_all_members(name):
    """In evaluation mode, on inputs that they share or not, in chunks or not."""
    model = built(MODULES[name])
    params, buffers = fs.ensemble.init(build(name), SEEDS)
    x = batches()[0][0]
    wanted = torch.stack([built(MODULES[name], seed).eval()(x).detach() for seed in SEEDS])
    for size in (None, 1, 2):
        if size == 1 or (
            MODULES[name].vmap and not isinstance(model, Recurrent)
        ):  # `vmap` has no rule for their kernels in evaluation mode
            close(fs.ensemble.predict(model, params, buffers, x, chunk_size=size), wanted)
            own = torch.stack([x] * 3)
            close(fs.ensemble.predict(model, params, buffers, own, in_dims=0, chunk_size=size), wanted)


def test_dropout_differs_between_members_unless_it_is_to_be_the_same():
    model = nn.Dropout(0.5)
    evaluate = fs.nn.loss_fn(model, lambda model, x: model(x).sum())
    grads_fn = lambda w: (w, evaluate({}, {}, torch.ones(64))[0])  # noqa: E731
    for more in ({}, {"randomness": "same"}, {"randomness": "different"}):
        for chunk_size in (None, 1):
            many = fs.ensemble.vectorize(fs.identity(), chunk_size=chunk_size, **more)
            losses = many.update(torch.ones(4, 1), grads_fn, ())[2]
            assert (losses == losses[0]).all() == (more.get("randomness") == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        fs.ensemble.vectorize(fs.identity(), randomness="error").update(torch.ones(4, 1), grads_fn, ())


def test_the_state_is_written_out():
    """A counter is not one entry seen many times, which a compiled step would be traced again for."""
    many = fs.ensemble.vectorize(fs.chain(fs.sam(), fs.sgd(momentum=0.9)))
    state = many.init({"w": torch.ones(3, 2)})
    assert all(leaf.is_contiguous() and leaf.stride(0) for leaf in optree.tree_leaves(state))


def test_bootstrap_draws_with_replacement():
    index = fs.ensemble.bootstrap(1000, [0, 1, 0])
    assert (index.shape, index.dtype) == ((3, 1000), torch.int64)
    assert ((index >= 0) & (index < 1000)).all()
    equal(index[0], index[2])
    assert (index[0] != index[1]).any()
    share = len(index[0].unique()) / 1000
    assert abs(share - (1 - 1 / math.e)) < 0.05


logits = st.integers(1, 4).flatmap(lambda n: st.integers(1, 5).flatmap(lambda m: tensors((n, m, 3))))


@given(logits=logits)
def test_the_average_is_that_of_the_probabilities(logits):
    close(fs.ensemble.average(logits).exp(), logits.softmax(-1).mean(0))


@given(logits=logits, data=st.data())
def test_negative_log_likelihood(logits, data):
    """`-log p(label)`, the mean over the examples; for one member it is cross-entropy."""
    labels = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=logits.shape[1], max_size=logits.shape[1])))
    p = logits.softmax(-1).mean(0)
    close(fs.ensemble.nll(logits, labels), -torch.log(p[torch.arange(len(labels)), labels]).mean())
    close(fs.ensemble.nll(logits[:1], labels), F.cross_entropy(logits[0], labels))


def oracle(probabilities, labels, bins):
    """Guo et al., 2017, equations 2, 3 and 5, example by example; bins are ((m - 1)/M, m/M]."""
    total = 0.0
    for m in range(1, bins + 1):
        hits, confidences = [], []
        for p, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
            if (m - 1) / bins < max(p) <= m / bins:
                hits.append(float(p.index(max(p)) == label))
                confidences.append(max(p))
        if hits:
            accuracy, confidence = sum(hits) / len(hits), sum(confidences) / len(hits)
            total += len(hits) / len(labels) * abs(accuracy - confidence)
    return total


@given(
    logits=tensors((6, 3), elements=reals),
    labels=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    bins=st.integers(1, 20),
)
def test_calibration_error(logits, labels, bins):
    """Equal to the definition, also for log-probabilities."""
    labels = torch.tensor(labels)
    wanted = torch.tensor(oracle(logits.softmax(-1), labels, bins), dtype=torch.float64)
    close(fs.ensemble.calibration_error(logits, labels, bins), wanted)
    close(fs.ensemble.calibration_error(logits.log_softmax(-1), labels, bins), wanted, rtol=1e-6)


def test_calibration_error_in_closed_form():
    """Sure and right half of the time is off by a half; sure and right always is not off."""
    sure = torch.tensor([[100.0, 0.0]] * 4)
    assert fs.ensemble.calibration_error(sure, torch.tensor([0, 1, 0, 1])) == 0.5
    assert fs.ensemble.calibration_error(sure, torch.zeros(4, dtype=torch.int64)) == 0
    edge = torch.tensor([[1.0, 1.0], [9.0, 1.0]]).log()  # a hit with confidence 1/2, a miss with 9/10: not in one bin
    close(fs.ensemble.calibration_error(edge, torch.tensor([0, 1]), 2), torch.tensor((1 / 2 + 9 / 10) / 2), 1e-6)
    rows = torch.stack([sure, -sure])
    each = torch.vmap(fs.ensemble.calibration_error, in_dims=(0, None))(rows, torch.zeros(4, dtype=torch.int64))
    equal(each, torch.tensor([0.0, 1.0]))


@given(logits=st.integers(2, 4).flatmap(lambda n: tensors((n, 5, 3))))
def test_disagreement_counts_pairs(logits):
    """The mean over pairs of members and examples of "they differ"."""
    choice = logits.argmax(-1)
    n = len(choice)
    pairs = [(choice[i] != choice[j]).double().mean() for i in range(n) for j in range(i)]
    close(fs.ensemble.disagreement(logits), torch.stack(pairs).mean())


# Numbers: float32 at least, and edges that are what they say


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def metrics(logits, labels):
    """Every metric of an ensemble."""
    average = fs.ensemble.average(logits)
    calibration = fs.ensemble.calibration_error(logits[0], labels)
    return average, fs.ensemble.nll(logits, labels), calibration, fs.ensemble.disagreement(logits)


def predictions(dtype, members=3, examples=40):
    """Logits of a few classes, rounded to a dtype, and labels."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(members, examples, 4, generator=generator).to(dtype)
    return logits, torch.randint(4, (examples,), generator=generator)


@each_dtype
def test_metrics_are_computed_in_float32_at_least(dtype):
    """Those of half-precision logits are those of the same numbers in float32, also under autocast around them."""
    logits, labels = predictions(dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    wanted = metrics(logits.to(wide), labels)
    assert all(each.dtype is wide for each in wanted)
    equal(metrics(logits, labels), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        equal(metrics(logits, labels), wanted)


@each_dtype
def test_many_votes_and_many_examples(dtype):
    """300 members of one mind disagree never; 1e5 wrong examples are as wrong as one."""
    assert fs.ensemble.disagreement(torch.eye(3, dtype=dtype).expand(300, 3, 3)) == 0
    logits = torch.tensor([[0.0, 2.796875]], dtype=dtype)  # a number of every dtype
    confidence = 1 / (1 + math.exp(-2.796875))
    labels = torch.zeros(100_000, dtype=torch.int64)
    error = fs.ensemble.calibration_error(logits.expand(100_000, 2), labels)
    assert error.item() == pytest.approx(confidence, rel=1e-6)
    nats = fs.ensemble.nll(logits.expand(1, 100_000, 2), labels)
    assert nats.item() == pytest.approx(-math.log(1 - confidence), rel=1e-6)


def test_edges_of_bins_are_exact():
    """0.6000000000000001 lies above 6/10 in float64, and 0.55 below: two bins. An edge belongs to the bin below it."""
    two = torch.tensor([[0.4054651081081644, 0.0], [0.2006706954621512, 0.0]], dtype=torch.float64)
    assert two.softmax(-1)[:, 0].tolist() == [0.6000000000000001, 0.55]
    labels = torch.tensor([0, 1])
    assert fs.ensemble.calibration_error(two, labels, 10).item() == pytest.approx(0.475, abs=1e-15)
    edge = torch.tensor([[0.4054651081081642, 0.0], [0.2006706954621512, 0.0]], dtype=torch.float64)
    assert edge.softmax(-1)[0, 0].item() == 6 / 10
    assert fs.ensemble.calibration_error(edge, labels, 10).item() == pytest.approx(0.075, abs=1e-15)


def test_metrics_commute_with_vmap_and_grad():
    logits, labels = predictions(torch.float64)
    pair = torch.stack([logits, 2 * logits])
    wanted = [torch.stack(each) for each in zip(*(metrics(each, labels) for each in pair), strict=True)]
    close(list(torch.vmap(metrics, in_dims=(0, None))(pair, labels)), wanted)
    swapped = torch.stack([labels, labels.flip(0)])
    wanted = torch.stack([fs.ensemble.nll(logits, each) for each in swapped])
    close(torch.vmap(fs.ensemble.nll, in_dims=(None, 0))(logits, swapped), wanted)
    given = logits.clone().requires_grad_()
    fs.ensemble.nll(given, labels).backward()
    close(torch.func.grad(fs.ensemble.nll)(logits, labels), given.grad)
    assert given.grad.any()
    half = torch.func.grad(fs.ensemble.nll)(logits.half(), labels)
    close(half.double(), given.grad, rtol=1e-3)
    assert half.dtype is torch.float16


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_metrics_compile(dtype):
    given = predictions(dtype)
    close(torch.compile(metrics, backend="aot_eager", fullgraph=True)(*given), metrics(*given), rtol=1e-6)


def test_metrics_and_draws_do_not_depend_on_defaults():
    """Neither on the default dtype nor on the default device."""
    given = predictions(torch.float32)
    wanted = metrics(*given), fs.ensemble.bootstrap(5, [0, 1])
    with defaults():
        found = metrics(*given), fs.ensemble.bootstrap(5, [0, 1])
    equal(found, wanted)


W = torch.ones(3, 2)
LABELS = torch.tensor([0, 1, 1])
BAD = [
    (lambda: fs.ensemble.init(nn.Identity, []), ValueError, "init: `seeds` must have at least one seed, got none."),
    (lambda: fs.ensemble.init(3, [0]), TypeError, "init: `build` must be a function, got int."),
    (lambda: fs.ensemble.stack([]), ValueError, "stack: `members` must have at least one member, got none."),
    (
        lambda: fs.ensemble.stack([{"w": W}, {"v": W}]),
        ValueError,
        "stack: `members[1]` must have the structure of `members[0]`, got no leaf at ['w'].",
    ),
    (lambda: fs.ensemble.member(W, 3), ValueError, "member: `index` must be less than the 3 members, got 3."),
    (lambda: fs.ensemble.size(()), ValueError, "must have one number of members, got no leaves."),
    (lambda: fs.ensemble.vectorize(0.1), TypeError, "vectorize: `tx` must be a Transform, got float."),
    (lambda: fs.ensemble.vectorize(fs.sam), TypeError, "got function. Give `hyper` for a function that makes one."),
    (
        lambda: fs.ensemble.vectorize(fs.sam(), {"rho": W}),
        TypeError,
        "vectorize: `tx` must be a function from `hyper` to a Transform, got a Transform.",
    ),
    (
        lambda: fs.ensemble.vectorize(fs.sam, {"rho": torch.tensor(0.1)}),
        ValueError,
        "vectorize: `hyper` must have one entry per member along the first axis, got () at ['rho'].",
    ),
    (
        lambda: fs.ensemble.vectorize(fs.sam, {"rho": [0.1, 0.2]}),
        TypeError,
        "vectorize: `hyper` must hold tensors only, got float at ['rho'][0].",
    ),
    (
        lambda: fs.ensemble.vectorize(fs.sam, {"rho": torch.ones(2)}).init(W),
        ValueError,
        "vectorize: `params` must have one number of members, got 3 at [0] and 2 at [1]['rho'].",
    ),
    (
        lambda: fs.ensemble.vectorize(lambda rho: rho, {"rho": torch.ones(3)}).init(W),
        TypeError,
        "vectorize: `tx` must return a Transform, got Tensor.",
    ),
    (
        lambda: fs.ensemble.vectorize(fs.sam(), chunk_size=0),
        ValueError,
        "vectorize: `chunk_size` must be at least 1, got 0.",
    ),
    (
        lambda: fs.ensemble.vectorize(fs.sam(), randomness="all"),
        ValueError,
        'vectorize: `randomness` must be "same", "different" or "error", got \'all\'.',
    ),
    (
        lambda: fs.ensemble.vectorize(fs.identity(), in_dims=(0, 0)).update(W, lambda w, x: w, (), W),
        ValueError,
        "vectorize: `in_dims` must have one entry per argument of the batch, got 2 for 1.",
    ),
    (
        lambda: fs.ensemble.vectorize(fs.identity()).init({"w": W, "b": torch.ones(2)}),
        ValueError,
        "vectorize: `params` must have one number of members, got 2 at ['b'] and 3 at ['w'].",
    ),
    (lambda: fs.ensemble.average(W), ValueError, "`logits` must have shape (members, examples, classes), got (3, 2)."),
    (
        lambda: fs.ensemble.calibration_error(W[None], LABELS),
        ValueError,
        "calibration_error: `logits` must have shape (examples, classes), got (1, 3, 2).",
    ),
    (lambda: fs.ensemble.disagreement(W[None]), ValueError, "must be those of at least 2 members, got 1."),
    (lambda: fs.ensemble.bootstrap(0, [1]), ValueError, "bootstrap: `examples` must be at least 1, got 0."),
    (lambda: fs.ensemble.bootstrap(3, []), ValueError, "bootstrap: `seeds` must have at least one seed, got none."),
    (lambda: fs.ensemble.average([W]), TypeError, "average: `logits` must be a floating-point tensor, got list."),
    (
        lambda: fs.ensemble.disagreement(LABELS.view(3, 1, 1)),
        TypeError,
        "disagreement: `logits` must be a floating-point tensor, got torch.int64.",
    ),
    (
        lambda: fs.ensemble.average(W[None, :0]),
        ValueError,
        "average: `logits` must have at least one member, example and class, got shape (1, 0, 2).",
    ),
    (
        lambda: fs.ensemble.disagreement(W[None].expand(3, 3, 2)[:, :0]),
        ValueError,
        "disagreement: `logits` must have at least one member, example and class, got shape (3, 0, 2).",
    ),
    (
        lambda: fs.ensemble.calibration_error(W[:0], LABELS[:0]),
        ValueError,
        "calibration_error: `logits` must have at least one example and class, got shape (0, 2).",
    ),
    (
        lambda: fs.ensemble.nll(W[None], LABELS[:, None]),
        ValueError,
        "nll: `labels` must have shape (3,), got (3, 1).",
    ),
    (
        lambda: fs.ensemble.calibration_error(W, LABELS[:, None]),
        ValueError,
        "calibration_error: `labels` must have shape (3,), got (3, 1).",
    ),
    (lambda: fs.ensemble.nll(W[None], LABELS[:2]), ValueError, "nll: `labels` must have shape (3,), got (2,)."),
    (
        lambda: fs.ensemble.calibration_error(W, LABELS.double()),
        TypeError,
        "calibration_error: `labels` must be a tensor of whole numbers, got torch.float64.",
    ),
    (
        lambda: fs.ensemble.nll(W[None], LABELS.tolist()),
        TypeError,
        "nll: `labels` must be a tensor of whole numbers, got list.",
    ),
    (
        lambda: fs.ensemble.nll(W[None], LABELS > 0),
        TypeError,
        "nll: `labels` must be a tensor of whole numbers, got torch.bool.",
    ),
    (lambda: fs.ensemble.nll(W[None], LABELS + 1), ValueError, "nll: `labels` must be from 0 to 1, got 2."),
    (lambda: fs.ensemble.nll(W[None], LABELS - 100), ValueError, "nll: `labels` must be from 0 to 1, got -100."),
    (
        lambda: fs.ensemble.calibration_error(W, 2 * LABELS),
        ValueError,
        "calibration_error: `labels` must be from 0 to 1, got 2.",
    ),
]


@pytest.mark.parametrize(("make", "error", "text"), BAD, ids=[text for *_, text in BAD])
def test_bad_arguments_are_refused(make, error, text):
    with pytest.raises(error) as caught:
        make()
    assert text in str(caught.value)


class Base(nn.Module):
    """A frozen table that the members share, and something small to train."""

    def __init__(self, rows=8):
        super().__init__()
        self.table = nn.Embedding(rows, 4).requires_grad_(False)
        self.register_buffer("mask", torch.ones(rows))
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.table(x) * self.mask[x][:, None])


CHUNKS = pytest.mark.parametrize("chunk_size", [None, 1, 2])


def shared_base(rows=8, chunk_size=None):
    """An ensemble of three on one base: a function that takes a step from the last, and the base."""
    model, x = Base(rows), torch.arange(4)
    params = fs.ensemble.stack([fs.nn.split(Base(rows))[0] for _ in SEEDS])
    base = fs.nn.split(model)[1]
    grads_fn = fs.grad_and_value(fs.nn.loss_fn(model, loss), has_aux=True)
    many = fs.ensemble.vectorize(sam(), in_dims=(None, None, None), chunk_size=chunk_size)
    state = many.init(params)
    return params, state, base, lambda params, state, buffers: many.step(params, grads_fn, state, buffers, x, x)


@CHUNKS
def test_a_frozen_base_stays_shared(chunk_size):
    """It comes back as it was given, in any number of steps, and members train as they would alone."""
    params, state, base, step = shared_base(chunk_size=chunk_size)
    model, x = Base(), torch.arange(4)
    wanted = [
        pure_loop(model, [(x, x)] * 3, trees=(fs.ensemble.member(params, k), dict(base)))[0] for k in range(len(SEEDS))
    ]
    before, buffers = {name: leaf.clone() for name, leaf in base.items()}, base
    for _ in range(3):
        params, state, (_, buffers) = step(params, state, buffers)
        assert all(buffers[name] is base[name] for name in base)
    close(params, fs.ensemble.stack(wanted), rtol=1e-5)
    equal(base, before)


@CHUNKS
def test_a_step_takes_no_memory_for_a_shared_base(chunk_size):
    """A table ten times as large takes the same bytes, but for one spread of its small buffer by `vmap`."""
    sizes = []
    for rows in (1000, 10000):
        params, state, buffers, step = shared_base(rows, chunk_size)
        spread = 0 if chunk_size == 1 else 2 * 4 * rows * len(SEEDS)  # two passes, float32
        params, state, (_, buffers) = step(params, state, buffers)
        sizes.append(allocated(lambda: step(params, state, buffers)) - spread)  # noqa: B023
    assert 0 < sizes[0] == sizes[1] < 64000


@CHUNKS
def test_shared_buffers_that_are_written_need_an_axis_afterwards(chunk_size):
    """They come back one per member, and a second step says so; with axis 0 it goes on."""
    model = built(MODULES["batch norm"])
    params, buffers = fs.ensemble.init(build("batch norm"), SEEDS)
    grads_fn, batch = fs.grad_and_value(fs.nn.loss_fn(model, loss), has_aux=True), batches()[0]
    shared, own = (
        fs.ensemble.vectorize(sam(), in_dims=(dim, None, None), chunk_size=chunk_size).step for dim in (None, 0)
    )
    state = fs.ensemble.vectorize(sam()).init(params)
    wanted = own(params, grads_fn, state, buffers, *batch)
    params, state, (value, buffers) = shared(params, grads_fn, state, fs.ensemble.member(buffers, 0), *batch)
    close((params, state, (value, buffers)), wanted)
    with pytest.raises(ValueError, match=r"of all members of an ensemble, .* give them `in_dims` 0"):
        shared(params, grads_fn, state, buffers, *batch)
    own(params, grads_fn, state, buffers, *batch)


def test_a_member_may_write_where_another_does_not():
    """Member by member, what only some write to comes back one per member."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))
            self.register_buffer("seen", torch.zeros(2))

        def forward(self):
            if self.w > 1:
                self.seen.add_(1)
            return self.w * self.seen.sum()

    many = fs.ensemble.vectorize(fs.sgd(0.1), in_dims=(None,), chunk_size=1)
    params, buffers = {"w": torch.tensor([1.0, 2.0])}, {"seen": torch.zeros(2)}
    grads_fn = fs.grad_and_value(fs.nn.loss_fn(Sometimes(), lambda model: model()), has_aux=True)
    new = many.step(params, grads_fn, many.init(params), buffers)[2][1]
    equal((new["seen"], buffers["seen"]), (torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.zeros(2)))


@dataclasses.dataclass(frozen=True)
class Output:
    logits: torch.Tensor
    hidden: tuple | None = None
    loss: None = None


class Returns(nn.Module):
    """Returns its output in some container."""

    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(4, 4), wrap

    def forward(self, x):
        return self.wrap(self.linear(x))


def model_output(y):
    """What models of transformers return: a dict that leaves out `None`, and a dataclass."""
    return modeling_outputs.CausalLMOutput(logits=y, hidden_states=(y, y + 1))


WRAPS = {
    "tuple": lambda y: (y, y.sum()),
    "list": lambda y: [y],
    "dict": lambda y: {"logits": y, "a": y + 1},
    "ordered dict": lambda y: OrderedDict(logits=y, a=y + 1),
    "dict with None": lambda y: {"logits": y, "loss": None},
    "None": lambda y: None,
    "nested": lambda y: {"a": (y, [y + 1, {"b": y + 2}])},
    "named tuple": lambda y: y.max(-1),
    "dataclass": Output,
    "nested dataclass": lambda y: [Output(y, (y, None)), None],
    "model output": model_output,
    "empty": lambda y: {},
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_predictions_in_the_containers_of_the_module(wrap):
    """In the same for every chunk size, and each member's are its own."""
    model = Returns(WRAPS[wrap])
    params, buffers = fs.ensemble.init(lambda: Returns(WRAPS[wrap]), SEEDS)
    x = torch.ones(3, 4)
    own = [fs.nn.predict(model, fs.ensemble.member(params, k), {}, x) for k in range(3)]
    for chunk_size in (None, 1, 2):
        got = fs.ensemble.predict(model, params, buffers, x, chunk_size=chunk_size)
        assert type(got) is type(own[0])
        for k in range(3):
            ours, theirs = contents(got, k), contents(own[k])
            assert str(ours[1]) == str(theirs[1])
            close(ours[0], theirs[0], rtol=1e-6)


def contents(output, member=None):
    """Tensors and structure, without the library's own means."""
    if dataclasses.is_dataclass(output) and not isinstance(output, dict):
        return contents({field.name: getattr(output, field.name) for field in dataclasses.fields(output)}, member)
    if isinstance(output, dict):
        parts = [contents(output[key], member) for key in output]
        return [x for part, _ in parts for x in part], [type(output).__name__, *output, *(spec for _, spec in parts)]
    if isinstance(output, (tuple, list)):
        parts = [contents(each, member) for each in output]
        return [x for part, _ in parts for x in part], [type(output).__name__, *(spec for _, spec in parts)]
    if output is None:
        return [], None
    return [output.detach() if member is None else output[member].detach()], "tensor"


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("extra", [1.0, "text", object])
def test_outputs_that_are_not_tensors_are_refused(extra, chunk_size):
    """In the same words for every chunk size."""
    model = Returns(lambda y: (y, extra))
    trees = fs.ensemble.init(lambda: Returns(None), SEEDS)
    with pytest.raises(
        TypeError, match="predict: `model` must return tensors, alone or in tuples, lists, dicts and data"
    ):
        fs.ensemble.predict(model, *trees, torch.ones(3, 4), chunk_size=chunk_size)


def test_what_torch_cannot_batch_comes_with_a_way_around():
    """The error of torch, and a note."""
    params = torch.ones(2, 3)
    tx = fs.ensemble.vectorize(fs.sgd(0.1))
    with pytest.raises(RuntimeError) as caught:
        tx.step(params, lambda w: w * w.sum().item(), tx.init(params))
    assert "`chunk_size=1` takes a plain loop instead" in caught.value.__notes__[0]
