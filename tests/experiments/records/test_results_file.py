import pytest

from configs import ptb
from experiments.records import results_file


def results_of(length, eval_batch_size, update=3):
    config = ptb.get_config()
    config.eval_batch_size = eval_batch_size
    rows = [
        {"split": "test", "statistics": statistics, "reading": f"segments of {length}", "loss": 1.0}
        for statistics in ("batch", "population")
    ]
    evaluation = results_file.evaluation_fields(config)
    return {"update": update, "updates": 4, "evaluation": evaluation, "rows": rows}


@pytest.mark.parametrize(
    "second, kept",
    [
        (results_of(200, 100), {"batch", "population"}),
        # Batch statistics depend on the batch size.
        (results_of(200, 10), {"population"}),
        (results_of(200, 100, update=4), set()),
    ],
)
def test_rows_of_the_same_evaluation_are_kept(tmp_path, second, kept):
    results_file.write(tmp_path, results_of(100, 100))
    written = results_file.write(tmp_path, second)
    assert written == results_file.read(tmp_path)
    found = {row["statistics"] for row in written["rows"] if row["reading"] == "segments of 100"}
    assert found == kept
    assert written["rows"][:2] == second["rows"]
