"""The train step: parameters, optimiser and statistics after one more batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from ml_collections import ConfigDict

from experiments import tasks
from experiments.optimizers import make_optimizer
from experiments.parallel import UNSHARDED, BatchSharding
from experiments.runtime import finite


class TrainState(train_state.TrainState):
    """Parameters, optimiser, step, and everything else that a run needs to continue.

    Attributes:
      batch_stats: running averages of batch statistics.
      window: sums and counts of training metrics, and of `gradient_norm` over updates, since the
        last log.
      refused: for each value of `finite.names`, whether the next update would have made it
        non-finite. Once any is True, no update is applied.
    """

    batch_stats: Any
    window: tasks.Metrics
    refused: jax.Array


def random_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The keys of a run: for initial parameters, and for noise.

    On one device, the n-th batch gets the same noise in training, in every evaluation and in
    re-estimation.
    """
    return tuple(jax.random.split(jax.random.key(seed)))


def gradient_norm(gradients: Any) -> tuple[jax.Array, jax.Array]:
    """The global norm of one update's gradient, as the sum and the count of a metric."""
    return optax.tree.norm(gradients), jnp.ones(())


def create_state(task: tasks.Task, config: ConfigDict) -> TrainState:
    """The state before the first update."""
    # Only the batch's shapes are used, which are the same in all processes.
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), dict(task.train_batch(0))
    )
    key, _ = random_keys(config.seed)

    def init() -> Any:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
        return task.model.init(key, *task.inputs(zeros), use_running_average=True)

    def metrics_of(variables: Any, batch: tasks.Batch) -> tasks.Metrics:
        outputs = task.model.apply(
            variables, *task.inputs(batch), use_running_average=True, rngs={"noise": key}
        )
        return task.metrics(outputs, batch)

    variables = jax.jit(init)()
    window = {
        **jax.eval_shape(metrics_of, variables, batch),
        "gradient_norm": jax.eval_shape(gradient_norm, variables["params"]),
    }
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    state = TrainState.create(
        apply_fn=task.model.apply,
        params=params,
        tx=make_optimizer(config.optimizer),
        batch_stats=batch_stats,
        window=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), window),
        refused=jnp.zeros(len(finite.names(params, batch_stats)), bool),
    )
    return state.replace(step=jnp.zeros((), jnp.int32))


def variables_of(state: TrainState) -> dict[str, Any]:
    """The model's variables: parameters, and statistics if it has any."""
    if not state.batch_stats:
        return {"params": state.params}
    return {"params": state.params, "batch_stats": state.batch_stats}


def update(
    task: tasks.Task,
    noise: jax.Array,
    sharding: BatchSharding,
    state: TrainState,
    batch: tasks.Batch,
) -> TrainState:
    """One update, as every device runs it: gradient of the mean loss, optimiser, statistics.

    An update that would introduce non-finite values only sets `refused`; every later update changes
    nothing.
    """
    key = sharding.fold_in(jax.random.fold_in(noise, state.step))

    def loss_of(params: Any) -> tuple[jax.Array, tuple[tasks.Metrics, Any]]:
        outputs, updated = task.model.apply(
            {**variables_of(state), "params": params},
            *task.inputs(batch),
            use_running_average=False,
            rngs={"noise": key, "dropout": jax.random.fold_in(key, 1)},
            mutable=["batch_stats"],
        )
        batch_metrics = task.metrics(outputs, batch)
        total, count = batch_metrics["loss"]
        # A device's part of the mean over the whole batch; gradients are added up below.
        loss = total / sharding.total(count)
        return loss, (batch_metrics, updated.get("batch_stats", {}))

    gradients, (batch_metrics, batch_stats) = jax.grad(loss_of, has_aux=True)(state.params)
    gradients = sharding.total(gradients)
    batch_metrics = sharding.total(batch_metrics)
    # Before clipping. The optimiser computes the norm too; XLA computes it once.
    batch_metrics["gradient_norm"] = gradient_norm(gradients)
    after = state.apply_gradients(
        grads=gradients,
        batch_stats=sharding.mean_of_groups(batch_stats),
        window=jax.tree.map(jnp.add, state.window, batch_metrics),
    )
    loss, _ = batch_metrics["loss"]
    refused = finite.not_finite(after.params, after.batch_stats, gradients, loss)
    refused = jnp.where(jnp.any(state.refused), state.refused, refused)
    after = jax.tree.map(functools.partial(jnp.where, jnp.any(refused)), state, after)
    return after.replace(refused=refused)


def make_train_step(task: tasks.Task, noise: jax.Array) -> Callable[..., TrainState]:
    """The compiled train step: maps a state, a batch and its sharding to the state after `update`.

    It also takes several batches of equal shapes, for as many updates in one call. It reuses the
    memory of the given state.
    """

    def one(sharding: BatchSharding, state: TrainState, batch: tasks.Batch) -> TrainState:
        return sharding.run(functools.partial(update, task, noise, sharding))(state, batch)

    def several(
        sharding: BatchSharding, state: TrainState, shared: tasks.Batch, own: list[tasks.Batch]
    ) -> TrainState:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)

        def step(state: TrainState, own: tasks.Batch) -> tuple[TrainState, None]:
            return one(sharding, state, {**shared, **own}), None

        return jax.lax.scan(step, state, stacked)[0]

    call_one = jax.jit(one, static_argnums=0, donate_argnums=1)
    call_several = jax.jit(several, static_argnums=0, donate_argnums=1)

    def train_step(
        state: TrainState, *batches: tasks.Batch, sharding: BatchSharding = UNSHARDED
    ) -> TrainState:
        first, *others = batches
        if not others:
            return call_one(sharding, state, first)
        # Shared entries, such as the text, are not copied for each batch.
        shared = {k: v for k, v in first.items() if k in task.shared}
        own = [{k: v for k, v in batch.items() if k not in shared} for batch in batches]
        return call_several(sharding, state, shared, own)

    return train_step
