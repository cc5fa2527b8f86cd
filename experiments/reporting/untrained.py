"""The paper's two figures that need no training: gradients of a tanh RNN, derivative of tanh."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnlstm_jax import BNSimpleCell
from bnlstm_jax.initializers import semi_orthogonal

GAMMAS = tuple(n / 10 for n in range(1, 11))  # of the figure's ten curves


def gradient_norms(pixels: Array, labels: Array, gamma: float, key: Array) -> np.ndarray:
    """How much of the gradient arrives at each time step of a normalised tanh RNN, untrained.

    `h_t = tanh(BN(h_{t-1} W_h + x_t W_x; gamma))` with 100 units, W_h = I, W_x orthogonal,
    h_0 = 0, and softmax read-out of the last h, of orthonormal columns. The paper plots it over t
    for ten gamma: for large ones the gradient vanishes.

    Args:
      pixels: `[batch, time]`, in [0, 1].
      labels: classes, integers `[batch]`, of ten.
      gamma: initial scale of the normalised pre-activation.
      key: of W_x and the read-out.

    Returns:
      `[time]`: the mean over examples of `||dL / dh_t||`, where L is the batch's mean cross-entropy
      in nats. What is below float32's range is zero.
    """
    return np.asarray(_gradient_norms(pixels, labels, gamma, key))


@jax.jit
def _gradient_norms(pixels: Array, labels: Array, gamma: float, key: Array) -> Array:
    batch, steps = pixels.shape
    features, classes = 100, 10
    cell = BNSimpleCell(
        features,
        use_running_average=False,
        input_kernel_init=semi_orthogonal(),
        recurrent_kernel_init=lambda key, shape, dtype: jnp.eye(shape[0], dtype=dtype),
    )
    inputs, hidden = pixels.T[:, :, None], jnp.zeros((batch, features))
    cell_key, readout_key = jax.random.split(key)
    variables = cell.init(cell_key, hidden, inputs[0])
    params = variables["params"] | {"joint_scale": jnp.full((features,), gamma)}
    variables = {**variables, "params": params}
    readout = semi_orthogonal()(readout_key, (features, classes), jnp.float32)

    def loss_of(moved: Array) -> Array:
        """The loss when h_t is moved by `moved[t]`, `[time, batch, features]`."""

        def step(h: Array, at_step: tuple[Array, Array]) -> tuple[Array, None]:
            (h, _), _ = cell.apply(variables, h, at_step[0], mutable=["batch_stats"])
            return h + at_step[1], None

        last, _ = jax.lax.scan(step, hidden, (inputs, moved))
        scores = jax.nn.log_softmax(last @ readout)
        return -jnp.mean(jnp.take_along_axis(scores, labels[:, None], axis=1))

    gradients = jax.grad(loss_of)(jnp.zeros((steps, batch, features)))
    # Scaled before it is squared, which would be below float32's range before the norm is.
    largest = jnp.max(jnp.abs(gradients), axis=-1, keepdims=True)
    scaled = gradients / jnp.where(largest > 0, largest, 1)
    return jnp.mean(largest[..., 0] * jnp.linalg.norm(scaled, axis=-1), axis=-1)


def tanh_derivative(stddevs: np.ndarray, seed: int, samples: int = 1000) -> np.ndarray:
    """The derivative of tanh at Gaussian inputs, by their standard deviation, `[n]`.

    Returns:
      `[3, n]`: its mean, its lower and its upper quartile, over so many samples each.
    """
    inputs = np.random.default_rng(seed).normal(size=(samples, len(stddevs))) * stddevs
    derivatives = 1 - np.tanh(inputs) ** 2
    lower, upper = np.quantile(derivatives, (0.25, 0.75), axis=0)
    return np.stack([derivatives.mean(axis=0), lower, upper])
