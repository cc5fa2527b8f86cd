import sys

import numpy as np
import pytest

from experiments.records.checkpoints import read_best
from experiments.reporting import pictures
from experiments.reporting.statistics_figure import draw_statistics, find_statistics
from experiments.runtime import files
from experiments.runtime.errors import UserError
from scripts import plot_statistics
from tests.scripts.made_up import ODD

PNG = b"\x89PNG"


@pytest.fixture
def draw(monkeypatch, call_main):
    """Runs the command in this process; returns the figure and the output."""
    figures = []
    save = pictures.save

    def kept(figure, picture):
        figures.append(figure)
        save(figure, picture)

    def draw(folder, **given):
        given = {"output": None, "layer": None, "units": 30, "steps": None} | given
        monkeypatch.setattr(pictures, "save", kept)
        output = call_main(plot_statistics, workdir=str(folder), **given).out
        return figures[-1], output

    return draw


def lines(axes):
    """The plotted values `[steps, lines]`; x is the time step."""
    for line in axes.get_lines():
        np.testing.assert_array_equal(line.get_xdata(), np.arange(len(line.get_ydata())))
    return np.stack([line.get_ydata() for line in axes.get_lines()], axis=1)


def panels(figure):
    """The plotted values by the name of the statistic."""
    names = ("recurrent_mean", "cell_mean", "recurrent_var", "cell_var")
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["mean", "mean", "variance", "variance"]
    titles = [axes.get_title() for axes in figure.axes]
    assert "recurrent" in titles[0] and "cell" in titles[1]
    return dict(zip(names, map(lines, figure.axes), strict=True))


def test_figure_shows_the_statistics_of_random_units():
    rng = np.random.default_rng(0)
    sizes = {"recurrent": 12, "cell": 3}
    statistics = {
        f"{term}_{moment}": rng.uniform(1, 2, (7, size))
        for term, size in sizes.items()
        for moment in ("mean", "var")
    }
    shown = panels(draw_statistics(statistics, 5, 6, "title"))
    for term, size in sizes.items():
        mean = statistics[f"{term}_mean"]
        units = [int(np.flatnonzero(mean[0] == y)[0]) for y in shown[f"{term}_mean"][0]]
        assert len(units) == len(set(units)) == min(5, size)
        assert units != list(range(5))  # they are drawn at random
        for moment in ("mean", "var"):  # both show the same units
            name = f"{term}_{moment}"
            np.testing.assert_array_equal(shown[name], statistics[name][:6, units])
    again = panels(draw_statistics(statistics, 5, 6, "title"))
    np.testing.assert_array_equal(again["recurrent_mean"], shown["recurrent_mean"])


def test_command_draws_population_statistics_or_running_averages(finished, draw, tmp_path):
    figure, output = draw(finished)
    picture = finished / "population_statistics.png"
    assert output == f"Population statistics, re-estimated, of update 3: {picture}\n"
    assert picture.read_bytes().startswith(PNG)
    for word in ("letters.txt", "BN-LSTM, update 3", "population statistics, re-estimated"):
        assert word in figure.get_suptitle()
    with np.load(finished / "population_statistics.npz") as file:
        for name, values in panels(figure).items():
            saved = file[f"layer/{name}"]
            assert values.shape == (9, min(30, saved.shape[1]))
            assert set(values[-1]) <= set(saved[-1])

    # Before the run is finished, there are running averages.
    (finished / "population_statistics.npz").unlink()
    figure, output = draw(finished, output=str(tmp_path / "other.png"), steps=4, units=2)
    assert "population statistics, running average" in figure.get_suptitle()
    assert output.startswith("Population statistics, running average, of update 3")
    assert (tmp_path / "other.png").read_bytes().startswith(PNG)
    _, variables, _ = read_best(finished)
    for name, values in panels(figure).items():
        assert values.shape == (4, 2)
        assert set(values[-1]) <= set(np.asarray(variables["batch_stats"]["layer"][name])[3])


def test_dollar_signs_in_names_are_not_rendered_as_math(finished, draw, tmp_path):
    record = files.read_json(finished / "run.json") | {"dataset": r"$\no formula$"}
    files.write_json(finished / "run.json", record)
    figure, output = draw(finished.rename(tmp_path / ODD))
    assert figure.get_suptitle().startswith(r"$\no formula$, BN-LSTM, update 3")
    assert output.endswith(f"{tmp_path / ODD}/population_statistics.png\n")


def test_shared_statistics_are_not_drawn():
    assert find_statistics({"layer": {"recurrent_mean": np.ones(4)}}) == {}


def test_layers_are_found_by_their_statistics():
    row = np.ones((3, 2))
    layer = {"recurrent_mean": row, "recurrent_var": row, "input_mean": row, "input_var": row}
    tree = {"decoder": {"rnn": layer}, "encoder": {"rnn": layer, "norm": {"mean": row}}}
    layers = find_statistics(tree)
    assert set(layers) == {"decoder/rnn", "encoder/rnn"}
    assert set(layers["decoder/rnn"]) == {"recurrent_mean", "recurrent_var"}
    figure = draw_statistics(layers["decoder/rnn"], 30, None, "")
    assert [lines(axes).shape for axes in figure.axes] == [(3, 2), (3, 2)]


def test_layer_flag_selects_a_layer(finished, draw, monkeypatch):
    names = [f"{term}_{moment}" for term in ("recurrent", "cell") for moment in ("mean", "var")]
    layers = {
        layer: {name: np.full((3, 2), value) for name in names}
        for layer, value in (("backward", 1.0), ("forward", 2.0))
    }
    best = 3, {"batch_stats": layers}, "running"
    monkeypatch.setattr(plot_statistics, "read_best", lambda _: best)
    for layer, name, value in ((None, "backward", 1), ("forward", "forward", 2)):
        figure, _ = draw(finished, layer=layer)
        assert f"{name} of 2 layers" in figure.get_suptitle()
        assert all(np.all(values == value) for values in panels(figure).values())
    with pytest.raises(UserError, match="--layer=ward: the model has backward, forward"):
        draw(finished, layer="ward")


def test_model_without_statistics_raises(runs, draw, tmp_path):
    with pytest.raises(UserError, match="has no statistics by time step to draw: its model, LSTM"):
        draw(runs / "lstm", output=str(tmp_path / "picture.png"))
    assert not list(tmp_path.iterdir())


def test_unsupported_picture_format_raises(runs, draw, tmp_path):
    with pytest.raises(UserError, match=r"picture\.doc cannot be written: .*not supported"):
        draw(runs / "bn_lstm", output=str(tmp_path / "picture.doc"))
    assert not list(tmp_path.iterdir())


def test_missing_output_folder_raises(runs, draw, tmp_path):
    picture = tmp_path / "none" / "picture.png"
    with pytest.raises(FileNotFoundError) as caught:  # `cli.run` makes it one line
        draw(runs / "bn_lstm", output=str(picture))
    assert caught.value.filename == str(picture)


def test_missing_matplotlib_raises(finished, draw, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="matplotlib is not installed: pip install matplotlib"):
        draw(finished)
    assert not (finished / "population_statistics.png").exists()
