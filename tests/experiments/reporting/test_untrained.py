"""The two figures that need no training, against the paper's points and against definitions."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import datasets
from experiments.reporting import paper, untrained


def finite_difference_norms(pixels, labels, gamma, parameters, steps):
    """Norms of dL / dh_t in double precision, by central differences in each element of h_t."""
    input_kernel, readout = parameters
    batch, time = pixels.shape

    def loss(moved_step, moved):
        h = np.zeros((batch, len(input_kernel)))
        for t in range(time):
            a = h + pixels[:, t : t + 1] * input_kernel
            h = np.tanh(gamma * (a - a.mean(0)) / np.sqrt(a.var(0) + 1e-5))
            if t == moved_step:
                h = h + moved
        scores = h @ readout
        logs = scores - np.log(np.sum(np.exp(scores), axis=1, keepdims=True))
        return -np.mean(logs[np.arange(batch), labels])

    norms = []
    for t in steps:
        gradient = np.zeros((batch, len(input_kernel)))
        for index in np.ndindex(gradient.shape):
            moved = np.zeros_like(gradient)
            moved[index] = 1e-6
            gradient[index] = (loss(t, moved) - loss(t, -moved)) / 2e-6
        norms.append(np.mean(np.linalg.norm(gradient, axis=1)))
    return norms


def test_gradient_norms_match_finite_differences():
    random = np.random.default_rng(0)
    pixels = random.uniform(size=(5, 6)).astype(np.float32)
    labels = np.array([3, 0, 9, 3, 7])
    key = jax.random.key(2)
    found = untrained.gradient_norms(pixels, labels, 0.4, key)
    assert found.shape == (6,)
    cell_key, readout_key = jax.random.split(key)
    cell = untrained.BNSimpleCell(
        100, use_running_average=False, input_kernel_init=untrained.semi_orthogonal()
    )
    params = cell.init(cell_key, jnp.zeros((5, 100)), jnp.zeros((5, 1)))["params"]
    readout = untrained.semi_orthogonal()(readout_key, (100, 10), jnp.float32)
    parameters = np.float64(params["input_kernel"][0]), np.float64(readout)
    steps = (5, 3, 0)
    expected = finite_difference_norms(np.float64(pixels), labels, 0.4, parameters, steps)
    # Float32 over six steps. Where a variance is near zero, a step divides by only 3e-3.
    np.testing.assert_allclose(np.take(found, steps), expected, rtol=2e-3)


def test_tiny_gradient_norms_do_not_underflow():
    """Norms of 1e-25, as in the figure, have squares below the range of float32."""
    random = np.random.default_rng(0)
    pixels = random.uniform(size=(20, 300)).astype(np.float32)
    found = untrained.gradient_norms(pixels, np.arange(20) % 10, 0.9, jax.random.key(0))
    assert np.any((found > 0) & (found < 1e-25))


@pytest.fixture(scope="module")
def mnist(data_dir):
    if not (data_dir / "mnist").is_dir():
        pytest.skip("needs original data: BNLSTM_DATA_DIR has no mnist")
    return datasets.load("mnist", str(data_dir))


@pytest.fixture(scope="module")
def norms(mnist):
    gammas = (0.1, 0.2, 0.3, 0.4, 0.5)
    return {gamma: untrained.draws_of_gradient_norms(mnist, gamma, draws=10) for gamma in gammas}


def test_gradient_norms_match_the_paper(norms):
    """The paper's norms at t = 783, 600 and 300 are in the range of ours, up to a factor of 2.

    For small gamma and near the end, draws of weights and batch hardly differ, and the median must
    agree too. Elsewhere draws are orders of magnitude apart.
    """
    published = paper.curves("tanh_rnn_gradient_norm")
    for gamma, draws in norms.items():
        curve = published[(str(gamma),)]
        for step in (783, 600, 300):
            theirs, ours = paper.at(curve, step), draws[:, step]
            assert ours.min() / 2 < theirs < 2 * ours.max(), (gamma, step)
            if ours.max() / ours.min() < 4:
                assert 0.5 < np.median(ours) / theirs < 2, (gamma, step)
    steady = {
        (g, t) for g in norms for t in (783, 600, 300) if np.ptp(np.log(norms[g][:, t])) < 1.4
    }
    assert steady >= {(0.1, 783), (0.2, 783), (0.3, 783), (0.4, 783), (0.5, 783)}
    assert steady >= {(0.1, 600), (0.2, 600), (0.3, 600), (0.1, 300)}


def test_paper_gradient_norms_match_only_permuted_pixels(mnist, norms):
    """Near the end draws hardly differ, so that they distinguish the two orders."""
    in_order = untrained.draws_of_gradient_norms(mnist, 0.1, draws=5, order="in_order")
    theirs = paper.at(paper.curves("tanh_rnn_gradient_norm")[("0.1",)], 750)
    assert np.all(in_order[:, 750] > 1.6 * theirs)
    assert np.all(np.abs(norms[0.1][:, 750] / theirs - 1) < 0.25)


def test_tanh_derivative_matches_the_paper():
    # The paper's means over 1,000 samples scatter by 0.01. Ours are over 100,000.
    stddevs, means = paper.TANH_MEANS
    mean, _, _ = untrained.tanh_derivative(stddevs, seed=0, samples=100_000)
    np.testing.assert_allclose(mean, means, atol=0.01)
    stddevs, *quartiles = np.transpose(paper.TANH_QUARTILES)
    _, *found = untrained.tanh_derivative(stddevs, seed=0, samples=100_000)
    # Quartiles of 1,000 samples scatter by 0.02.
    np.testing.assert_allclose(found, quartiles, atol=0.03)


def test_paper_curves_are_read_from_csv_files():
    lines = paper.curves("ptb_valid_bpc")
    assert set(lines) == {("lstm",), ("bn_lstm",)}
    assert paper.at(lines[("lstm",)], 791) == 2.2225
    assert np.isnan(paper.at(lines[("lstm",)], 1e6))
    with (paper.FOLDER / "pmnist_gamma_cross_entropy.csv").open() as file:
        rows = list(csv.DictReader(file))
    points = sum(line.shape[1] for line in paper.curves("pmnist_gamma_cross_entropy").values())
    assert points == len(rows)
