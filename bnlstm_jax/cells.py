"""Recurrent cells for Flax: LSTM, BN-LSTM, LN-LSTM, and a batch-normalised tanh RNN.

Equations of "Recurrent Batch Normalization" (Cooijmans et al., ICLR 2017), for row vectors:

    LSTM       f, i, o, g = split(h W_h + x W_x + b)                                            (1)
               c' = sigmoid(f) c + sigmoid(i) tanh(g)                                           (2)
               h' = sigmoid(o) tanh(c' + b_c)                                                   (3)

    BN-LSTM    f, i, o, g = split(BN(h W_h; gamma_h, 0) + BN(x W_x; gamma_x, 0) + b)            (6)
               c' = sigmoid(f) c + sigmoid(i) tanh(g)                                           (7)
               h' = sigmoid(o) tanh(BN(c'; gamma_c, b_c))                                       (8)

In the whole library, an axis of size 4H has the gates in the order f, i, o, g. BN uses the batch
statistics of each time step separately. The bias b_c in (3) is not in the paper. The paper's
released baseline has it, because it is the BN-LSTM with each BN left out.

LN-LSTM, for comparison, has layer normalisation (Ba et al., 2016) in place of each BN: moments over
an example's features, the four gates of a product together.

The carry is `(c, h)`, as in `flax.linen.LSTMCell`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bnlstm_jax.batch_norm import (
    check_fields,
    check_rows,
    normalizes_by_running,
    pooled_axis,
    running_statistics,
    update_statistics,
)
from bnlstm_jax.initializers import Initializer, forget_bias, semi_orthogonal
from bnlstm_jax.normalization import Moments, Normalization, Statistics, along, statistics_dtype

Carry = tuple[Array, Array]
# Maps the name and the value of a term to its normalised value and the batch's moments, or None.
Normalizer = Callable[[str, Array], tuple[Array, Moments | None]]
TERMS = ("input", "recurrent", "cell")


@dataclasses.dataclass(frozen=True)
class Variant:
    """Departures from the equations, as in the paper's released Attentive Reader.

    Attributes:
      bias_factor: factor of b. The released reader adds b twice, which doubles its learning rate.
      cell_bias: whether b_c is added in (3) and (8).
      learned_cell: whether the initial cell state is learned, starting at zero; else it is zero.
      input_epsilon: overrides `epsilon` for the input term.
    """

    bias_factor: float = 1.0
    cell_bias: bool = True
    learned_cell: bool = True
    input_epsilon: float | None = None


def product(x: Array, kernel: Array, dtype: Any = None) -> Array:
    """`x @ kernel` with operands in `dtype` (default: promoted), summed in float32 or wider.

    Shapes `[..., D]` and `[D, F]` give `[..., F]`; as in `jax.numpy.matmul` both may be stacked.
    """
    dtype = dtype or jnp.result_type(x, kernel)  # NumPy's float64 becomes JAX's default float
    x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    return jnp.matmul(x, kernel, preferred_element_type=statistics_dtype(dtype))


def as_symbols(symbols: Array, size: int) -> Array:
    """Converts integers of any width to int32; those outside `[0, size)` become -1."""
    # Compared in 32 bits or more: 8 bits may not hold `size`, and 64 bits would wrap around in 32.
    wide = symbols.astype(jnp.promote_types(symbols.dtype, jnp.int32))
    return jnp.where((wide >= 0) & (wide < size), wide, -1).astype(jnp.int32)


def look_up(symbols: Array, kernel: Array, dtype: Any = None) -> Array:
    """Rows of the kernel, equal to `product(one_hot(symbols), kernel, dtype)`.

    Integers `[...]` in `[0, V)` and a kernel `[V, F]` give `[..., F]`; other integers give NaN.
    """
    dtype = dtype or kernel.dtype
    table = kernel.astype(dtype).astype(statistics_dtype(dtype))
    symbols = as_symbols(symbols, len(table))
    rows = jnp.where(symbols < 0, len(table), symbols)  # indices below zero count from the end
    return jnp.take(table, rows, axis=0, mode="fill", fill_value=jnp.nan)


@jax.custom_jvp
def gate_activations(x: Array) -> tuple[Array, Array, Array, Array]:
    """`sigmoid(f), sigmoid(i), sigmoid(o), tanh(g)` of pre-activations `[B, 4H]`.

    One tanh computes all of them: sigmoid(x) = (1 + tanh(x / 2)) / 2.
    """
    is_gate = jnp.arange(x.shape[-1]) < 3 * x.shape[-1] // 4
    slope = along(x, jnp.where(is_gate, 0.5, 1.0).astype(x.dtype))
    f, i, o, g = jnp.split(slope * jnp.tanh(slope * x) + (1 - slope), 4, axis=-1)
    return f, i, o, g


@gate_activations.defjvp
def _gate_activations_jvp(primals, tangents):
    # Uses the four outputs: else XLA recomputes the gradient of the whole row for each use.
    f, i, o, g = gate_activations(*primals)
    slopes = f * (1 - f), i * (1 - i), o * (1 - o), 1 - g * g
    tangents = jnp.split(tangents[0], 4, axis=-1)
    return (f, i, o, g), tuple(map(jnp.multiply, slopes, tangents))


def lstm_step(
    params: dict[str, Array],
    carry: Carry,
    recurrent_term: Array,
    input_term: Array,
    normalize: Normalizer,
    valid: Array | None = None,
) -> tuple[Carry, dict[str, Moments | None]]:
    """One step of an LSTM from its two products: equations 1 to 3, or 6 to 8 if normalised.

    Args:
      params: `bias [4H]` and optionally `cell_bias [H]`; other entries are ignored.
      carry: `(c, h)`, each `[B, H]`.
      recurrent_term, input_term: `h W_h` and `x W_x`, each `[B, 4H]`.
      normalize: normalises a term, given its name and value; adds no shift.
      valid: boolean `[B, 1]`; rows that are not valid keep their state. None if all are valid.

    Returns:
      The new carry, and for each term the batch moments that normalised it, or None.
    """
    c, h = carry
    moments = {}

    def keep_finished(new: Array, old: Array) -> Array:
        return new if valid is None else jnp.where(valid, new, old)

    recurrent_term, moments["recurrent"] = normalize("recurrent", recurrent_term)
    input_term, moments["input"] = normalize("input", input_term)
    bias = along(input_term, params["bias"])
    f, i, o, g = gate_activations(recurrent_term + input_term + bias)  # (1), (6)
    c = keep_finished(f * c + i * g, c)  # (2), (7)
    cell_term, moments["cell"] = normalize("cell", c)
    if "cell_bias" in params:
        cell_term = cell_term + along(cell_term, params["cell_bias"])
    h = keep_finished(o * jnp.tanh(cell_term), h)  # (3), (8)
    return (c, h), moments


def check_terms(field: str, terms: Sequence[str]) -> None:
    """Raises a ValueError if a field is not a tuple or list of an LSTM's terms."""
    if not isinstance(terms, tuple | list) or set(terms) - set(TERMS):
        raise ValueError(
            f"{field}: expected a tuple of 'input', 'recurrent', 'cell', got {terms!r}"
        )


def check_rank(cell: nn.Module, inputs: Array) -> None:
    """Raises a ValueError if inputs are not a batch of vectors."""
    if inputs.ndim != 2:
        name, shape = type(cell).__name__, list(inputs.shape)
        raise ValueError(f"{name}: expected inputs [batch, features], got {shape}")


def make_param(module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...]) -> Array:
    """A parameter in the module's `param_dtype`; 16-bit ones are initialised in float32."""

    def init_wide(key: Array) -> Any:
        wide = init(key, shape, statistics_dtype(module.param_dtype))
        # The array may be boxed, as by `flax.linen.with_partitioning`.
        return jax.tree.map(lambda x: x.astype(module.param_dtype), wide)

    return module.param(name, init_wide)


def term_size(module: nn.Module, term: str) -> int:
    """Number of features F of a term: H for the cell, else 4H."""
    return module.features if term == "cell" else 4 * module.features


def lstm_params(module: nn.Module, input_size: int, terms: Sequence[str] = ()) -> dict[str, Array]:
    """The parameters of a step by name, for inputs of D features.

    `input_kernel [D, 4H]`, `recurrent_kernel [H, 4H]`, `bias [4H]`, `cell_bias [H]`, and the scale
    of each normalised term, `{term}_scale [F]`.

    Raises:
      ValueError: `terms`, the module's `normalize`, contains a name that is not a term.
    """
    check_terms("normalize", terms)
    units, gates = module.features, 4 * module.features
    made = {
        "input_kernel": (module.input_kernel_init, (input_size, gates)),
        "recurrent_kernel": (module.recurrent_kernel_init, (units, gates)),
        "bias": (module.bias_init, (gates,)),
    }
    if module.variant.cell_bias:
        made["cell_bias"] = (nn.initializers.zeros_init(), (units,))
    for term in terms:
        made[f"{term}_scale"] = (module.scale_init, (term_size(module, term),))
    params = {name: make_param(module, name, *how) for name, how in made.items()}
    params["bias"] = module.variant.bias_factor * params["bias"]
    return params


def initial_params(module: nn.Module) -> tuple[Array | None, Array]:
    """The learned `initial_cell` (None if it is not learned) and `initial_hidden`, each `[H]`.

    The modules' `setup` calls it.

    Raises:
      ValueError: a field is out of range.
    """
    check_fields(module)
    shape, zeros = (module.features,), nn.initializers.zeros_init()
    hidden = make_param(module, "initial_hidden", module.initial_hidden_init, shape)
    if not module.variant.learned_cell:
        return None, hidden
    return make_param(module, "initial_cell", zeros, shape), hidden


def initial_state(
    module: nn.Module, batch: tuple[int, ...], key: Array | None, centered: bool | Array = False
) -> Carry:
    """The initial `(c, h)` of an LSTM, each `[*batch, H]`; zeros for an unbound module.

    Args:
      module: if bound, its attributes hold the learned state of `initial_params`.
      batch: sizes of the batch axes.
      key: key of `initial_hidden_noise`; None without noise.
      centered: boolean, or `[*batch, 1]`: rows whose first recurrent term is normalised by batch
        moments. Normalisation removes the learned hidden state, which is equal in all rows, so its
        exact gradient is zero. Here it has none, because Adam would turn the rounding errors of a
        computed gradient into full steps.
    """

    def broadcast(name: str) -> Array:
        learned = getattr(module, name, None) if module.scope is not None else None
        state = jnp.zeros(module.features, module.param_dtype) if learned is None else learned
        state = state.astype(statistics_dtype(module.param_dtype))
        return jnp.broadcast_to(state, (*batch, module.features))

    c, h = broadcast("initial_cell"), broadcast("initial_hidden")
    if centered is not False:
        h = jnp.where(centered, jax.lax.stop_gradient(h), h)
    if module.initial_hidden_noise > 0:
        if key is None:
            raise ValueError("rng: expected a key for initial_hidden_noise, got None")
        h += module.initial_hidden_noise * jax.random.normal(key, h.shape, h.dtype)
    return c, h


def cell_step(
    module: nn.Module,
    params: dict[str, Array],
    carry: Carry,
    inputs: Array,
    norm: Normalization,
    statistics: dict[str, Statistics] | None = None,
) -> tuple[Carry, Array, dict[str, Moments | None]]:
    """Carry, output and moments of one step of an LSTM's cell; see `lstm_step`."""
    normalize = functools.partial(norm.apply, params=params, statistics=statistics)
    recurrent_term = product(carry[1], params["recurrent_kernel"], module.dtype)
    input_term = product(inputs, params["input_kernel"], module.dtype)
    carry, moments = lstm_step(params, carry, recurrent_term, input_term, normalize)
    return carry, carry[1].astype(module.dtype or carry[1].dtype), moments


class RecurrentCell(nn.RNNCellBase):
    """Base class of LSTMCell, BNLSTMCell and LNLSTMCell, which declare its fields."""

    def setup(self) -> None:
        """Makes the learned initial state."""
        self.initial_cell, self.initial_hidden = initial_params(self)

    @nn.nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> Carry:
        """The learned initial `(c, h)`, each `[B, H]`, for inputs `[B, D]`; zeros if unbound.

        To get the learned state, pass the variables::

            cell.apply(variables, rng, input_shape, method="initialize_carry")

        Args:
          rng: key of `initial_hidden_noise`.
          input_shape: shape of the inputs of one step.
        """
        return initial_state(self, input_shape[:-1], rng)

    @property
    def num_feature_axes(self) -> int:
        """Inputs are vectors."""
        return 1


class LSTMCell(RecurrentCell):
    """One step of an LSTM with a learned initial state, equations 1 to 3.

    Use it with `flax.linen.RNN` or `flax.linen.scan`. For whole sequences, `bnlstm_jax.LSTM` is
    faster.

    Attributes:
      features: number of hidden units H.
      input_kernel_init, recurrent_kernel_init, bias_init: initialisers of `input_kernel [D, 4H]`,
        `recurrent_kernel [H, 4H]`, `bias [4H]`.
      initial_hidden_init: initialiser of the learned initial hidden state `[H]`.
      initial_hidden_noise: standard deviation of Gaussian noise on the initial hidden state, at
        inference too.
      variant: departures from the equations; see `bnlstm_jax.Variant`.
      dtype: dtype of the output and of the operands of matrix products. By default, the operands of
        a product have their promoted dtype, and the output is in float32 or wider.
      param_dtype: dtype of the parameters. The state is in float32 or wider.
    """

    features: int
    input_kernel_init: Initializer = semi_orthogonal()
    recurrent_kernel_init: Initializer = semi_orthogonal()
    bias_init: Initializer = forget_bias(1.0)
    initial_hidden_init: Initializer = nn.initializers.zeros_init()
    initial_hidden_noise: float = 0.0
    variant: Variant = Variant()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, carry: Carry, inputs: Array) -> tuple[Carry, Array]:
        """Maps `(c, h)` and inputs `[B, D]` to the new carry and the output h `[B, H]`."""
        params = lstm_params(self, inputs.shape[-1])
        carry, output, _ = cell_step(self, params, carry, inputs, Normalization())
        return carry, output


class BNLSTMCell(RecurrentCell):
    """One step of a batch-normalised LSTM, equations 6 to 8.

    The collection `batch_stats` holds the running statistics of one step,
    `{input,recurrent,cell}_{mean,var}`, each `[F]`: F is H for the cell, else 4H. For statistics
    per time step, use the cell in `flax.linen.RNN` or `flax.linen.scan` with these axes::

        nn.RNN(cell, variable_axes={"batch_stats": 0, "current_batch_stats": 0})

    `bnlstm_jax.estimate_population_statistics` needs `current_batch_stats`. The layer
    `bnlstm_jax.BNLSTM` keeps statistics per time step by itself.

    Under `flax.linen.RNN`, set `use_running_average` as a field, because RNN does not pass the
    argument on. With RNN's `seq_lengths`, padding counts in batch statistics. With
    `initial_hidden_noise`, pass an `init_key` in each call: RNN's default key is a constant.

    Attributes:
      features: number of hidden units H.
      normalize: the terms to normalise, a subset of `input`, `recurrent` and `cell`. Other terms
        are used as they are, and have neither scale nor statistics.
      use_running_average: if True, normalise by `batch_stats` (inference), else by the batch's own
        moments (training). Set it here or in the call.
      momentum: decay rate of the running averages.
      epsilon: added to variances.
      axis_name: mapped axis over which batch statistics are pooled.
      scale_init: initialiser of the scales (gamma); 0.1 in the paper.
      input_kernel_init, recurrent_kernel_init, bias_init: initialisers of `input_kernel [D, 4H]`,
        `recurrent_kernel [H, 4H]`, `bias [4H]`.
      initial_hidden_init: initialiser of the learned initial hidden state `[H]`.
      initial_hidden_noise: standard deviation of Gaussian noise on the initial hidden state, at
        inference too.
      variant: departures from the equations; see `bnlstm_jax.Variant`.
      dtype: dtype of the output and of the operands of matrix products. By default, the operands of
        a product have their promoted dtype, and the output is in float32 or wider.
      param_dtype: dtype of the parameters. Statistics and state are in float32 or wider.
    """

    features: int
    normalize: Sequence[str] = TERMS
    use_running_average: bool | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    axis_name: str | None = None
    scale_init: Initializer = nn.initializers.constant(0.1)
    input_kernel_init: Initializer = semi_orthogonal()
    recurrent_kernel_init: Initializer = semi_orthogonal()
    bias_init: Initializer = forget_bias(1.0)
    initial_hidden_init: Initializer = nn.initializers.zeros_init()
    initial_hidden_noise: float = 0.0
    variant: Variant = Variant()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, carry: Carry, inputs: Array, use_running_average: bool | None = None
    ) -> tuple[Carry, Array]:
        """Maps `(c, h)` and inputs `[B, D]` to the new carry and the output h `[B, H]`.

        `use_running_average` is as the attribute; set exactly one of the two.
        """
        # A cell that normalises nothing needs no choice of statistics.
        use_running_average = not self.normalize or normalizes_by_running(self, use_running_average)
        check_rank(self, inputs)
        params = lstm_params(self, inputs.shape[-1], self.normalize)
        norm = Normalization(
            tuple(self.normalize),
            epsilon=self.epsilon,
            input_epsilon=self.variant.input_epsilon,
            axis_name=pooled_axis(self, use_running_average),
            analytic=False,
        )
        if not use_running_average:
            check_rows(self, inputs.shape[0])
        running = {
            term: running_statistics(self, (term_size(self, term),), f"{term}_")
            for term in norm.terms
        }
        statistics = running if use_running_average else None
        carry, output, moments = cell_step(self, params, carry, inputs, norm, statistics)
        if not use_running_average:
            rows = jnp.array(inputs.shape[0])
            for term, batch in moments.items():
                if batch is not None:
                    update_statistics(self, running[term], batch.statistics(), rows, f"{term}_")
        return carry, output

    @nn.nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> Carry:
        """The learned initial `(c, h)`, each `[B, H]`, for inputs `[B, D]`; zeros if unbound.

        `rng` is the key of `initial_hidden_noise`. If the recurrent term is normalised and the
        field `use_running_average` is False, h has no gradient: batch normalisation removes it.
        """
        centered = "recurrent" in self.normalize and self.use_running_average is False
        return initial_state(self, input_shape[:-1], rng, centered)


class LNLSTMCell(RecurrentCell):
    """One step of a layer-normalised LSTM.

    Attributes:
      features: number of hidden units H.
      normalize: the terms to normalise, a subset of `input`, `recurrent` and `cell`. Other terms
        are used as they are, and have no scale.
      epsilon: added to variances.
      scale_init: initialiser of the scales (gamma).
      input_kernel_init, recurrent_kernel_init, bias_init: initialisers of `input_kernel [D, 4H]`,
        `recurrent_kernel [H, 4H]`, `bias [4H]`.
      initial_hidden_init: initialiser of the learned initial hidden state `[H]`. With zeros, zero
        inputs would give all terms zero variance, and gradients would explode.
      initial_hidden_noise: standard deviation of Gaussian noise on the initial hidden state, at
        inference too.
      variant: departures from the equations; see `bnlstm_jax.Variant`.
      dtype: dtype of the output and of the operands of matrix products. By default, the operands of
        a product have their promoted dtype, and the output is in float32 or wider.
      param_dtype: dtype of the parameters. Moments and state are in float32 or wider.
    """

    features: int
    normalize: Sequence[str] = TERMS
    epsilon: float = 1e-5
    scale_init: Initializer = nn.initializers.ones_init()
    input_kernel_init: Initializer = semi_orthogonal()
    recurrent_kernel_init: Initializer = semi_orthogonal()
    bias_init: Initializer = forget_bias(1.0)
    initial_hidden_init: Initializer = nn.initializers.normal(0.1)
    initial_hidden_noise: float = 0.0
    variant: Variant = Variant()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, carry: Carry, inputs: Array) -> tuple[Carry, Array]:
        """Maps `(c, h)` and inputs `[B, D]` to the new carry and the output h `[B, H]`."""
        params = lstm_params(self, inputs.shape[-1], self.normalize)
        norm = Normalization(
            tuple(self.normalize), "layer", self.epsilon, self.variant.input_epsilon
        )
        carry, output, _ = cell_step(self, params, carry, inputs, norm)
        return carry, output


class BNSimpleCell(nn.RNNCellBase):
    """One step of a tanh RNN whose pre-activation is normalised as a whole.

        h' = tanh(BN(h W_h + x W_x; gamma, b))

    The paper's figure on gradient flow uses this network, with W_h initialised to the identity. The
    parameters are `input_kernel [D, H]`, `recurrent_kernel [H, H]`, `joint_scale [H]`, `bias [H]`
    and `initial_hidden [H]`; the statistics are `joint_mean` and `joint_var`, each `[H]`. The carry
    is h. For statistics per time step, and for the limits under `flax.linen.RNN`, see `BNLSTMCell`.

    Attributes:
      features: number of hidden units H.
      use_running_average: if True, normalise by `batch_stats` (inference), else by the batch's own
        moments (training). Set it here or in the call.
      momentum: decay rate of the running averages.
      epsilon: added to variances.
      axis_name: mapped axis over which batch statistics are pooled.
      scale_init, input_kernel_init, recurrent_kernel_init: initialisers of `joint_scale` (gamma),
        `input_kernel`, `recurrent_kernel`.
      initial_hidden_noise: standard deviation of Gaussian noise on the initial hidden state, at
        inference too.
      dtype: dtype of the output and of the operands of matrix products. By default, the operands of
        a product have their promoted dtype, and the output is in float32 or wider.
      param_dtype: dtype of the parameters. Statistics and state are in float32 or wider.
    """

    features: int
    use_running_average: bool | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    axis_name: str | None = None
    scale_init: Initializer = nn.initializers.constant(0.1)
    input_kernel_init: Initializer = semi_orthogonal()
    recurrent_kernel_init: Initializer = semi_orthogonal()
    initial_hidden_noise: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Makes the learned initial state."""
        check_fields(self)
        self.initial_hidden = self._param("initial_hidden", nn.initializers.zeros_init())

    @nn.compact
    def __call__(
        self, carry: Array, inputs: Array, use_running_average: bool | None = None
    ) -> tuple[Array, Array]:
        """Maps h `[B, H]` and inputs `[B, D]` to the new h, which is both carry and output.

        `use_running_average` is as the attribute; set exactly one of the two.
        """
        use_running_average = normalizes_by_running(self, use_running_average)
        check_rank(self, inputs)
        if not use_running_average:
            check_rows(self, inputs.shape[0])
        input_kernel = self._param("input_kernel", self.input_kernel_init, inputs.shape[-1])
        recurrent_kernel = self._param(
            "recurrent_kernel", self.recurrent_kernel_init, self.features
        )
        bias = self._param("bias", nn.initializers.zeros_init())
        scale = {"joint_scale": self._param("joint_scale", self.scale_init)}
        running = running_statistics(self, (self.features,), "joint_")
        statistics = {"joint": running} if use_running_average else None
        norm = Normalization(
            ("joint",),
            epsilon=self.epsilon,
            axis_name=pooled_axis(self, use_running_average),
            analytic=False,
        )

        total = product(carry, recurrent_kernel, self.dtype)
        total += product(inputs, input_kernel, self.dtype)
        joint, moments = norm.apply("joint", total, scale, statistics)
        if moments is not None:
            rows = jnp.array(inputs.shape[0])
            update_statistics(self, running, moments.statistics(), rows, "joint_")
        h = jnp.tanh(joint + along(joint, bias))
        return h, h.astype(self.dtype or h.dtype)

    @nn.nowrap
    def _param(self, name: str, init: Initializer, *rows: int) -> Array:
        """A parameter `[*rows, H]`."""
        return make_param(self, name, init, (*rows, self.features))

    @nn.nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> Array:
        """The learned initial state `[B, H]` for inputs `[B, D]`; zeros if unbound.

        `rng` is the key of `initial_hidden_noise`.
        """
        return initial_state(self, input_shape[:-1], rng, self.use_running_average is False)[1]

    @property
    def num_feature_axes(self) -> int:
        """Inputs are vectors."""
        return 1
