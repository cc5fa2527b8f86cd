"""Trains or evaluates what a config describes.

    python -m experiments.main --config=configs/pmnist.py --workdir=runs/pmnist
    python -m experiments.main --mode=evaluate --workdir=runs/pmnist

Any field of the config can be set: --config.model.kind=lstm --config.batch_size=50
"""

import contextlib
import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import config, parallel, train
from experiments.records import workdir
from experiments.reporting import compare
from experiments.runtime import cli, memory, paths, processes
from experiments.runtime.errors import UserError, unknown_name

_WORKDIR = paths.DEFINE_path(
    "workdir", None, "Folder of the run; by default runs/ and the name of the config file."
)
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "evaluate"], "Train and evaluate, or evaluate the best checkpoint."
)
_PROFILE = flags.DEFINE_boolean(
    "profile", False, "Say where the time of updates went, without that of compilation."
)

_DISTRIBUTED = flags.DEFINE_boolean(
    "distributed", False, "Join the other processes of a TPU pod, a SLURM or an Open MPI job."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, to join processes started by hand."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of those processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this one among them, from 0.")
_PEER_TIMEOUT = flags.DEFINE_float(
    "peer_timeout",
    60,
    "Seconds to wait for other processes; one that is silent for so long ends the job.",
    lower_bound=2,
)

DEFAULT_CONFIG = "configs/digits.py"


def take(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Takes a flag from a command line that is not parsed yet.

    Returns:
      The last value given for it, None if there is none, and the words without the flag.
    """
    value, rest = None, []
    words = iter(argv)
    for word in words:
        flag, given, own = word.partition("=")
        if flag in (f"-{name}", f"--{name}"):
            value = own if given else next(words, "")
        else:
            rest.append(word)
    return value, rest


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line.

    The config is that of `--config`; without it, of the run to evaluate; else of the digits.

    Raises:
      UserError: the config file is not there, or has no such variant or field.
    """
    file, others = take(argv, "config")
    if file is not None:
        file = paths.expand("--config", file)
        if not Path(file.partition(":")[0]).is_file():
            configs = map(str, Path("configs").glob("*.py"))
            raise UserError(unknown_name("--config", file, configs))
        # ml_collections takes the file once, and before the fields.
        argv = [others[0], f"--config={file}", *others[1:]]
    described = "Config file; --config.FIELD=VALUE sets its fields."
    folder, _ = take(argv, "workdir")
    mode, _ = take(argv, "mode")
    saved = None
    try:
        if file is None and folder is not None and mode == "evaluate":
            saved = workdir.read_config(Path(paths.expand("--workdir", folder)))
            config_flags.DEFINE_config_dict("config", saved, described, sys_argv=argv)
        else:
            default = file or DEFAULT_CONFIG
            config_flags.DEFINE_config_file("config", default, described, sys_argv=argv)
        return flags.FLAGS(argv)
    except flags.Error as error:
        if "get_config() takes 0 positional arguments" in str(error):
            raise UserError(f"--config={file}: this config has no variants") from error
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # of ml_collections
        known = (
            saved
            or config_flags.DEFINE_config_file(
                "config", file or DEFAULT_CONFIG, flag_values=flags.FlagValues(), sys_argv=[]
            ).default
        )
        for word in argv:
            path = word.partition("=")[0].lstrip("-")
            if path.startswith("config.") and (unknown := unknown_field(known, path)):
                raise UserError(f"{path}: the config has no field {unknown}") from error
        raise


def unknown_field(known: ConfigDict, path: str) -> str | None:
    """What of a path `config.FIELD` a config does not know, and what may be meant; else None."""
    fields: Any = known
    for name in path.split(".")[1:]:
        if not isinstance(fields, ConfigDict) or name not in fields:
            names = fields if isinstance(fields, ConfigDict) else []
            nearest = difflib.get_close_matches(name, names, n=1)
            return f"{name}; did you mean {nearest[0]}?" if nearest else name or repr(name)
        fields = fields[name]
    return None


def default_workdir() -> str:
    """`runs/` and the name of the config file."""
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    return f"runs/{Path(file.partition(':')[0]).stem}"


def cache_programs() -> None:
    """Has JAX keep compiled programs on disk, but not those for CPUs.

    They take seconds to compile, and XLA refuses to load them again on many machines:
    https://github.com/openxla/xla/issues/44565. JAX_COMPILATION_CACHE_DIR says where to keep
    programs; by default in the user's cache.
    """
    if jax.default_backend() == "cpu" or jax.config.jax_compilation_cache_dir is not None:
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(caches / "bnlstm_jax"))


def job() -> contextlib.AbstractContextManager:
    """The job of several processes that flags ask to join, if they do."""
    explicit = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    if not _DISTRIBUTED.value and explicit == (None, None, None):
        return contextlib.nullcontext()
    return processes.joined(*explicit, _PEER_TIMEOUT.value)


def main(_: list[str]) -> None:
    """Runs every kind of model that the config names, in one process or many."""
    memory.keep_freed()
    base = flags.FLAGS.config
    config.check(base)
    parallel.check(base, _NUM_PROCESSES.value or 1)
    with job():
        fields = json.loads(base.to_json_best_effort())
        processes.check_same({"--mode": _MODE.value, "config": fields}, "")
        run_all(base)


def run_all(base: ConfigDict) -> None:
    """Trains or evaluates all kinds of model, and prints what they came to."""
    folder = Path(_WORKDIR.value or default_workdir())
    kinds = config.model_kinds(base)
    runs = {}
    for kind in kinds:
        own = base.copy_and_resolve_references()
        own.model.kind = kind
        runs[kind] = own, folder / kind if len(kinds) > 1 else folder
        processes.on_first(lambda run=runs[kind]: workdir.check(*run))
    cache_programs()
    if _MODE.value == "evaluate":
        results = [train.evaluate_run(*runs[kind]) for kind in kinds]
    else:
        results = [train.train(*runs[kind], profile=_PROFILE.value) for kind in kinds]

    if not processes.is_first():
        return
    print(f"\n{compare.results_table(results)}\n")
    picture = folder / compare.PICTURE_NAME
    folders = {kind: runs[kind][1] for kind in kinds}
    first = results[0]
    if compare.draw_curves(folders, first["data"], first["shown"][0], picture):
        print(f"Curves: {picture}")
    print(f"TensorBoard (pip install tensorboard): tensorboard --logdir={folder}")


if __name__ == "__main__":
    cli.run(main, parse=parse_flags)
