"""Trains or evaluates the models of a config.

    python -m experiments.main --config=configs/pmnist.py --workdir=runs/pmnist
    python -m experiments.main --mode=evaluate --workdir=runs/pmnist

Any field of the config can be set: --config.model.kind=lstm --config.batch_size=50. The shared
fields are explained in experiments/config.py, the others in the module of the config's task (in
experiments/tasks) and in experiments/models/layers.py.
"""

import contextlib
import difflib
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import config, train
from experiments.records import workdir
from experiments.reporting import compare
from experiments.runtime import cli, memory, paths, processes
from experiments.runtime.errors import UserError, report, unknown_name
from experiments.runtime.progress import Output

DEFAULT_CONFIG = "configs/digits.py"


def define_flags() -> None:
    """Defines the flags of a run, except for `--config`: see `parse_flags`."""
    paths.DEFINE_path(
        "workdir", None, "Folder of the run; by default runs/ and the name of the config file."
    )
    flags.DEFINE_enum(
        "mode",
        "train",
        ["train", "evaluate"],
        "Train and evaluate, or evaluate the best checkpoint.",
    )
    flags.DEFINE_boolean(
        "profile",
        False,
        "Trace all updates with JAX's profiler into WORKDIR/profile; limit config.num_updates.",
    )
    flags.DEFINE_boolean(
        "distributed", False, "Join the other processes of a TPU pod, a SLURM or an Open MPI job."
    )
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0, to join processes started by hand."
    )
    flags.DEFINE_integer("num_processes", None, "Number of processes in the job.")
    flags.DEFINE_integer("process_id", None, "Index of this process in the job, from 0.")
    flags.DEFINE_integer(
        "peer_timeout",
        60,
        "Seconds to wait for other processes at the start. A process that is silent for longer "
        "ends the job.",
        lower_bound=2,
    )


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line, and defines the flags of the config's fields.

    The config comes from `--config`. Without it, evaluation with `--workdir` uses the run's config,
    and everything else `DEFAULT_CONFIG`.

    Raises:
      UserError: the config file does not exist, or lacks the given variant or field, or there is
        an argument that is no flag.
    """
    # These flags select the config, whose fields are flags too. ml_collections defines the field
    # flags only once, so it gets a single --config, as the flag's default.
    early = flags.FlagValues()
    for name in ("config", "workdir"):
        paths.DEFINE_path(name, None, "", flag_values=early)
    flags.DEFINE_string("mode", None, "", flag_values=early)
    early.set_gnu_getopt()
    others = early(argv, known_only=True)
    given = [early[name].serialize() for name in ("workdir", "mode") if early[name].present]
    argv = [others[0], *given, *others[1:]]

    if early.config is None and early.workdir is not None and early.mode == "evaluate":
        define, source = config_flags.DEFINE_config_dict, workdir.read_config(Path(early.workdir))
    else:
        define, source = config_flags.DEFINE_config_file, early.config or DEFAULT_CONFIG
        if not Path(source.partition(":")[0]).is_file():
            configs = map(str, Path("configs").glob("*.py"))
            raise UserError(unknown_name("--config", source, configs))
    try:
        config = define("config", source, "", flag_values=flags.FlagValues(), sys_argv=[]).default
    except flags.Error as error:  # its message holds a traceback
        raise UserError(f"--config={source}: {str(error).strip().splitlines()[-1]}") from error
    except SyntaxError as error:
        raise UserError(f"--config={source} is not valid Python: {error}") from error
    check_field_flags(argv, config)
    define("config", source, "Config file; --config.FIELD=VALUE sets its fields.", sys_argv=argv)
    flags.FLAGS["config"].present = early["config"].present
    return cli.flags_alone(argv)


def check_field_flags(argv: Sequence[str], config: ConfigDict) -> None:
    """Refuses `--config.FIELD` flags for fields that the config lacks, and for `task`.

    Raises:
      UserError: names the field, and the nearest one that the config has.
    """
    known = [f"config.{name}" for name in workdir.flat(config)]
    for word in argv:
        name = word.partition("=")[0].lstrip("-")
        if name == "config.task":
            raise UserError(f"{name} cannot be set by a flag: use a config file of that task")
        if name.startswith("config.") and name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise UserError(f"{name}: the config has no such field{hint}")


def default_workdir() -> str:
    """`runs/NAME`, for a config file `NAME.py`."""
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    return f"runs/{Path(file.partition(':')[0]).stem}"


def cache_programs() -> None:
    """Makes JAX cache compiled programs on disk, except on CPUs.

    Programs for CPUs compile in seconds, and on many machines XLA refuses to load them again:
    https://github.com/openxla/xla/issues/44565. JAX_COMPILATION_CACHE_DIR sets the folder; the
    default is in the user's cache.
    """
    if jax.default_backend() == "cpu" or jax.config.jax_compilation_cache_dir is not None:
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(caches / "bnlstm_jax"))


def job() -> contextlib.AbstractContextManager:
    """A context that joins the job of several processes, if flags ask for one."""
    given = flags.FLAGS
    explicit = given.coordinator_address, given.num_processes, given.process_id
    if not given.distributed and explicit == (None, None, None):
        return contextlib.nullcontext()
    return processes.joined(*explicit, given.peer_timeout)


def main(_: list[str]) -> None:
    """Runs every kind of model that the config names, in one process or many."""
    given = flags.FLAGS
    if given.profile and given.mode == "evaluate":
        raise UserError("--profile traces updates, and --mode=evaluate makes none: remove one flag")
    memory.keep_freed()
    base = given.config
    config.check(base)
    # A run goes on if its output is closed or its log's disk is full.
    with contextlib.redirect_stdout(Output(sys.stdout)), job():
        fields = json.loads(base.to_json_best_effort())
        versions = {"jax": jax.__version__, "numpy": np.__version__}
        processes.check_same({"--mode": given.mode, "config": fields, "versions": versions}, "")
        run_all(base)


def run_all(base: ConfigDict) -> None:
    """Trains or evaluates all kinds of model, and prints their results.

    Raises:
      SystemExit: the run of a kind failed. Each failure is reported at once, and again after the
        results of other kinds.
    """
    given = flags.FLAGS
    folder = Path(given.workdir or default_workdir())
    runs = workdir.of_kinds(base, folder)
    check, run_one = workdir.check, functools.partial(train.train, profile=given.profile)
    if given.mode == "evaluate":
        check, run_one = workdir.check_exists, train.evaluate_run
    for run in runs.values():
        processes.on_first(functools.partial(check, *run))
    cache_programs()
    results, failures = [], []
    for number, run in enumerate(runs.values(), 1):
        try:
            results.append(run_one(*run, more=number < len(runs)))
        except processes.RunFailed as failure:  # on all processes; the other kinds go on
            report(failure)
            failures.append(failure)
    if results and processes.is_first():
        show(results, runs, folder)
        for failure in failures:
            report(failure)
    if failures:
        sys.exit(2)


def show(
    results: list[dict[str, Any]], runs: dict[str, tuple[ConfigDict, Path]], folder: Path
) -> None:
    """Prints the results of kinds of model, and draws the learning curves of all `runs`."""
    print(f"\n{compare.results_table(results)}\n")
    picture = folder / compare.PICTURE_NAME
    folders = {kind: run for kind, (_, run) in runs.items()}
    first = results[0]
    if compare.draw_curves(folders, first["data"], first["shown"][0], picture):
        print(f"Curves: {picture}")
    print(f"TensorBoard (pip install tensorboard): tensorboard --logdir={folder}")


if __name__ == "__main__":
    cli.run(main, define_flags, parse_flags)
