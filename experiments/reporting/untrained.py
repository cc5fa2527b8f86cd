"""The paper's two figures that need no training: gradients of a tanh RNN, derivative of tanh."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnlstm_jax import BNSimpleCell
from bnlstm_jax.initializers import semi_orthogonal
from experiments import datasets
from experiments.datasets import Dataset
from experiments.reporting import paper, pictures
from experiments.reporting.curves import PAPER_STYLE
from experiments.reporting.item import Found, Item, Shown, Table
from experiments.tasks.sequential_images import pixel_order


@jax.jit
def gradient_norms(pixels: Array, labels: Array, gamma: float, key: Array) -> Array:
    """The norm of the loss's gradient at each time step of an untrained, normalised tanh RNN.

    `h_t = tanh(BN(h_{t-1} W_h + x_t W_x; gamma))` with 100 units, W_h = I, W_x orthogonal,
    h_0 = 0, and a softmax read-out of the last h with orthonormal columns. For large gamma the
    gradient vanishes.

    Args:
      pixels: `[batch, time]`, in [0, 1].
      labels: integers `[batch]`, of ten classes.
      gamma: initial scale of the normalised pre-activation.
      key: key for W_x and the read-out.

    Returns:
      `[time]`: the mean over examples of `||dL / dh_t||`, where L is the batch's mean cross-entropy
      in nats. Values below float32's range are zero.
    """
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

    def step(h: Array, at_step: tuple[Array, Array]) -> tuple[Array, None]:
        x, shift = at_step
        (h, _), _ = cell.apply(variables, h, x, mutable=["batch_stats"])
        return h + shift, None

    def loss_of(shifts: Array) -> Array:
        """The loss when `shifts[t]` is added to h_t, `[time, batch, features]`."""
        last, _ = jax.lax.scan(step, hidden, (inputs, shifts))
        scores = jax.nn.log_softmax(last @ readout)
        return -jnp.mean(jnp.take_along_axis(scores, labels[:, None], axis=1))

    gradients = jax.grad(loss_of)(jnp.zeros((steps, batch, features)))
    # Scale first: squares leave float32's range before norms do.
    largest = jnp.max(jnp.abs(gradients), axis=-1, keepdims=True)
    scaled = gradients / jnp.where(largest > 0, largest, 1)
    return jnp.mean(largest[..., 0] * jnp.linalg.norm(scaled, axis=-1), axis=-1)


def draws_of_gradient_norms(
    data: Dataset, gamma: float, draws: int = 20, order: str = "released_draw"
) -> np.ndarray:
    """`gradient_norms` on MNIST for draws of weights and of a batch of 100, `[draws, time]`.

    The paper names no order of pixels. Its lines agree with the order that the released code draws
    for permuted MNIST, and not with row-by-row pixels (`in_order`).
    """
    images, labels = data.arrays["train_images"], data.arrays["train_labels"]
    pixels_read = pixel_order(order, images.shape[1], 1)
    norms = []
    for draw in range(draws):
        rows = np.random.default_rng(draw).permutation(len(images))[:100]
        pixels = images[rows][:, pixels_read] / np.float32(255)
        chosen = labels[rows].astype(np.int32)
        norms.append(gradient_norms(pixels, chosen, gamma, jax.random.key(draw)))
    return np.stack(norms)


class GradientNorms(Item):
    """Gradient norms by time step, of the paper's ten gammas."""

    def show(self, found: Found, data_dir: str) -> Shown:
        """The figure, and a table of three time steps."""
        data = datasets.load("mnist", data_dir)
        published = paper.curves("tanh_rnn_gradient_norm")
        title = r"$\|\partial L / \partial h_t\|$ of a normalised tanh RNN, untrained"
        figure = pictures.new_figure(title, 11, 5, math=True)
        panels = figure.subplots(2, 5, sharex=True, sharey=True)
        rows = []
        for axes, ((gamma,), curve) in zip(panels.flat, published.items(), strict=True):
            draws = draws_of_gradient_norms(data, float(gamma))
            low, middle, high = np.quantile(draws, (0, 0.5, 1), axis=0)
            # Values below float32's range are zero, which a logarithmic axis cannot show.
            band = np.maximum((low, high), 1e-45)
            axes.fill_between(np.arange(len(low)), *band, color="tab:blue", alpha=0.25, linewidth=0)
            axes.plot(np.maximum(middle, 1e-45), color="tab:blue", linewidth=2)
            axes.plot(*curve, **PAPER_STYLE)
            axes.set_title(f"gamma {gamma}", fontsize="small")
            pictures.tidy(axes)
            for step in (783, 600, 300):
                theirs = paper.at(curve, step)
                ours = [f"{v[step]:.1e}" if v[step] > 1e-44 else "0" for v in (middle, low, high)]
                rows.append([gamma, str(step), "-" if np.isnan(theirs) else f"{theirs:.1e}", *ours])
        panels[0, 0].set(xlim=(0, 800), ylim=(1e-26, 10), yscale="log")
        for axes in panels[1]:
            axes.set_xlabel("time step t")
        header = ["gamma", "t", "paper", "here, median", "lowest", "highest"]
        return Shown(Table(header, rows), figure)


def tanh_derivative(stddevs: np.ndarray, seed: int, samples: int = 1000) -> np.ndarray:
    """The derivative of tanh at Gaussian inputs, by their standard deviation, `[n]`.

    Returns:
      `[3, n]`: its mean, lower and upper quartile, over `samples` inputs each.
    """
    inputs = np.random.default_rng(seed).normal(size=(samples, len(stddevs))) * stddevs
    derivatives = 1 - np.tanh(inputs) ** 2
    lower, upper = np.quantile(derivatives, (0.25, 0.75), axis=0)
    return np.stack([derivatives.mean(axis=0), lower, upper])


class TanhDerivative(Item):
    """The derivative of tanh by standard deviation of its input."""

    def show(self, found: Found, data_dir: str) -> Shown:
        """The figure, and a table of the paper's means."""
        stddevs = np.linspace(0, 1, 1000)
        mean, lower, upper = tanh_derivative(stddevs, seed=0)
        figure = pictures.new_figure("Derivative of tanh at Gaussian inputs", 5, 3.6)
        axes = figure.subplots()
        axes.plot(stddevs, mean, color="tab:blue", linewidth=1.5, label="mean of 1,000 samples")
        axes.fill_between(stddevs, lower, upper, color="tab:blue", alpha=0.25, label="25% to 75%")
        axes.plot(*paper.TANH_MEANS, "k.", label="the paper's mean")
        at, *quartiles = np.transpose(paper.TANH_QUARTILES)
        axes.plot(at, quartiles[0], "kx", label="the paper's quartiles")
        axes.plot(at, quartiles[1], "kx")
        axes.legend(fontsize="small")
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="standard deviation", ylabel="derivative")
        pictures.tidy(axes)
        ours, _, _ = tanh_derivative(paper.TANH_MEANS[0], seed=0, samples=100_000)
        points = zip(*paper.TANH_MEANS, ours, strict=True)
        rows = [[f"{at:.1f}", f"{theirs:.3f}", f"{here:.3f}"] for at, theirs, here in points]
        return Shown(Table(["standard deviation", "paper, mean", "here"], rows), figure)
