"""Pictures of landscapes: what is evaluated, on which scale it is drawn, and that the page needs nothing else."""

import html.parser
import json
import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcsam as fs
from funcsam.studies import pictures, survey
from funcsam.studies.errors import StudyError

PNG = b"\x89PNG\r\n\x1a\n"


def network(norm=True):
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(4, 8), *middle, nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def problem(norm=True):
    """A network, two solutions that were not trained, and data."""
    torch.manual_seed(0)
    solutions = {name: fs.nn.split(network(norm)) for name in ("sgd", "sam:rho=0.1")}
    x, y = torch.randn(32, 4), torch.arange(32) % 3
    return network(norm), solutions, x, y, (torch.randn(16, 4), torch.arange(16) % 3)


def landscape(losses=None, **other):
    """A made-up one: a narrow and a wide bowl."""
    xs, ys = torch.linspace(-1, 1, 5), torch.linspace(-2, 2, 7)
    bowl = xs.double() ** 2 + 0.5 * ys.double()[:, None] ** 2
    losses = torch.stack([0.01 + 10 * bowl, 0.5 + bowl]) if losses is None else losses
    ts = torch.linspace(-0.25, 1.25, 7)
    given = survey.Landscape(
        ("sgd", "sam"), xs, ys, losses, losses[:, 3, 2], ts, 1 + ts.double(), ts.double() ** 2, "digits", "a caption"
    )
    return given._replace(**other)


# What is evaluated


def test_a_long_title_is_not_cut_off():
    """It goes on in a second line, narrow enough for its picture; so does a caption."""
    long = landscape(title="cifar10 (500 training examples, 2,000 test examples), " * 3)
    for width in (7, 11):
        figure = pictures._figure(long, "loss on 200 training examples, " * 6, width, 4)
        for text, letters in ((figure.get_suptitle(), 12), (figure.get_supxlabel(), 14)):
            assert len(text.splitlines()) > 1
            assert max(map(len, text.splitlines())) <= letters * width


def test_the_middle_and_the_ends_are_the_solutions():
    net, solutions, x, y, _ = problem(norm=False)
    found = survey.around(net, solutions, x, y, "title", points=5, radius=0.5)
    assert found.names == ("sgd", "sam:rho=0.1")
    assert found.xs.tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5] == found.ys.tolist()
    for k, (params, buffers) in enumerate(solutions.values()):
        loss = F.cross_entropy(fs.nn.predict(net, params, buffers, x), y).double()
        assert found.centres[k] == found.losses[k, 2, 2] == loss
        assert found.line[found.ts == k] == loss
    assert found.ts.min() == -0.25
    assert found.ts.max() == 1.25
    assert found.errors is None
    assert "batch-norm" not in found.caption


def test_the_middle_of_the_line_is_the_mean_of_the_solutions():
    """And every other place its mixture of them, `(1 - t) a + t b`: loss and test error, statistics of the examples."""
    net, solutions, x, y, test = problem()
    found = survey.around(net, solutions, x, y, "title", test, points=9)
    assert found.ts.tolist() == [k / 8 for k in range(-2, 11)]
    (first, buffers), (second, _) = solutions.values()
    for k, t in enumerate(found.ts.tolist()):
        params = {name: (1 - t) * w + t * second[name] for name, w in first.items()}
        inside = F.linear(x, params["0.weight"], params["0.bias"])
        fitting = {**buffers, "1.running_mean": inside.mean(0), "1.running_var": inside.var(0)}
        biased = {**fitting, "1.running_var": inside.var(0, correction=0)}
        loss = F.cross_entropy(fs.nn.predict(net, params, biased, x), y)
        assert found.line[k].item() == pytest.approx(loss.item(), rel=1e-4)
        wrong = (fs.nn.predict(net, params, fitting, test[0]).argmax(-1) != test[1]).float().mean()
        assert found.errors[k].item() == pytest.approx(wrong.item())


@pytest.mark.parametrize(("radius", "points"), [(0.7, 31), (0.1, 7), (1e-3, 101), (3.0, 13)])
def test_the_middle_of_a_picture_is_the_solution(radius, points, monkeypatch):
    """At zero, exactly: evenly spaced numbers need not have a zero in their middle."""
    net, solutions, x, y, _ = problem(norm=False)
    asked = []

    def grid(loss_fn, params, directions, xs, ys, *batch, **how):
        asked.extend((xs, ys))
        return torch.arange(1.0, points**2 + 1).view(points, points) + 1e4 * (len(asked) > 2)

    monkeypatch.setattr(fs.landscape, "grid", grid)
    found = survey.around(net, solutions, x, y, "title", radius=radius, points=points)
    for steps in (*asked, found.xs, found.ys):
        assert steps[points // 2] == 0.0
        assert steps[[0, -1]].tolist() == pytest.approx([-radius, radius])
    middle = (points**2 + 1) / 2
    assert found.centres.tolist() == [middle, 1e4 + middle]


def test_both_pictures_have_the_same_draw():
    """The grids are those of `fs.landscape` with one seed; another seed gives others."""
    net, solutions, x, y, _ = problem(norm=False)
    found = survey.around(net, solutions, x, y, "title", points=3, seed=7, chunk_size=4)
    loss_fn = fs.nn.loss_fn(net.eval(), lambda net, x, y: F.cross_entropy(net(x), y))
    for k, (params, buffers) in enumerate(solutions.values()):
        pair = fs.landscape.directions(params, seed=7)
        grid = fs.landscape.grid(loss_fn, params, pair, [-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0], buffers, x, y)
        torch.testing.assert_close(found.losses[k], grid.double(), rtol=1e-5, atol=0.0)
    other = survey.around(net, solutions, x, y, "title", points=3, seed=8)
    assert not torch.allclose(other.losses, found.losses)


def test_statistics_are_those_of_the_examples():
    """With batch normalisation running statistics play no part; in the test error those of the training batch do."""
    net, solutions, x, y, test = problem()
    found = survey.around(net, solutions, x, y, "title", test, points=3)
    stale = {name: (params, {**b, "1.running_var": 9 * b["1.running_var"]}) for name, (params, b) in solutions.items()}
    other = survey.around(net, stale, x, y, "title", test, points=3)
    for name in ("losses", "line", "errors"):
        assert torch.equal(getattr(found, name), getattr(other, name))
    assert "batch-norm statistics" in found.caption
    assert "errors on 16 test examples" in found.caption
    params, buffers = solutions["sgd"]
    inside = F.linear(x, params["0.weight"], params["0.bias"])
    fitting = {**buffers, "1.running_mean": inside.mean(0), "1.running_var": inside.var(0)}
    wrong = (fs.nn.predict(net, params, fitting, test[0]).argmax(-1) != test[1]).float().mean()
    assert found.errors[found.ts == 0].item() == pytest.approx(wrong.item())
    assert wrong != (fs.nn.predict(net, params, buffers, test[0]).argmax(-1) != test[1]).float().mean()


@pytest.mark.parametrize("train", [True, False])
def test_the_network_is_left_as_it_was(train):
    net, solutions, x, y, test = problem()
    net.train(train)
    net[2].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    survey.around(net, solutions, x, y, "title", test, points=3)
    assert [module.training for module in net.modules()] == modes
    assert net[1].momentum == 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("tested", [True, False])
def test_progress_adds_up(tested):
    net, solutions, x, y, test = problem()
    seen = []
    survey.around(net, solutions, x, y, "title", test if tested else None, points=5, chunk_size=4, progress=seen.append)
    assert sum(seen) == survey.work(5, tested)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (
            {"points": 4},
            "landscape: `--points` must be odd and at least 3, got 4. The solution is the point in the middle.",
        ),
        (
            {"points": 1},
            "landscape: `--points` must be odd and at least 3, got 1. The solution is the point in the middle.",
        ),
        ({"radius": 0.0}, "landscape: `--radius` must be finite and positive, got 0.0."),
        ({"radius": math.inf}, "landscape: `--radius` must be finite and positive, got inf."),
        ({"solutions": {}}, "landscape: the solutions must be two, got 0."),
    ],
)
def test_bad_numbers_are_refused(wrong, text):
    net, solutions, x, y, _ = problem()
    with pytest.raises(StudyError, match=f"^{re.escape(text)}$"):
        survey.around(**{"network": net, "solutions": solutions, "x": x, "y": y, "title": "", **wrong})


# The scale


def test_one_scale_for_both():
    """From the lowest loss of either to the highest."""
    shared = pictures.scale(torch.tensor([[1.0, 2.0], [4.0, 8.0]]))
    assert (shared.low, shared.high) == (1.0, 8.0)
    assert shared.label == "training loss, logarithmic"
    assert shared.ticks() == [1.0, 2.0, 5.0]


def test_huge_corners_are_cut_and_said_to_be():
    """At ten times the third quartile; what is not finite is drawn at the edge."""
    losses = torch.ones(2, 10, 10, dtype=torch.float64)
    losses[0, 0, 0], losses[0, 0, 1], losses[0, 9, 9] = 1e9, math.nan, math.inf
    shared = pictures.scale(losses)
    assert shared.high == 10
    assert shared.label == "training loss, logarithmic, cut at 10"
    assert shared.clip(losses[0, [0, 0, 9, 5], [0, 1, 9, 5]]).tolist() == [10, 10, 10, 1]


def test_a_memorised_point_does_not_flatten_the_rest():
    """Zero and all below a millionth of the highest are drawn there."""
    losses = torch.tensor([0.0, 1e-12, 1.0, 2.0], dtype=torch.float64)
    shared = pictures.scale(losses)
    assert shared.low == 2e-6
    assert shared.clip(losses)[0] == 2e-6
    assert shared.ticks()[:2] == pytest.approx([1e-5, 1e-4])


def test_losses_must_be_finite_somewhere():
    with pytest.raises(StudyError, match=re.escape("landscape: the losses must be finite and positive somewhere, got")):
        pictures.scale(torch.full((2, 3, 3), math.nan))


# The pictures


def odd():
    """Landscapes that are awkward to draw."""
    bowl = landscape().losses
    holes = bowl.clone()
    holes[0, 0, 0], holes[1, 6, 4], holes[0, 6, 0] = math.nan, math.inf, 1e30
    return {
        "bowl": landscape(),
        "no test error": landscape(errors=None),
        "flat": landscape(torch.full_like(bowl, 2.3)),
        "holes": landscape(holes, line=torch.tensor([1.0, math.nan, 2.0, math.inf, 1.0, 1.0, 1.0])),
        "memorised": landscape(bowl - 0.01),
    }


@pytest.mark.parametrize("name", odd())
def test_pictures_are_png(name):
    """Without a warning, for every landscape that there may be."""
    given = odd()[name]
    for draw in (pictures.contours, pictures.surfaces, pictures.line):
        assert draw(given).startswith(PNG)


@pytest.fixture
def figures(monkeypatch):
    """Lets the functions return the figure and not the file."""
    monkeypatch.setattr(pictures, "_png", lambda figure: figure)


def test_contours_share_their_colours(figures):
    figure = pictures.contours(landscape())
    one, other, bar = figure.axes
    for panel in (one, other):
        assert panel.collections[0].norm.vmin == pytest.approx(0.01)
        assert panel.collections[0].norm.vmax == pytest.approx(30.01)  # 0.01 + 10 (1 + 2)
        assert panel.get_xlabel() == "first direction, filter norms"
        assert panel.lines[0].get_xydata().tolist() == [[0, 0]]
    assert one.get_title() == "sgd: loss 0.01 at the solution"
    assert other.get_title() == "sam: loss 0.5 at the solution"
    assert bar.get_ylabel() == "training loss, logarithmic"


def test_surfaces_share_heights_colours_and_view(figures):
    one, other = pictures.surfaces(landscape()).axes
    for get in ("get_zlim", "get_xlim", "get_ylim", "get_zlabel"):
        assert getattr(one, get)() == getattr(other, get)()
    assert (one.elev, one.azim) == (other.elev, other.azim)
    assert one.collections[0].get_clim() == other.collections[0].get_clim()
    assert one.get_zlim() == pytest.approx((math.log10(0.01), math.log10(30.01)))


def test_the_line_names_its_ends(figures):
    loss, error = pictures.line(landscape()).axes
    assert [text.get_text() for text in loss.get_xticklabels()] == ["sgd", "halfway", "sam"]
    assert loss.lines[0].get_ydata().tolist() == landscape().line.tolist()
    assert error.lines[0].get_ydata().tolist() == (100 * landscape().errors).tolist()


# The page


class Tags(html.parser.HTMLParser):
    """Collects what a page would load, and its text outside of scripts."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.words, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open += [] if tag == "meta" else [tag]
        self.loads += [value for name, value in attrs if name in ("src", "href", "data", "srcset")]

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)


def test_the_page_is_whole_in_itself():
    """It loads nothing, knows no folder of this machine, and says what it shows."""
    text = pictures.page(landscape(title="digits <40 %> & more")).decode()
    tags = Tags(text)
    assert tags.loads == []
    assert "digits <40 %> & more" in "".join(tags.words)
    assert "a caption; two random directions" in "".join(tags.words)
    assert "Plotly.newPlot" in text
    assert sys.prefix not in text
    assert pictures.page(landscape()) == pictures.page(landscape())


def test_the_page_has_one_scale():
    """Both surfaces take colours and heights from one place, and the numbers shown are those evaluated."""
    text = pictures.page(landscape()).decode()
    call = text[text.rindex("Plotly.newPlot(") :]
    traces, end = json.JSONDecoder().raw_decode(call, call.index("["))
    layout, _ = json.JSONDecoder().raw_decode(call, call.index("{", end))
    kinds = [trace["type"] for trace in traces]
    assert kinds == ["surface", "scatter3d"] * 2
    ends = pytest.approx([math.log10(0.01), math.log10(30.01)])
    for k, scene in enumerate(("scene", "scene2")):
        surface = traces[2 * k]
        assert (surface["coloraxis"], surface["scene"]) == ("coloraxis", scene)
        assert layout[scene]["zaxis"]["range"] == ends
        assert layout[scene]["camera"] == layout["scene"]["camera"]
        assert surface["customdata"] == landscape().losses[k].tolist()
        assert surface["z"] == landscape().losses[k].log10().tolist()
    assert [layout["coloraxis"]["cmin"], layout["coloraxis"]["cmax"]] == ends


def test_files_are_written_whole(tmp_path):
    paths = pictures.write(tmp_path / "new", landscape())
    names = ["landscape-contours.png", "landscape-surfaces.png", "landscape-line.png", "landscape.html"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(names)
    assert str(tmp_path).encode() not in paths[-1].read_bytes()


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match="must be a folder that can be written to"):
        pictures.write(tmp_path / "file", landscape())
