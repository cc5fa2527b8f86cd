import json

import numpy as np

from experiments.records import metrics
from experiments.reporting import compare, pictures


def test_curves_are_the_logged_metrics(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "save", lambda figure, _: figures.append(figure))
    runs = {}
    for kind, shift in (("lstm", 0), ("bn_lstm", 1)):
        runs[kind] = tmp_path / kind
        runs[kind].mkdir()
        rows = [
            {"update": 5, "split": "train", "loss": 2.0 + shift, "accuracy": 0.1},
            {"update": 10, "split": "train", "loss": 1.0 + shift, "accuracy": 0.2},
            {"update": 10, "split": "valid", "loss": 4.0, "accuracy": 0.3 + shift / 10},
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (runs[kind] / metrics.FILE_NAME).write_text(lines)

    assert compare.draw_curves(runs, "made-up data", "accuracy", tmp_path / "picture.png")
    training, validation = figures[0].axes
    assert training.get_ylabel() == "training loss (nats)"
    assert validation.get_ylabel() == "validation accuracy"
    expected = {
        "LSTM": ([[5, 2], [10, 1]], [[10, 0.3]]),
        "BN-LSTM": ([[5, 3], [10, 2]], [[10, 0.4]]),
    }
    for panel, axes in enumerate((training, validation)):
        drawn = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
        assert drawn.keys() == expected.keys()
        for label, curves in expected.items():
            np.testing.assert_allclose(drawn[label], curves[panel])
