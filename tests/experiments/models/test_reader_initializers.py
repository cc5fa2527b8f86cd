import jax
import numpy as np
import pytest

from experiments.models import reader_initializers

H = 12


@pytest.mark.parametrize("scale", [0.05, 1.0])
@pytest.mark.parametrize("identical", [False, True])
def test_every_block_is_orthogonal(identical, scale):
    init = reader_initializers.orthogonal_blocks(scale, identical)
    one, two = (init(jax.random.key(k), (H, 4 * H)) for k in (0, 1))
    square = init(jax.random.key(2), (H, H))
    kernels = [*np.split(one, 4, axis=1), *np.split(two, 4, axis=1), square]
    for k, block in enumerate(kernels):
        np.testing.assert_allclose(block @ block.T, scale**2 * np.eye(H), atol=1e-6 * scale**2 * H)
        for other in kernels[:k]:
            assert np.array_equal(block, other) == identical
    with pytest.raises(ValueError, match="k H"):
        init(jax.random.key(0), (4 * H, H))


def test_orthogonal_blocks_have_scale_0_05_by_default():
    block = reader_initializers.orthogonal_blocks()(jax.random.key(0), (H, H))
    np.testing.assert_allclose(np.linalg.norm(block, axis=0), 0.05, rtol=1e-5)


@pytest.mark.parametrize("identical", [False, True])
def test_uniform_matrices_of_one_shape_are_equal_if_identical(identical):
    init = reader_initializers.fan_uniform(identical)
    one, two = (init(jax.random.key(k), (4, 3)) for k in (0, 1))
    assert np.array_equal(one, two) == identical


def test_fan_uniform_fills_its_interval():
    matrix = np.asarray(reader_initializers.fan_uniform()(jax.random.key(0), (100, 139)))
    bound = np.sqrt(6 / 240)
    assert np.abs(matrix).max() <= bound
    # 13,900 draws: each tenth of the interval has 1390, with a deviation of 35.
    counts, _ = np.histogram(matrix, bins=10, range=(-bound, bound))
    assert np.abs(counts - 1390).max() < 180
    # The transposed shape has the same bound.
    wide = np.asarray(reader_initializers.fan_uniform()(jax.random.key(1), (139, 100)))
    assert 0.99 * bound < np.abs(wide).max() <= bound
