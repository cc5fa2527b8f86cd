import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnlstm_jax.recurrence.devices import emulation
from bnlstm_jax.recurrence.native import cpu
from experiments import datasets, tasks
from experiments.models import layers
from experiments.runtime.errors import UserError
from experiments.tasks.sequential_images import pixel_order


def test_pixel_orders_are_permutations_or_the_released_draw():
    np.testing.assert_array_equal(pixel_order("in_order", 784, 1), np.arange(784))
    assert sorted(pixel_order("permutation", 784, 1)) == list(range(784))
    released = pixel_order("released_draw", 784, 1)
    assert len(released) == 784 and len(set(released)) == 501  # the paper's released code: 501
    assert np.any(pixel_order("permutation", 784, 1) != pixel_order("permutation", 784, 2))


def test_config_fields_are_passed_to_the_layer(small_config):
    model = small_config.model
    model.kind = "bn_lstm"
    fields = {"momentum": 0.7, "initial_hidden_noise": 0.1, "input_statistics": "sequence",
              "normalize": ("input", "cell"), "max_steps": 9, "dtype": "bfloat16",
              "implementation": "xla"}  # fmt: skip
    model.update(fields | {"features": 3, "recurrent_init": "identity", "initial_scale": 0.3})
    layer = layers.recurrent_layer(model, 16, axis_name="devices")
    assert {name: getattr(layer, name) for name in fields} == fields
    assert layer.axis_name == "devices"
    x = jnp.ones((2, 16, 1))
    params = layer.init(jax.random.key(0), x, use_running_average=True)["params"]
    np.testing.assert_array_equal(params["recurrent_kernel"][:, 9:], np.eye(3))
    np.testing.assert_array_equal(params["input_scale"], np.full(12, np.float32(0.3)))

    model.update({"shared_statistics": True, "max_steps": 0, "recurrent_init": "orthogonal"})
    layer = layers.recurrent_layer(model, 16)
    assert layer.shared_statistics and layer.max_steps is None
    params = layer.init(jax.random.key(0), x, use_running_average=True)["params"]
    assert np.abs(params["recurrent_kernel"][:, 9:] - np.eye(3)).max() > 0.1
    model.update({"kind": "ln_lstm", "normalize": ("recurrent",)})
    assert layers.recurrent_layer(model, 16).normalize == ("recurrent",)


def test_every_epoch_holds_every_example_once():
    epochs = [
        np.concatenate([tasks.shuffled_batch(10, 4, 1, 3 * epoch + n) for n in range(3)])
        for epoch in range(2)
    ]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert np.any(epochs[0] != epochs[1])
    assert [len(tasks.shuffled_batch(10, 4, 1, n)) for n in range(4)] == [4, 4, 2, 4]


def test_single_leftover_example_is_skipped():
    epochs = [
        np.concatenate([tasks.shuffled_batch(9, 4, 1, 2 * epoch + n) for n in range(2)])
        for epoch in range(20)
    ]
    assert all(len(np.unique(examples)) == 8 for examples in epochs)
    assert len({(set(range(9)) - set(examples.tolist())).pop() for examples in epochs}) > 3
    assert [len(tasks.shuffled_batch(9, 4, 1, n)) for n in range(3)] == [4, 4, 4]
    assert [len(tasks.shuffled_batch(3, 1, 1, n)) for n in range(3)] == [1, 1, 1]


def test_order_is_a_pure_function_of_seed_and_update():
    np.testing.assert_array_equal(
        tasks.shuffled_batch(1000, 50, 7, 33), tasks.shuffled_batch(1000, 50, 7, 33)
    )
    assert np.any(tasks.shuffled_batch(1000, 50, 7, 33) != tasks.shuffled_batch(1000, 50, 8, 33))


def test_evaluation_order_is_fixed_and_separates_neighbours():
    order = tasks.evaluation_order(10_000)
    np.testing.assert_array_equal(np.sort(order), np.arange(10_000))
    np.testing.assert_array_equal(order, tasks.evaluation_order(10_000))
    # Neighbours share a batch of 100 as often as by chance: 100 of 9,999 pairs, give or take 10.
    batch = np.empty(10_000, int)
    batch[order] = np.arange(10_000) // 100
    assert 60 < np.sum(batch[1:] == batch[:-1]) < 140


@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluation_order_separates_similar_mnist_neighbours(split, data_dir):
    """Compares the variance of mean brightness over batches of 100 with random batches."""
    if not (data_dir / "mnist").is_dir():
        pytest.skip("needs original data: BNLSTM_DATA_DIR has no mnist")
    arrays = datasets.load("mnist", str(data_dir)).arrays
    brightness, labels = arrays[f"{split}_images"].mean(1), arrays[f"{split}_labels"]
    for digit in range(10):
        brightness[labels == digit] -= brightness[labels == digit].mean()

    def spread(values):
        return values.reshape(-1, 100).mean(1).var() / (values.var() / 100)

    assert spread(brightness) > 10
    # For 100 random batches the ratio is 1, with a standard deviation of 0.14.
    assert spread(brightness[tasks.evaluation_order(10_000)]) < 1.6


def test_batches_apply_the_pixel_order(small_config):
    task = tasks.load(small_config)
    data = datasets.load("digits", small_config.data_dir).arrays
    order = np.random.RandomState(1).permutation(64)
    batch = task.train_batch(4)
    indices = tasks.shuffled_batch(1297, 500, small_config.seed, 4)
    (inputs,) = task.inputs(batch)
    assert inputs.shape == (500, 64, 1)
    np.testing.assert_allclose(inputs[..., 0], data["train_images"][indices][:, order] / 16)
    np.testing.assert_array_equal(batch["label"], data["train_labels"][indices])
    evaluated = tasks.evaluation_order(250)
    together = np.concatenate([b["label"] for b in task.batches("valid", 100, task.readings[0])])
    np.testing.assert_array_equal(together, data["valid_labels"][evaluated])
    assert task.record["pixel_order"] == order.tolist()


def test_metrics_are_sums_over_examples(small_config):
    task = tasks.load(small_config)
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.25, 0.5, 0.25]]))
    metrics = task.metrics(logits, {"label": np.array([0, 1, 1], np.uint8)})
    np.testing.assert_allclose(metrics["loss"], (-np.log(0.7 * 0.3 * 0.5), 3), rtol=1e-6)
    assert jax.device_get(metrics["accuracy"]) == (2, 3)


def test_invalid_fields_raise(small_config):
    small_config.batch_size = 1298
    with pytest.raises(UserError, match=r"config\.batch_size is 1298: it must be at most 1297"):
        tasks.load(small_config)
    small_config.batch_size = 10
    small_config.pixel_order = "permuted"
    with pytest.raises(UserError, match=r"config\.pixel_order.*did you mean permutation"):
        tasks.load(small_config)
    small_config.pixel_order = "permutation"
    small_config.model.max_steps = 65
    with pytest.raises(UserError, match=r"config\.model\.max_steps is 65: .* at most 64"):
        tasks.load(small_config)
    small_config.batch_size = 1
    with pytest.raises(UserError, match=r"config\.batch_size is 1: batch statistics need"):
        tasks.load(small_config)
    small_config.batch_size = 10
    small_config.model.max_steps = 4
    small_config.model.shared_statistics = True
    with pytest.raises(UserError, match=r"config\.model\.max_steps is 4: it must be 0"):
        tasks.load(small_config)
    small_config.model.max_steps = 0
    small_config.model.implementation = "tpu"
    with pytest.raises(UserError, match=r"implementation is tpu, which needs .*cpu.*make it xla"):
        tasks.load(small_config)
    small_config.task = "sequential_image"
    with pytest.raises(UserError, match=r"config\.task.*did you mean sequential_images"):
        tasks.load(small_config)


@pytest.mark.parametrize("kind", ["lstm", "bn_lstm"])
def test_gpu_kernel_supports_only_lstm_across_devices(small_config, kind):
    model = small_config.model
    model.kind, model.implementation = kind, "gpu"
    layer = layers.recurrent_layer(model, 16, axis_name="member")
    with emulation():
        if kind == "lstm":
            assert layers.implementation_of(layer, batch_size=10) == "gpu"
            assert layers.implementation_of(layer, batch_size=1000) == "xla"
        else:
            with pytest.raises(UserError, match=r"axis_name.* config\.parallel\.devices 1"):
                layers.implementation_of(layer, batch_size=10)


def test_implementation_reports_the_cpu_kernel_threads(small_config, monkeypatch):
    small_config.model.implementation = "cpu"
    layer = layers.recurrent_layer(small_config.model, 16)
    for threads, end in (("1", ", 1 thread"), ("3", ", 3 threads")):
        monkeypatch.setenv("BNLSTM_NUM_THREADS", threads)
        assert layers.implementation_of(layer, 10) == f"cpu, {cpu.instruction_set()}{end}"
    monkeypatch.setenv("BNLSTM_NUM_THREADS", "all")
    with pytest.raises(UserError, match="BNLSTM_NUM_THREADS: expected 1 to 4096 threads"):
        layers.implementation_of(layer, 10)


@pytest.mark.parametrize(
    "kind, dtype, why",
    [("ln_lstm", "float32", "layer normalisation"), ("lstm", "float16", "dtype float16")],
)
def test_unsupported_implementations_raise(small_config, kind, dtype, why):
    model = small_config.model
    model.kind, model.dtype, model.implementation = kind, dtype, "gpu"
    with (
        emulation(),
        pytest.raises(UserError, match=f"implementation is gpu, which .*{why}.*: make it xla"),
    ):
        layers.implementation_of(layers.recurrent_layer(model, 16), batch_size=10)
