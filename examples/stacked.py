"""Stacked, bidirectional BN-LSTMs with dropout between them, over padded sequences.

    python -m examples.stacked

The counterpart of `torch.nn.LSTM(num_layers=2, bidirectional=True, dropout=0.5)`. The command
trains the model in seconds. Each input is a sequence of random numbers, two of which are marked.
The model classifies whether these two have the same sign.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bnlstm_jax import BNLSTM, estimate_population_statistics

MAX_STEPS = 20


class StackedBNLSTM(nn.Module):
    """Stacked layers of two BN-LSTMs each, one for each direction.

    Attributes:
      features: hidden units H of a direction.
      max_steps: time steps with statistics of their own; see `BNLSTM`.
      num_layers: number of layers.
      dropout_rate: dropout rate of the outputs of all layers but the last, in training.
    """

    features: int
    max_steps: int
    num_layers: int = 2
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(
        self, x: Array, seq_lengths: Array | None = None, train: bool = False
    ) -> tuple[Array, Array]:
        """Runs over sequences `[batch, time, input]`, with valid steps `seq_lengths [batch]`.

        In training, pass an rng stream `dropout`, and make `batch_stats` mutable.

        Returns:
          The last layer's outputs `[batch, time, 2H]`, and its last hidden states `[batch, 2H]`,
          those after the whole sequence in each direction. Both concatenate the two directions.
        """
        for index in range(self.num_layers):
            if index > 0:
                x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
            forward, backward = (
                # Set as a field, because nn.Bidirectional does not pass the argument on.
                BNLSTM(self.features, self.max_steps, use_running_average=not train)
                for _ in range(2)
            )
            both = nn.Bidirectional(forward, backward, return_carry=True)
            ((_, h_forward), (_, h_backward)), x = both(x, seq_lengths=seq_lengths)
        return x, jnp.concatenate([h_forward, h_backward], axis=-1)


class Classifier(nn.Module):
    """The layers, and a linear read-out of their last hidden states."""

    @nn.compact
    def __call__(self, x: Array, seq_lengths: Array, train: bool = False) -> Array:
        """Sequences `[batch, time, 2]` to logits `[batch]`."""
        layers = StackedBNLSTM(32, MAX_STEPS, num_layers=2, dropout_rate=0.2)
        _, h = layers(x, seq_lengths, train=train)
        return nn.Dense(1)(h)[:, 0]


def make_batch(seed: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers and marks `[size, MAX_STEPS, 2]`, lengths `[size]`, and the answers `[size]`."""
    random = np.random.default_rng(seed)
    lengths = random.integers(5, MAX_STEPS + 1, size)
    x = np.zeros((size, MAX_STEPS, 2), np.float32)
    x[..., 0] = random.uniform(-1, 1, (size, MAX_STEPS))
    marked = np.array([random.choice(length, 2, replace=False) for length in lengths])
    rows = np.arange(size)[:, None]
    x[rows, marked, 1] = 1
    return x, lengths, np.prod(x[rows, marked, 0], axis=1) > 0


MODEL = Classifier()
OPTIMIZER = optax.adam(1e-2)


@jax.jit
def update(
    variables: dict[str, Any],
    optimizer_state: optax.OptState,
    key: Array,
    x: Array,
    lengths: Array,
    answers: Array,
) -> tuple[dict[str, Any], optax.OptState, Array]:
    """One update on a batch: the new variables and optimiser state, and the loss in nats."""

    def loss_of(params):
        logits, updated = MODEL.apply(
            {**variables, "params": params},
            x,
            lengths,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return optax.sigmoid_binary_cross_entropy(logits, answers).mean(), updated

    params = variables["params"]
    (loss, updated), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
    changes, optimizer_state = OPTIMIZER.update(gradients, optimizer_state)
    return {"params": optax.apply_updates(params, changes), **updated}, optimizer_state, loss


def main(updates: int = 300) -> None:
    """Trains, and prints the accuracy on new sequences by running and re-estimated statistics."""
    key = jax.random.key(0)
    x, lengths, _ = make_batch(0, 2)
    variables = MODEL.init(key, x, lengths)
    optimizer_state = OPTIMIZER.init(variables["params"])
    for index in range(updates):
        batch = make_batch(1 + index, 64)
        dropout = jax.random.fold_in(key, index)
        variables, optimizer_state, loss = update(variables, optimizer_state, dropout, *batch)
        if (index + 1) % 50 == 0:
            print(f"update {index + 1}: loss {loss:.3f}")

    batches = [make_batch(index, 500)[:2] for index in range(10_000, 10_004)]
    population = estimate_population_statistics(
        MODEL, variables, batches, train=True, rngs={"dropout": key}
    )
    x, lengths, answers = make_batch(20_000, 1000)
    for name, statistics in (
        ("running averages", variables["batch_stats"]),
        ("re-estimated population statistics", population),
    ):
        logits = MODEL.apply({**variables, "batch_stats": statistics}, x, lengths)
        print(f"accuracy by {name}: {np.mean((logits > 0) == answers):.3f}")


if __name__ == "__main__":
    main()
