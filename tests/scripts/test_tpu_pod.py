"""The script for TPU pods, with a gcloud that writes down what it is asked to do."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "tpu_pod.sh"

# Stands for gcloud, tar and mkdir. The node's states, and what runs say of themselves, come one
# after the other from files; an entry `!N` fails with status N.
FAKE = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" >>"$RECORD"
printf '\\n\\0' >>"$RECORD"
answer() {
    local line
    [ -s "$1" ] || exit 0
    IFS= read -r line <"$1"
    sed -i 1d "$1"
    case $line in
        !*) exit "${line#!}" ;;
        *) printf '%b\\n' "$line" ;;
    esac
}
case "$*" in
    *" describe "*) answer "$RECORD.states" ;;
    *"on-worker status"*) answer "$RECORD.runs" ;;
    *" create "*) answer "$RECORD.creations" ;;
esac
"""

GCLOUD = "gcloud compute tpus tpu-vm"
CREATE = f"{GCLOUD} create pod --zone=z --accelerator-type=v4-32 --version=tpu-ubuntu2204-base"
DELETE = f"{GCLOUD} delete pod --zone=z --quiet"
DESCRIBE = f"{GCLOUD} describe pod --zone=z '--format=value(state)'"
WORKDIR = "--workdir=/mnt/share/run"


def on_worker(arguments: str, worker: str = "all", before: str = "") -> str:
    command = f"{before}bash bnlstm_jax/scripts/tpu_pod.sh on-worker {arguments}"
    return f"{GCLOUD} ssh pod --zone=z --worker={worker} {shlex.quote(f'--command={command}')}"


STATUS, RUN = on_worker("status"), on_worker(f"run {WORKDIR}")


def setup(home: Path, name="pod", arguments="python3.11 ''") -> list[str]:
    archive = f"{home}/.cache/bnlstm_jax-{name}.tar.gz"
    unpack = "mkdir -p bnlstm_jax && tar -xzf bnlstm_jax.tar.gz -C bnlstm_jax && "
    lines = [
        f"mkdir -p {home}/.cache",
        f"tar -czf {archive} -C {shlex.quote(str(ROOT))} "
        "--exclude=./.venv --exclude=./data --exclude=./runs .",
        f"{GCLOUD} scp {archive} pod:bnlstm_jax.tar.gz --zone=z --worker=all",
        on_worker(f"setup {arguments}", before=unpack),
    ]
    return [line.replace(" pod", f" {name}") for line in lines]


class Machine:
    """A home and a path of commands, where the script is called."""

    def __init__(self, folder: Path) -> None:
        self.home, self.record = folder / "home", folder / "record"
        commands = folder / "bin"
        for path in (self.home, commands):
            path.mkdir()
        for name in ("gcloud", "tar", "mkdir"):
            self.command(commands / name, FAKE)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "XDG_"))}
        self.environment = kept | {
            "HOME": str(self.home),
            "PATH": f"{commands}:{os.environ['PATH']}",
            "RECORD": str(self.record),
        }

    @staticmethod
    def command(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def answers(self, **lines: list[str]) -> None:
        for name, given in lines.items():
            Path(f"{self.record}.{name}").write_text("".join(f"{line}\n" for line in given))

    def call(self, *arguments: str, expect: int = 0, **environment: str):
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            env=self.environment | environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done

    def recorded(self) -> list[list[str]]:
        """The commands since the last time."""
        text = self.record.read_text() if self.record.exists() else ""
        self.record.unlink(missing_ok=True)
        return [entry.split("\0")[:-1] for entry in text.split("\n\0")[:-1]]

    def error(self, *arguments: str, **environment: str) -> str:
        error = self.call(*arguments, expect=2, **environment).stderr
        assert error.startswith("error: ") and error.count("\n") == 1
        assert self.recorded() == []
        return error


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


NODE = ("--name=pod", "--zone=z", "--type=v4-32")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["create"], [CREATE]),
        (["create", "--spot", "--project=p"], [f"{CREATE} --spot".replace("=z", "=z --project=p")]),
        (["setup"], setup),
        (["run", "--", WORKDIR], [RUN]),
        (["logs"], [on_worker("logs", "0")]),
        (["logs", "all"], [on_worker("logs", "all")]),
        (["logs", "3"], [on_worker("logs", "3")]),
        (["status"], [DESCRIBE, STATUS]),
        (
            ["resume", "--", WORKDIR],
            lambda home: [DESCRIBE, DELETE, CREATE, *setup(home), RUN],
        ),
        (
            ["watch", "--", WORKDIR],
            lambda home: [DESCRIBE, STATUS, DELETE, CREATE, *setup(home), RUN],
        ),
        (["stop"], [on_worker("stop")]),
        (["delete"], [DELETE]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_dry_run_prints_what_a_run_does(machine, arguments, expected):
    """Of a preempted node, for those that ask for its state."""
    lines = expected(machine.home) if callable(expected) else expected
    subcommand, *others = arguments
    printed = machine.call(subcommand, *NODE, "--dry-run", *others).stdout
    assert printed.splitlines() == lines
    assert machine.recorded() == []

    done = {"watch": ["READY", "PREEMPTED", "PREEMPTED", "READY"], "status": ["READY"]}
    machine.answers(
        states=done.get(subcommand, ["PREEMPTED"]),
        runs=["t1v-0: running", "t1v-0: ended with status 0"] if subcommand == "watch" else [],
    )
    machine.call(subcommand, *NODE, "--every=0", *others)
    words = machine.recorded()
    if subcommand == "watch":  # looks twice more, and finds that the run has finished
        assert words[2:4] == words[-2:-1] + words[-2:-1] == [shlex.split(DESCRIBE)] * 2
        del words[2:4], words[-2:]
    assert words == [shlex.split(line) for line in lines]


STRANGE = (
    '--config.text_file=my book\'s "first" part.txt',
    "--workdir=/mnt/a b/$HOME `x` \\ é",
    "",
)


def test_strange_arguments_reach_the_run_as_they_are(machine):
    node = ("--name=a'b", "--zone=z z", "--mount=mount \"$X\" '/mnt/a b'")
    printed = [
        shlex.split(line)
        for verb in (["setup"], ["run", "--", *STRANGE])
        for line in machine.call(verb[0], *node, "--dry-run", *verb[1:]).stdout.splitlines()
    ]
    machine.call("setup", *node)
    machine.call("run", *node, "--", *STRANGE)
    assert machine.recorded() == printed
    *_, prepare, start = (shlex.split(words[-1].removeprefix("--command=")) for words in printed)
    assert prepare[-2:] == ["python3.11", "mount \"$X\" '/mnt/a b'"]
    assert start[-4:] == ["run", *STRANGE]


def test_variables_stand_for_options(machine):
    given = {"TPU_NAME": "a", "TPU_ZONE": "b", "TPU_TYPE": "v5e-8", "TPU_SPOT": "1"}
    given |= {"TPU_VERSION": "v2-alpha-tpuv5-lite", "TPU_PROJECT": "c"}
    printed = machine.call("create", "--dry-run", "--name=other", **given).stdout
    assert printed == (
        f"{GCLOUD} create other --zone=b --project=c --accelerator-type=v5e-8 "
        "--version=v2-alpha-tpuv5-lite --spot\n"
    )


def verbs(words: list[list[str]]) -> list[str]:
    """Short names of what gcloud was asked to do."""
    asked = [line for line in words if line[0] == "gcloud"]
    return [
        line[-1].split("on-worker ")[1].split()[0] if line[4] == "ssh" else line[4]
        for line in asked
    ]


def test_watch_resumes_until_the_run_has_finished(machine):
    both = "t1v-0: ended with status {0}\\nt1v-1: ended with status {0}".format
    machine.answers(
        # Preempted with no TPU to be had at first; and gone when it is looked for again.
        states=["READY", "READY", "PREEMPTED", "PREEMPTED", "!1", "!1", "CREATING"] + ["READY"] * 6,
        creations=["!1"],
        runs=[
            "t1v-0: running\\nt1v-1: running",
            both(143),
            "!255",
            both(134),  # JAX aborts the others when a worker is lost
            "t1v-0: running\\nt1v-1: ended with status 0",
            both(0),
        ],
    )
    told = machine.call("watch", *NODE, "--every=0", "--", WORKDIR)
    look, make = ["describe", "status"], ["create", "scp", "setup", "run"]
    expected = [*look, *look, "describe", "describe", "delete", "create"]
    expected += ["describe", "describe", *make, "describe", *look, *look, "run", *look, *look]
    assert verbs(machine.recorded()) == expected
    lines = [line.partition(" pod: ")[2] for line in told.stdout.splitlines()]
    assert lines == [
        "running",
        "ended with status 143",
        "PREEMPTED: not resumed",
        "MISSING",
        "CREATING",
        "cannot be reached",
        "ended with status 134",
        "running",
        "ended with status 0",
    ]


@pytest.mark.parametrize(
    "statuses, again",
    [
        ("134 137", True),
        ("1 137", True),
        ("1 134", False),
        ("134 2", False),
        ("137", False),
        ("134 0", False),
    ],
)
def test_watch_starts_again_what_has_lost_a_worker(machine, statuses, again):
    """The lost one says 137 or the like itself. A mistake, 2, would be made again."""
    ended = "\\n".join(f"t1v-{n}: ended with status {s}" for n, s in enumerate(statuses.split()))
    after = "t1v-0: ended with status 0" if again else ended
    machine.answers(states=["READY"] * 3, runs=[ended, after])
    machine.call("watch", *NODE, "--every=0", "--", WORKDIR, expect=0 if again else 2)
    assert ("run" in verbs(machine.recorded())) == again


def test_watch_starts_a_run_where_there_is_none(machine):
    """As on a node that was repaired, or whose setting up was broken off."""
    machine.answers(
        states=["READY"] * 3, runs=["!2", "t1v-0: not started", "t1v-0: ended with status 0"]
    )
    machine.call("watch", *NODE, "--every=0", "--", WORKDIR)
    look, start = ["describe", "status"], ["scp", "setup", "run"]
    assert verbs(machine.recorded()) == [*look, *start, *look, *start, *look]


def test_watch_ends_with_a_run_that_failed(machine):
    machine.answers(states=["READY"] * 3, runs=["t1v-0: running"] + ["a: ended with status 1"] * 2)
    told = machine.call("watch", *NODE, "--every=0", "--", WORKDIR, expect=2)
    assert told.stderr == "error: the run ended with status 1: see scripts/tpu_pod.sh logs all\n"


def test_a_node_that_runs_is_not_resumed(machine):
    machine.answers(states=["READY"])
    told = machine.call("resume", *NODE, "--", WORKDIR, expect=2)
    assert told.stderr.startswith("error: pod is READY, it was not preempted: ")
    assert verbs(machine.recorded()) == ["describe"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give one of create, setup, run, logs, status, resume, watch, stop, delete"),
        (["crate", *NODE], "crate is no subcommand: give one of create, "),
        (["create", "--zone=z"], "which node? give --name=NAME or TPU_NAME"),
        (["create", "--name=pod"], "where? give --zone=ZONE or TPU_ZONE"),
        (["create", "--name=pod", "--zone=z"], "which TPU? give --type=TYPE or TPU_TYPE"),
        (["create", "--name", "pod"], "--name: no such option (they are written --name=pod; "),
        (["create", *NODE, "--", "x"], "create takes no arguments, there is x"),
        (["logs", *NODE, "al"], "al: no such option"),
        (["watch", *NODE, "--every=1m", "--", WORKDIR], "--every=1m: give a number of seconds"),
        (["run", *NODE], "which workdir? run -- --config=... --workdir=FOLDER"),
        (["run", *NODE, WORKDIR], "--workdir=/mnt/share/run: no such option"),
        (["run", *NODE, "--", "--workdir=gs://b/run"], "gs://b/run: the code writes plain files"),
        (["run", *NODE, "--", "--workdir", "runs/x"], "--workdir=runs/x: give the full path of a"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(machine, arguments, message):
    assert message in machine.error(*arguments)


def test_without_gcloud(machine, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for name in ("bash", "dirname"):
        (few / name).symlink_to(shutil.which(name))
    assert "gcloud is not installed: https://" in machine.error("delete", *NODE, PATH=str(few))
    assert machine.call("delete", *NODE, "--dry-run", PATH=str(few)).stdout == f"{DELETE}\n"


# ---- On a worker: gcloud gives the command to a shell, as SSH does.

SSH = """#!/bin/bash
for word; do
    case $word in --command=*) cd "$HOME" && exec bash -c "${word#--command=}" ;; esac
done
echo READY
"""
# Stands for Python: writes down its arguments, and leaves when it is told to.
RUNNING = """#!/bin/bash
printf '%s\\0' "$@" >"$HOME/arguments"
echo "trains"
trap 'exit 143' TERM
while true; do sleep 0.05; done
"""


@pytest.fixture
def worker(machine):
    """A machine that is its own worker, and set up."""
    copy = machine.home / "bnlstm_jax"
    for folder in (copy / "scripts", copy / ".venv" / "bin"):
        folder.mkdir(parents=True)
    shutil.copy(SCRIPT, copy / "scripts")
    machine.command(copy / ".venv" / "bin" / "python", RUNNING)
    (copy / ".venv" / "ready").touch()
    commands = machine.home.parent / "bin"
    machine.command(commands / "gcloud", SSH)
    machine.command(commands / "stat", "#!/bin/bash\necho ${FILES:-nfs}\n")
    (commands / "mkdir").unlink()
    yield machine
    if (copy / "run.pid").exists():  # of a test that failed
        subprocess.run(["kill", (copy / "run.pid").read_text().strip()], capture_output=True)


def test_a_run_on_a_worker(worker):
    def status() -> str:
        state, run = worker.call("status", *NODE).stdout.splitlines()
        assert state == "READY"
        return run.partition(": ")[2]

    assert status() == "not started"
    worker.call("run", *NODE, "--", *STRANGE)  # which returns, and the run goes on
    assert status() == "running"
    started = (worker.home / "arguments").read_text().split("\0")[:-1]
    assert started == ["-m", "experiments.main", "--distributed", *STRANGE]
    assert (
        "a run goes on: stop it first" in worker.call("run", *NODE, "--", WORKDIR, expect=2).stderr
    )
    worker.call("stop", *NODE)
    assert status() == "ended with status 143"
    worker.call("stop", *NODE)  # is no mistake
    assert (worker.home / "bnlstm_jax" / "run.log").read_text() == "trains\n"

    worker.call("run", *NODE, "--", WORKDIR)
    assert status() == "running"
    worker.call("stop", *NODE)
    assert (worker.home / "bnlstm_jax" / "run.log").read_text() == "trains\ntrains\n"


@pytest.mark.parametrize("files", ["ext2/ext3", "tmpfs"])
def test_a_workdir_on_a_workers_own_disk_is_refused(worker, files):
    error = worker.call("run", *NODE, "--", WORKDIR, expect=2, FILES=files).stderr
    assert error.startswith(f"error: {WORKDIR} lies on the disk of ") and error.count("\n") == 1
    assert not (worker.home / "arguments").exists()


def test_a_worker_that_is_not_set_up(worker):
    (worker.home / "bnlstm_jax" / ".venv" / "ready").unlink()
    error = worker.call("run", *NODE, "--", WORKDIR, expect=2).stderr
    assert error.endswith("is not set up\n") and error.count("\n") == 1
