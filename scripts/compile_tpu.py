"""Compiles the TPU's kernel for TPUs that are not there: what fits, and in which memory.

    pip install "libtpu==0.0.42.*"           # the version that `pip show jax` names for [tpu]
    python -m scripts.compile_tpu
    python -m scripts.compile_tpu --chips=v6e:2x2 --sizes=pmnist

Layers at the sizes of the paper's tasks: forward and backward under batch statistics, and
inference. A program that compiles has kernels that the chip can run, within its vector memory
(VMEM); that they compute the right numbers, tests show by interpreting them. No time is measured.
"""

import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from bnlstm_jax import BNLSTM
from bnlstm_jax.recurrence.devices import emulation
from experiments.runtime import cli, markdown, progress
from experiments.runtime.errors import UserError
from scripts.benchmark import SIZES, Size


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_list("chips", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"], "Topologies.")
    flags.DEFINE_list("sizes", ["pmnist", "ptb", "text8", "reader"], "Of scripts/benchmark.py.")
    flags.DEFINE_list("implementations", ["tpu", "xla"], "Ways to run the recurrence.")


def topology(chip: str) -> Any:
    """The devices of a kind of TPU, to compile for.

    Raises:
      UserError: libtpu is not installed, or does not know the kind.
    """
    from bnlstm_jax.jax_experimental import topologies

    # Or libtpu looks for the cloud that this machine is part of, for minutes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=chip)
    except Exception as error:  # whatever the plugin raises
        raise UserError(
            f"--chips={chip} cannot be compiled for: {str(error).splitlines()[0]}; it needs "
            "pip install libtpu, and a name as v5e:2x2"
        ) from error


def programs(size: Size, implementation: str) -> dict[str, tuple[Any, Any]]:
    """What is compiled, by name: functions, and the shapes of their arguments."""
    kind = jnp.bfloat16 if size.features >= 1000 else None
    vocab_size = size.inputs if size.symbols else None
    layer = BNLSTM(
        size.features,
        max_steps=size.steps,
        vocab_size=vocab_size,
        dtype=kind,
        implementation=implementation,
    )
    shape = (size.batch, size.steps) if vocab_size else (size.batch, size.steps, size.inputs)
    x = jax.ShapeDtypeStruct(shape, jnp.int32 if vocab_size else jnp.float32)
    variables = jax.eval_shape(
        lambda x: layer.clone(implementation="xla").init(
            jax.random.key(0), x, use_running_average=True
        ),
        x,
    )

    def train(params, others, x):
        def loss(params):
            y, updated = layer.apply(
                {**others, "params": params}, x, use_running_average=False, mutable=["batch_stats"]
            )
            return jnp.sum(y.astype(jnp.float32)), updated

        return jax.value_and_grad(loss, has_aux=True)(params)

    def infer(params, others, x):
        return layer.apply({**others, "params": params}, x, use_running_average=True)

    params = variables.pop("params")
    return {
        "training": (train, (params, variables, x)),
        "inference": (infer, (params, variables, x)),
    }


def compiled(device: Any, function: Any, arguments: Any) -> list[str]:
    """What came of it: `compiles` and its memory, or why not."""
    mesh = jax.sharding.Mesh(np.array([device]), ("device",))
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), arguments
    )
    try:
        with emulation(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            program = jax.jit(function).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        # Told by the kernel's compiler, or before it by the allocation of its windows.
        used = re.search(r"Used (\S+) of (\S+) vmem", str(error))
        more = re.search(r"size=(\d+)\) would exceed memory \(size=(\d+)\)", str(error))
        if used:
            return [f"no: {used[1]} of {used[2]} VMEM", "-"]
        if more:
            return [f"no: {int(more[1]) / 2**20:.2f}M of {int(more[2]) / 2**20:.2f}M VMEM", "-"]
        return [f"no: {str(error).splitlines()[0]}", "-"]
    return ["compiles", f"{program.memory_analysis().temp_size_in_bytes / 2**20:,.0f}"]


def main(_: list[str]) -> None:
    """Prints a table."""
    given = flags.FLAGS
    if unknown := set(given.sizes) - set(SIZES):
        raise UserError(f"--sizes has {min(unknown)!r}; there are {', '.join(SIZES)}")
    todo = [
        (chip, size, name)
        for chip in given.chips
        for size in given.sizes
        for name in given.implementations
    ]
    rows = []
    for chip, size, name in progress.track(todo, "compiling", len(todo)):
        device = topology(chip).devices[0]
        for what, program in programs(SIZES[size], name).items():
            rows.append([device.device_kind, size, what, name, *compiled(device, *program)])
    header = ["chip", "size", "of", "implementation", "outcome", "temporary memory, MiB"]
    print(f"JAX {jax.__version__}\n\n{markdown.table(header, rows)}")


if __name__ == "__main__":
    cli.run(main, define_flags)
