"""Arrays that the authors' released code computed, and how to compare with them.

The README of tests/data/authors describes them.
"""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "data/authors"

# Tolerances of an array's largest error, relative to its largest value. Double precision rounds by
# 1e-16. Batch normalisation multiplies this by up to 1 / sqrt(epsilon) = 316, and its gradient by
# up to 1 / epsilon = 1e5 at zero variance, as in the first recurrent term: 1e-11, with a margin of
# ten. The largest error found is 2e-12.
BATCH_STATISTICS = 1e-10
# Without batch statistics nothing is amplified: room for a thousand roundings. Found: 1e-15.
NO_BATCH_STATISTICS = 1e-13


def read_cases(name: str) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of each case of a file, by the authors' names."""
    with np.load(FOLDER / f"{name}.npz") as file:
        records = dict(file)
    return {case: {key: r[key] for key in r.dtype.names} for case, r in records.items()}


def reorder_gates(x: np.ndarray, order: str) -> np.ndarray:
    """Reorders the four blocks of the last axis from a given order to f, i, o, g."""
    blocks = dict(zip(order, np.split(x, 4, axis=-1), strict=True))
    return np.concatenate([blocks[gate] for gate in "fiog"], axis=-1)


def assert_agrees(found: np.ndarray, expected: np.ndarray, tolerance: float, name: str) -> None:
    """Checks the largest error, relative to the largest expected value."""
    found = np.asarray(found)  # JAX would subtract in single precision by default
    assert found.shape == expected.shape and found.dtype == expected.dtype == np.float64, name
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"{name}: {error:.1e}"


def assert_only_rounding(found: np.ndarray, expected: np.ndarray, name: str) -> None:
    """Checks a gradient that vanishes: the authors' is a rounding error, this library's is zero."""
    assert found.shape == expected.shape, name
    assert np.abs(expected).max() <= 1e-11 and not found.any(), name
