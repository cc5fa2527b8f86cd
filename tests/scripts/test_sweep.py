import contextlib
import csv
import functools
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from configs import digits
from experiments.launching import runner, sweep_table
from experiments.launching.launchers import Slurm
from experiments.launching.sweeps import make_points
from experiments.runtime import files
from experiments.runtime.errors import Stopped, UserError
from scripts import sweep
from tests.scripts.locks import is_held
from tests.scripts.made_up import ODD
from tests.test_trust import Outline

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "scripts.sweep", "--config=configs/digits.py"]
QUICK = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
SMALL = (
    "--config.model.kind=lstm",
    "--config.model.features=5",
    "--config.num_updates=4",
    "--config.eval_every=2",
    "--config.log_every=1",
    "--config.checkpoint_every=2",
)
# The last one fails as soon as it looks for its data.
POINTS = """
from experiments.launching.sweeps import (product, values)

def get_sweep():
    good = product(values("optimizer.learning_rate", 0.01, 0.001), values("seed", 1, 2))
    return [*good[:3], {**good[3], "dataset": "digitz"}]
"""
NAMES = [
    "learning_rate=0.01,seed=1",
    "learning_rate=0.01,seed=2",
    "learning_rate=0.001,seed=1",
    "learning_rate=0.001,seed=2,dataset=digitz",
]
GOOD, BAD = NAMES[:3], NAMES[3]
NO_DATA = "'digitz', which is unknown: did you mean digits?"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from experiments import datasets

    folder = tmp_path_factory.mktemp("data")
    datasets.load("digits", str(folder))
    return folder


@pytest.fixture(scope="module")
def command(tmp_path_factory, data):
    """A sweep of four small runs, one of which fails; --workdir and more are to be added."""
    file = tmp_path_factory.mktemp("sweep") / "four.py"
    file.write_text(POINTS)
    return [*COMMAND, f"--sweep={file}", f"--config.data_dir={data}", *SMALL]


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """The sweep's folder, and what it printed: two points at once, and never stopped."""
    folder = tmp_path_factory.mktemp("undisturbed") / "sweep"
    return folder, run(command, f"--workdir={folder}", "--jobs=2")


def run(command, *arguments, **environment):
    return subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=os.environ | QUICK | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def start():
    """Starts a sweep as a shell does, in a group of processes of its own."""
    started = []

    def start(command, *arguments, output, **environment):
        with output.open("w") as file:
            started.append(
                subprocess.Popen(
                    [*command, *arguments],
                    cwd=ROOT,
                    env=os.environ | QUICK | environment,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            )
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def starts(folder, name):
    return len(json.loads((folder / name / "run.json").read_text())["starts"])


def executable(path, text):
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


# ---- Dry runs, and what is refused.


def expected(command, folder, name, *fields):
    """The command of a point, with the fields of the sweep's command before its own."""
    shared = [word for word in command if re.match(r"--config\.", word)]
    return shlex.join(
        [
            *(sys.executable, "-m", "experiments.main", "--config=configs/digits.py"),
            f"--workdir={folder / name}",
            *shared,
            *(f"--config.{field}" for field in fields),
        ]
    )


def test_dry_run_prints_the_commands_and_writes_nothing(command, tmp_path):
    folder = tmp_path / "sweep"
    done = run(command, f"--workdir={folder}", "--dry_run")
    rates = [(0.01, 1, "digits"), (0.01, 2, "digits"), (0.001, 1, "digits"), (0.001, 2, "digitz")]
    texts = [
        f"# {name}\n"
        + expected(
            command,
            folder,
            name,
            f"optimizer.learning_rate={rate}",
            f"seed={seed}",
            f"dataset={dataset}",
        )
        + "\n\n"
        for name, (rate, seed, dataset) in zip(NAMES, rates, strict=True)
    ]
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "".join(texts))
    assert not list(tmp_path.iterdir())


SCRIPT = """#!/bin/bash

# Parameters
#SBATCH --account=vision
#SBATCH --cpus-per-task=3
#SBATCH --error={jobs}/%j_0_log.err
#SBATCH --gpus-per-node=2
#SBATCH --job-name=sweep/{name}
#SBATCH --mem=16GB
#SBATCH --nodes=1
#SBATCH --open-mode=append
#SBATCH --output={jobs}/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=60
#SBATCH --wckey=submitit

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output {jobs}/%j_%t_log.out --error {jobs}/%j_%t_log.err {python} -u -m \
submitit.core._submit {jobs}
"""


def test_dry_run_for_slurm_prints_the_scripts(command, tmp_path):
    folder = tmp_path / "sweep"
    done = run(
        command,
        f"--workdir={folder}",
        "--launcher=slurm",
        "--dry_run",
        *(
            "--partition=gpu",
            "--time=1:00:00",
            "--gpus_per_node=2",
            "--cpus_per_task=3",
            "--mem_gb=16",
        ),
        "--account=vision",
    )
    assert (done.returncode, done.stderr) == (0, "")
    parts = re.split(r"^# learning_rate=.*\n", done.stdout, flags=re.MULTILINE)[1:]
    for name, part in zip(NAMES, parts, strict=True):
        first, _, script = part.partition("\n\n")
        assert first.startswith(expected(command, folder, name))
        jobs = folder / "jobs" / name
        assert (
            script.rstrip()
            == SCRIPT.format(jobs=jobs, name=name, python=shlex.quote(sys.executable)).rstrip()
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.sed=1"], "config.sed: the config has no such field; did you mean config.seed?"),
        (["--config.seed=3"], "--config.seed is set by each point"),
        (["--mode=evaluate"], "Unknown command line flag 'mode'"),
        (["--launcher=slurm", "--time=9"], "there is no sbatch here"),
        (["--launcher=slurm"], "--time is missing: give a limit like 24:00:00"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_leave_nothing(command, tmp_path, arguments, message):
    done = run(command, f"--workdir={tmp_path / 'sweep'}", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_is_of_one_sweep(tmp_path):
    config, folder = digits.get_config(), tmp_path / "sweep"

    def described(*swept):
        return sweep.description(config, make_points(config, list(swept), folder))

    sweep.check_folder(folder, described({"seed": 1}))
    folder.mkdir()
    files.write_json(folder / sweep.SWEEP_NAME, described({"seed": 1}, {"seed": 2}))
    sweep.check_folder(folder, described({"seed": 2}, {"seed": 1}, {"seed": 3}))  # may be added
    with pytest.raises(UserError, match="holds another sweep, which has a point seed=2"):
        sweep.check_folder(folder, described({"seed": 1}))
    config.data_dir, config.num_updates = "elsewhere", 700  # as runs may change
    sweep.check_folder(folder, described({"seed": 1}, {"seed": 2}))
    config.batch_size = 9
    with pytest.raises(UserError, match="batch_size is 64, here it is 9"):
        sweep.check_folder(folder, described({"seed": 1}, {"seed": 2}))
    (folder / "config.json").touch()
    with pytest.raises(UserError, match="is the folder of a run"):
        sweep.check_folder(folder, described({"seed": 1}))
    with pytest.raises(UserError, match="is not a folder"):
        sweep.check_folder(folder / "config.json", described({"seed": 1}))


# ---- What is started when, with a launcher made up.


class Fake:
    """Every point takes so many looks, and fails so many times first."""

    interval = 0.0

    def __init__(self, most, fails=(), before=()):
        self.most, self.fails = most, Counter(fails)
        self.looks = dict.fromkeys(before, 2)
        self.started, self.at_once, self.points = [], 0, {}

    def start(self, point, command):
        self.started.append(point)
        self.looks[point] = 3
        self.at_once = max(self.at_once, sum(left > 0 for left in self.looks.values()))

    def running(self, point):
        self.looks[point] = self.looks.get(point, 0) - 1
        if self.looks[point] == 0:
            if self.fails[point] > 0:
                self.fails[point] -= 1
            else:
                write_results(self.points[point], 0.5)
        return self.looks[point] > 0

    def stop(self, points):
        return f"stopped {', '.join(points)}"

    def error(self, point):
        return "error: made up"

    def log(self, point):
        return f"{point}.log"


def write_results(point, value, kind="lstm", lower_is_better=False):
    """A finished run."""
    statistics = ["none"] if kind == "lstm" else ["batch", "running", "population"]
    run = point.runs[kind]
    run.mkdir(parents=True, exist_ok=True)
    results = {
        "kind": kind,
        "update": 3,
        "updates": point.config.num_updates,
        "selection": "accuracy",
        "shown": ["accuracy"],
        "rows": [
            {"split": split, "statistics": name, "accuracy": value + shift + 0.1 * number}
            for number, name in enumerate(statistics)
            for split, shift in (("valid", 0), ("test", -0.25))
        ],
    }
    files.write_json(run / "results.json", results)
    files.write_json(run / "run.json", {"lower_is_better": lower_is_better})


def made_up(folder, swept, kind="lstm"):
    config = digits.get_config()
    config.model.kind = kind
    return make_points(config, swept, folder)


def table_of(points, folder):
    return functools.partial(sweep_table.write, points, folder=folder)


@pytest.mark.parametrize("most", [1, 2])
def test_points_are_run_so_many_at_once_and_tried_again(tmp_path, capsys, most):
    points = made_up(tmp_path, [{"seed": seed} for seed in range(6)])
    names = [point.name for point in points]
    write_results(points[1], 0.5)
    launcher = Fake(most, fails={"seed=2": 1, "seed=3": 5}, before=["seed=4"])
    launcher.points = {point.name: point for point in points}
    own = runner.Sweep(
        points, {name: [] for name in names}, launcher, 1, table_of(points, tmp_path)
    )
    own.run()
    assert launcher.at_once == most
    # 1 was finished, 4 was running: neither is started. 2 and 3 fail, and come again at the end.
    assert Counter(launcher.started) == {"seed=0": 1, "seed=2": 2, "seed=3": 2, "seed=5": 1}
    assert own.errors == {"seed=3": "error: made up (seed=3.log)"}
    with (tmp_path / "results.csv").open() as file:
        statuses = {row["seed"]: row["status"] for row in csv.DictReader(file)}
    assert statuses == {str(seed): "failed" if seed == 3 else "finished" for seed in range(6)}
    said = capsys.readouterr().out
    assert "6 points, 1 of them finished already" in said
    assert "still running from before: seed=4" in said
    assert "seed=2: failed, and is tried again: error: made up" in said


def test_a_signal_stops_points_and_starts_no_more(tmp_path, capsys):
    points = made_up(tmp_path, [{"seed": 1}, {"seed": 2}])
    launcher = Fake(2)
    launcher.points = {point.name: point for point in points}
    own = runner.Sweep(
        points, {point.name: [] for point in points}, launcher, 1, table_of(points, tmp_path)
    )
    launcher.start = lambda point, command: (
        Fake.start(launcher, point, command),
        os.kill(os.getpid(), signal.SIGTERM),
    )
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped: stopped seed=1; the same command") as caught:
        own.run()
    assert caught.value.status == 143 and launcher.started == ["seed=1"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_progress_is_logged(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner.progress, "SECONDS_LOGGED", -1)
    (point,) = points = made_up(tmp_path, [{"seed": 1}])
    board = runner.Board(points)
    point.folder.mkdir()
    rows = [json.dumps({"update": update, "loss": 1.0}) for update in range(0, 300, 20)]
    (point.folder / "metrics.jsonl").write_text("\n".join(rows) + '\n{"update": 3')
    board.look(point)
    board.show(points, 1, 0, 0)
    told = "0 of 1 points finished, 1 running, 0 failed, 280 of 600 updates, "
    assert told in capsys.readouterr().out


# ---- Tables.


def test_table_over_seeds(tmp_path):
    swept = [{"model.initial_scale": g, "seed": s} for g in (0.1, 0.3, 0.5) for s in (1, 2)]
    points = made_up(tmp_path, swept, "bn_lstm")
    for point, value in zip(points, (0.5, 0.6, 0.7, None, None, None), strict=True):
        if value is not None:
            write_results(point, value, "bn_lstm")
    statuses = {"initial_scale=0.3,seed=2": "failed"}
    text = sweep_table.write(points, statuses, {"initial_scale=0.3,seed=2": "error: x"}, tmp_path)
    assert (tmp_path / "results.md").read_text() == text
    table, _, rest = text.partition("\n\n")
    assert table == (
        "| model   | model.initial_scale | seeds  | valid accuracy  | test accuracy   |\n"
        "|---------|---------------------|--------|-----------------|-----------------|\n"
        "| BN-LSTM | 0.3                 | 1 of 2 | 0.7000          | 0.6500          |\n"
        "| BN-LSTM | 0.1                 | 2 of 2 | 0.5500 ± 0.0707 | 0.5000 ± 0.0707 |\n"
        "| BN-LSTM | 0.5                 | 0 of 2 | -               | -               |"
    )
    assert "Runs: 6, of which 3 finished, 1 failed, 2 waiting." in rest
    assert "sample standard deviation" in rest and "batch statistics" in rest
    assert rest.endswith("\n- `initial_scale=0.3,seed=2` failed: error: x\n")

    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished"] * 3 + ["failed"] + ["waiting"] * 2
    assert rows[0] == {
        "model.initial_scale": "0.1",
        "seed": "1",
        "kind": "bn_lstm",
        "status": "finished",
        "selection": "accuracy",
        "validation": "0.5",
        "update": "3",
        "valid/batch/accuracy": "0.5",
        "test/batch/accuracy": "0.25",
        "valid/running/accuracy": "0.6",
        "test/running/accuracy": "0.35",
        "valid/population/accuracy": "0.7",
        "test/population/accuracy": "0.45",
        "workdir": "initial_scale=0.1,seed=1",
    }
    assert rows[4]["validation"] == "" and rows[4]["workdir"] == "initial_scale=0.5,seed=1"


def test_odd_values_read_as_they_are(tmp_path):
    """Of a field in the table and in the CSV file, and in an error."""
    points = made_up(tmp_path, [{"data_dir": ODD}, {"data_dir": "b"}])
    text = sweep_table.write(points, {}, {points[0].name: f"error: {ODD}"}, tmp_path)
    shown = Outline(MarkdownIt("commonmark", {"html": False}).enable("table").render(text))
    assert "".join(shown.text).count(ODD) == 2
    assert shown.elements.count(("td", ())) == 8  # two rows of model, field, seeds and validation
    with (tmp_path / "results.csv").open() as file:
        assert [row["data_dir"] for row in csv.DictReader(file)] == [ODD, "b"]


@pytest.mark.parametrize("lower_is_better, order", [(False, ["1", "0"]), (True, ["0", "1"])])
def test_the_best_is_first(tmp_path, lower_is_better, order):
    points = made_up(tmp_path, [{"batch_size": 10}, {"batch_size": 20}])
    for value, point in enumerate(points):
        write_results(point, value, lower_is_better=lower_is_better)
    lines = sweep_table.write(points, {}, {}, tmp_path).splitlines()[2:4]
    assert [line.split("|")[4].strip()[0] for line in lines] == order


def test_kinds_have_rows_of_their_own(tmp_path):
    (point,) = points = made_up(tmp_path, [{"batch_size": 10}], "lstm,bn_lstm")
    write_results(point, 0.25, "lstm")
    rows = sweep_table.rows(points, {point.name: "running"}, tmp_path)
    assert [(row["kind"], row["status"]) for row in rows] == [
        ("lstm", "finished"),
        ("bn_lstm", "running"),
    ]
    write_results(point, 0.5, "bn_lstm")
    # The LSTM's test and the BN-LSTM's with population statistics are in one column.
    lines = sweep_table.write(points, {}, {}, tmp_path).splitlines()
    assert lines[2].startswith("| BN-LSTM | 10         | 1 of 1 | 0.5000         | 0.4500 ")
    assert lines[3].startswith("| LSTM    | 10         | 1 of 1 | 0.2500         | 0.0000 ")


# ---- Real sweeps.


def test_a_real_sweep(undisturbed, command):
    folder, done = undisturbed
    log = r"\S+/jobs/" + re.escape(BAD) + r"/\d+_0_log\.err"
    failure = rf"{re.escape(BAD)}: failed{{}}: error: .*{re.escape(NO_DATA)}.* \({log}\)"
    assert re.search(failure.format(", and is tried again"), done.stdout), done.stdout + done.stderr
    assert re.search(failure.format(""), done.stdout)
    assert (done.returncode, done.stderr) == (1, "error: 1 of 4 points failed\n")
    assert "Runs: 4, of which 3 finished, 1 failed." in done.stdout
    assert (folder / "results.md").read_text() in done.stdout
    jobs = json.loads((folder / "jobs.json").read_text())["local"]
    assert {name: len(ids) for name, ids in jobs.items()} == dict.fromkeys(GOOD, 1) | {BAD: 2}
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["workdir"] for row in rows] == NAMES
    for row in rows[:3]:
        results = json.loads((folder / row["workdir"] / "results.json").read_text())
        assert row["validation"] == str(results["rows"][0]["accuracy"])
        assert row["test/none/loss"] == str(results["rows"][1]["loss"])
        assert row["seed"] == row["workdir"][-1] and row["update"] in ("2", "4")


def test_a_sweep_that_is_killed_goes_on(undisturbed, command, start, tmp_path):
    folder, output, file = tmp_path / "sweep", tmp_path / "output", tmp_path / "three.py"
    file.write_text(POINTS.replace("good[:3]", "good[:2]"))
    given = [*command, f"--sweep={file}", f"--workdir={folder}", "--retries=0"]
    first = start(given, output=output)
    second_lock = folder / "jobs" / GOOD[1] / "lock"
    wait_for(lambda: (is_held(second_lock) and second_lock.read_text()) or first.poll() is not None)
    point = int(second_lock.read_text())
    os.kill(point, signal.SIGSTOP)  # so that it runs for as long as this test wants
    first.kill()
    first.wait()
    assert is_held(second_lock)  # the point outlives the sweep
    before = output.read_text()
    assert f"{GOOD[0]}: finished" in before and GOOD[1] not in before

    second = start(given, output=output)
    wait_for(lambda: "still running" in output.read_text() or second.poll() is not None)
    os.kill(point, signal.SIGCONT)
    assert second.wait(120) == 1
    done = output.read_text()
    assert "3 points, 1 of them finished already" in done
    assert f"still running from before: {GOOD[1]}\n" in done
    assert [starts(folder, name) for name in GOOD[:2]] == [1, 1]
    lines, others = ((f / "results.csv").read_text().splitlines() for f in (folder, undisturbed[0]))
    assert lines == [others[0], others[1], others[2], others[4]]
    first_row, other_row = (
        (f / "results.md").read_text().splitlines()[2] for f in (folder, undisturbed[0])
    )
    assert "| 2 of 2 |" in first_row and first_row == other_row


def test_ctrl_c_stops_the_points_that_run(command, start, tmp_path):
    folder, output = tmp_path / "sweep", tmp_path / "output"
    endless = [*command, "--config.num_updates=1000000"]
    started = start(endless, f"--workdir={folder}", output=output)
    wait_for(lambda: (folder / GOOD[0] / "metrics.jsonl").exists() or started.poll() is not None)
    lock = folder / "jobs" / GOOD[0] / "lock"
    assert is_held(lock)
    other = run(endless, f"--workdir={folder}")
    assert other.returncode == 2 and f"--workdir={folder} is in use" in other.stderr
    # To the whole group, as a terminal does.
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(30) == 130
    assert not is_held(lock)
    with pytest.raises(ProcessLookupError):
        os.killpg(started.pid, 0)
    said = output.read_text()
    assert "the same command goes on" in said and "Traceback" not in said
    with (folder / "results.csv").open() as file:
        assert {row["status"] for row in csv.DictReader(file)} == {"waiting"}


# ---- SLURM, made up.


@pytest.fixture
def cluster(tmp_path):
    """A folder with SLURM's commands; jobs wait until `go` is there."""
    folder = tmp_path / "bin"
    (folder / "queue").mkdir(parents=True)
    executable(
        folder / "sbatch",
        f"""cd {folder}
        if [ -e refuse ]; then echo "sbatch: error: invalid partition" >&2; exit 1; fi
        id=$((101 + $(ls scripts* | wc -l)))
        cp $1 scripts.$id; touch queue/$id
        ( while [ ! -e go ]; do sleep 0.1; done
          cd {shlex.quote(str(ROOT))}; SLURM_JOB_ID=$id SLURM_NTASKS=1 bash {folder}/scripts.$id
          rm -f {folder}/queue/$id ) < /dev/null > {folder}/said.$id 2>&1 &
        echo "Submitted batch job $id"
        """,
    )
    executable(
        folder / "squeue",
        f"""if [ -e {folder}/down ]; then echo Unable to contact >&2; exit 1; fi
        ls {folder}/queue
        """,
    )
    executable(
        folder / "srun",
        """out=${3//%j/$SLURM_JOB_ID} err=${5//%j/$SLURM_JOB_ID}; shift 5
        exec "$@" >> ${out//%t/0} 2>> ${err//%t/0}
        """,
    )
    yield folder
    (folder / "go").touch()  # nothing is left to wait for it


def test_jobs_of_a_cluster_are_found_again(cluster, command, start, tmp_path):
    folder, output = tmp_path / "sweep", tmp_path / "output"
    file = tmp_path / "two.py"
    file.write_text(POINTS.replace("*good[:3]", "good[0]"))
    given = [*command, f"--sweep={file}", f"--workdir={folder}", "--launcher=slurm", "--poll=0.5"]
    given += ["--retries=0", "--time=9"]
    path = {"PATH": f"{cluster}:{os.environ['PATH']}"}
    started = start(given, output=output, **path)
    jobs = {name: [str(101 + number)] for number, name in enumerate([GOOD[0], BAD])}
    written = folder / "jobs.json"
    wait_for(lambda: written.exists() and json.loads(written.read_text())["slurm"] == jobs)
    started.kill()
    started.wait()
    assert len(list((cluster / "queue").iterdir())) == 2

    started = start(given, output=output, **path)
    wait_for(lambda: f"still running from before: {GOOD[0]}, {BAD}\n" in output.read_text())
    (cluster / "go").touch()
    assert started.wait(60) == 1
    done = output.read_text()
    assert json.loads(written.read_text()) == {"slurm": jobs}
    assert "Runs: 2, of which 1 finished, 1 failed" in done
    assert re.search(rf"{re.escape(BAD)}: failed: error: .*{re.escape(NO_DATA)}", done)
    assert f"/jobs/{BAD}/102_0_log.err)" in done
    assert starts(folder, GOOD[0]) == 1


def test_what_a_cluster_is_asked(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{cluster}:{os.environ['PATH']}")
    launcher = Slurm(tmp_path, {"time": 5}, max_timeouts=3, poll=0.01)
    launcher.check()
    assert not launcher.running("a")
    (cluster / "refuse").touch()
    with pytest.raises(UserError, match="sbatch refuses the job: sbatch: error: invalid partition"):
        launcher.start("a", ["true"])
    (cluster / "refuse").unlink()
    launcher.start("a", ["true"])
    assert (cluster / "scripts.101").read_text() == launcher.script("a")
    assert launcher.stop(["a"]) == "jobs stay in the queue: `scancel 101` stops them"

    again = Slurm(tmp_path, {"time": 5}, max_timeouts=3, poll=0.01)
    assert again.running("a") and not again.running("b")
    (cluster / "down").touch()  # nothing is concluded from a queue that does not answer
    time.sleep(0.05)
    assert again.running("a")
    with pytest.raises(UserError, match="squeue failed: Unable to contact"):
        Slurm(tmp_path, {"time": 5}, max_timeouts=3, poll=0.01).running("a")
    (cluster / "down").unlink()
    (cluster / "queue" / "101").unlink()
    wait_for(lambda: not again.running("a"))
