"""What devices exchange in an update, read off the compiled program: operations and bytes.

    python -m scripts.exchanges --config=configs/ptb.py --devices=8
    python -m scripts.exchanges --config=configs/ptb.py --devices=8 --statistics_devices=1

The program is compiled for virtual CPU devices, and not run. XLA on other devices may merge
operations that stand side by side; bytes are the same. docs/parallel.md says what follows for pods.
"""

import math
import re
from typing import NamedTuple

import jax
from absl import flags
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from experiments import config, parallel, tasks, train
from experiments.runtime import cli, markdown

BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1, "f64": 8}


def define_flags() -> None:
    """The flags beside those of `experiments.main`."""
    flags.DEFINE_integer("devices", 8, "Number of devices.", lower_bound=2)
    flags.DEFINE_integer("statistics_devices", 0, "As config.parallel's; 0: all.")


class Exchange(NamedTuple):
    """An all-reduce of a compiled program.

    Attributes:
      place: the loop over time it is in, by number from 1, or 0 if in none.
      size: bytes that each device gives, and gets back summed up.
    """

    place: int
    size: int


def exchanges(program: str) -> list[Exchange]:
    """The all-reduces in the text of a compiled program."""
    pattern = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*?^}", re.M | re.S)
    parts = {match[1]: match[0] for match in pattern.finditer(program)}
    bodies = {b for part in parts.values() for b in re.findall(r"while\(.*?body=%?([\w.-]+)", part)}
    places = {}
    for number, body in enumerate(sorted(bodies), 1):
        waiting = {body}
        while waiting:
            name = waiting.pop()
            places[name] = number
            called = re.findall(r"(?:to_apply|calls|body|condition)=%?([\w.-]+)", parts[name])
            waiting |= (set(called) & parts.keys()) - places.keys()
    found = []
    for name, part in parts.items():
        for result in re.findall(r"= (.*?) all-reduce(?:-start)?\(", part):
            size = 0
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
                size += BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
            found.append(Exchange(places.get(name, 0), size))
    return found


def compiled_update(task: tasks.Task, own: ConfigDict, devices: parallel.Parallel) -> str:
    """The text of the program of an update, compiled for `devices`."""
    everywhere = NamedSharding(devices.mesh, parallel.EVERYWHERE)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        jax.eval_shape(lambda: train.create_state(task, own)),
    )
    batch = devices.place(task.train_batch(0), True, task.shared)
    step = train.make_train_step(task, train.random_keys(own.seed)[1], devices)
    return jax.jit(lambda s, b: step(s, b, split=True)).lower(state, batch).compile().as_text()


def report(_: list[str]) -> None:
    """Prints the table."""
    own = flags.FLAGS.config
    number = flags.FLAGS.devices
    own.parallel.devices, own.parallel.statistics_devices = number, flags.FLAGS.statistics_devices
    own.model.kind = config.model_kinds(own)[-1]
    # What devices cannot share evenly is not what is looked at here.
    own.batch_size = max(2, own.batch_size // number) * number
    config.check(own)
    devices = parallel.make(own)
    task = tasks.load(own, devices)
    found = exchanges(compiled_update(task, own, devices))
    rows = []
    for place in sorted({exchange.place for exchange in found} | {0}):
        sizes = [exchange.size for exchange in found if exchange.place == place]
        name = f"a time step, loop {place}" if place else "an update, outside of loops"
        rows.append((name, str(len(sizes)), f"{sum(sizes):,}", f"{max(sizes, default=0):,}"))
    print(f"{devices}, {task.data}, {own.model.kind}, {own.model.features} units\n")
    print(markdown.table(["in", "all-reduces", "bytes", "largest"], rows))


def parse(argv: list[str]) -> list[str]:
    """The flags; before there are devices, how many there are to be."""
    from experiments import main

    words = main.parse_flags(argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", flags.FLAGS.devices)
    return words


if __name__ == "__main__":
    cli.run(report, define_flags, parse)
