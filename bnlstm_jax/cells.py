"""LSTM and BN-LSTM as Flax recurrent cells: the definition that all else here is tested against.

Equations of "Recurrent Batch Normalization" (Cooijmans et al., ICLR 2017), for row vectors:

    LSTM       f, i, o, g = split(h W_h + x W_x + b)                                            (1)
               c' = sigmoid(f) c + sigmoid(i) tanh(g)                                           (2)
               h' = sigmoid(o) tanh(c' + b_c)                                                   (3)

    BN-LSTM    f, i, o, g = split(BN(h W_h; gamma_h, 0) + BN(x W_x; gamma_x, 0) + b)            (6)
               c' = sigmoid(f) c + sigmoid(i) tanh(g)                                           (7)
               h' = sigmoid(o) tanh(BN(c'; gamma_c, b_c))                                       (8)

Along an axis of size 4H the gates stand in the order f, i, o, g: here and everywhere. Statistics
are those of the batch, at each time step separately. The bias b_c in (3) is not in the paper: its
released baseline has it, being the BN-LSTM with each BN left out.

LN-LSTM, to compare with, has layer normalisation (Ba et al., 2016) in each BN's place: statistics
of an example's own features, the four gates of a product together.

The carry is `(c, h)`, as in `flax.linen.LSTMCell`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bnlstm_jax import initializers
from bnlstm_jax.batch_norm import Normalized
from bnlstm_jax.normalization import Moments, Statistics, layer_normalize, statistics_dtype

Carry = tuple[Array, Array]
# Maps the name and the value of a term to what takes its place, and the batch's moments if they
# did it.
Normalizer = Callable[[str, Array], tuple[Array, Moments | None]]


def product(x: Array, kernel: Array, dtype: Any = None) -> Array:
    """`x @ kernel` with operands in `dtype` (their common one if None), summed in float32 or wider.

    Shapes `[..., D]` and `[D, F]` give `[..., F]`; as with `jax.numpy.matmul` both may be stacked.
    """
    dtype = dtype or jnp.promote_types(x.dtype, kernel.dtype)
    return jnp.matmul(
        x.astype(dtype), kernel.astype(dtype), preferred_element_type=statistics_dtype(dtype)
    )


def look_up(symbols: Array, kernel: Array, dtype: Any = None) -> Array:
    """`product(one_hot(symbols), kernel, dtype)` without the one-hot vectors: rows of a table.

    Integers `[...]` in `[0, V)` and a kernel `[V, F]` give `[..., F]`; others, as in
    `flax.linen.Embed`, NaN.
    """
    dtype = dtype or kernel.dtype
    table = kernel.astype(dtype).astype(statistics_dtype(dtype))
    return jnp.take(table, symbols.astype(jnp.int32), axis=0)


@jax.custom_jvp
def gate_activations(x: Array) -> tuple[Array, Array, Array, Array]:
    """`sigmoid(f), sigmoid(i), sigmoid(o), tanh(g)` of pre-activations `[batch, 4H]`.

    All by one tanh, since sigmoid(x) = (1 + tanh(x / 2)) / 2.
    """
    is_gate = jnp.arange(x.shape[-1]) < 3 * x.shape[-1] // 4
    slope = jnp.where(is_gate, 0.5, 1.0).astype(x.dtype)
    return tuple(jnp.split(slope * jnp.tanh(slope * x) + (1 - slope), 4, axis=-1))


@gate_activations.defjvp
def _gate_activations_jvp(primals, tangents):
    # By the four outputs: of the whole row XLA would compute the gradient once for every use of it.
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
    """One step of (BN-)LSTM from its two products: equations 1 to 3, or 6 to 8.

    Args:
      params: the flat parameters of the layer.
      carry: `(c, h)`, each `[batch, H]`.
      recurrent_term: `h W_h`, `[batch, 4H]`.
      input_term: `x W_x`, `[batch, 4H]`.
      normalize: the normalisation of a term, without its shift.
      valid: which rows go on, boolean `[batch, 1]`; the others keep their state. None for all.

    Returns:
      The new carry, and the batch's moments of the terms that were normalised by them.
    """
    c, h = carry
    moments = {}

    def keep_finished(new: Array, old: Array) -> Array:
        return new if valid is None else jnp.where(valid, new, old)

    recurrent_term, moments["recurrent"] = normalize("recurrent", recurrent_term)
    input_term, moments["input"] = normalize("input", input_term)
    f, i, o, g = gate_activations(recurrent_term + input_term + params["bias"])  # (1), (6)
    c = keep_finished(f * c + i * g, c)  # (2), (7)
    cell_term, moments["cell"] = normalize("cell", c)
    if "cell_bias" in params:
        cell_term = cell_term + params["cell_bias"]
    h = keep_finished(o * jnp.tanh(cell_term), h)  # (3), (8)
    return (c, h), moments


def check_terms(field: str, terms: Sequence[str]) -> None:
    """Refuses names of other terms than an LSTM has.

    Raises:
      ValueError: says which.
    """
    if isinstance(terms, str) or set(terms) - {"input", "recurrent", "cell"}:
        raise ValueError(f"{field} is {terms!r}; it is a tuple of 'input', 'recurrent' and 'cell'")


class Recurrence(nn.Module):
    """The fields that all recurrent modules of this package share.

    Attributes:
      features: number of hidden units H.
      input_kernel_init, recurrent_kernel_init: initialisers of the kernels; an LSTM's are
        `[D, 4H]` and `[H, 4H]`.
      initial_hidden_noise: standard deviation of Gaussian noise on the initial hidden state, at
        inference too; a layer draws it from the rng stream `noise`.
      dtype: dtype of the operands of matrix products and of the outputs; sums, statistics and
        state stay float32. By default that of inputs and parameters.
      param_dtype: dtype of the parameters.
    """

    features: int
    input_kernel_init: initializers.Initializer = initializers.semi_orthogonal()
    recurrent_kernel_init: initializers.Initializer = initializers.semi_orthogonal()
    initial_hidden_noise: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    # No normalisation: of none of the terms. The normalised modules say otherwise.
    normalize = ()
    use_running_average = None

    @property
    def batch_terms(self) -> Sequence[str]:
        """The terms that statistics of the batch normalise."""
        return ()

    def zeros(self, name: str) -> Array:
        """A parameter `[H]` that starts at zero."""
        return self.param(name, nn.initializers.zeros_init(), (self.features,), self.param_dtype)

    def initial_value(self, learned: str | None, batch: tuple[int, ...]) -> Array:
        """A learned initial state for every example, `[*batch, H]`; zeros in an unbound module."""
        value = jnp.zeros(self.features, self.param_dtype)
        if learned and self.scope is not None:
            value = getattr(self, learned)
        value = value.astype(statistics_dtype(self.param_dtype))
        return jnp.broadcast_to(value, (*batch, self.features))

    def initial_hidden_state(
        self, batch: tuple[int, ...], key: Array | None, centered: bool = False
    ) -> Array:
        """The learned initial hidden state, with noise if there is to be any, `[*batch, H]`.

        `centered`: the first recurrent term is to be normalised by the batch's statistics. They
        take away what all examples share, so the learned state has no effect and no gradient.
        Saying so keeps rounding errors, which Adam would make full steps of, out of it.
        """
        h = self.initial_value("initial_hidden", batch)
        if centered:
            h = jax.lax.stop_gradient(h)
        if self.initial_hidden_noise > 0:
            h = initializers.initial_noise(key, h, self.initial_hidden_noise)
        return h

    @nn.nowrap
    def normalizer(self, params: dict[str, Array], *args: Any, **kwargs: Any) -> Normalizer:
        """What `lstm_step` is to do to its terms: nothing, where none is normalised."""
        return lambda term, x: (x, None)

    @nn.nowrap
    def output(self, hidden: Array) -> Array:
        """The hidden state in the dtype of outputs."""
        return hidden.astype(self.dtype or hidden.dtype)


class LSTMParameters(Recurrence):
    """The parameters of one LSTM, which cell and layer share, and its initial state.

    Attributes:
      bias_init: initialiser of the bias `[4H]`.
      bias_factor: what the bias is multiplied by. The released reader adds it twice, which doubles
        its learning rate.
      use_cell_bias: add b_c, in (3) or (8).
      initial_hidden_init: initialiser of the learned initial hidden state `[H]`.
      learn_initial_cell: learn the initial cell state, from zero; else it stays there.
    """

    bias_init: initializers.Initializer = initializers.forget_bias(1.0)
    bias_factor: float = 1.0
    use_cell_bias: bool = True
    initial_hidden_init: initializers.Initializer = nn.initializers.zeros_init()
    learn_initial_cell: bool = True

    def setup(self) -> None:
        """Makes the learned initial state."""
        self.initial_hidden = self.param(
            "initial_hidden", self.initial_hidden_init, (self.features,), self.param_dtype
        )
        if self.learn_initial_cell:
            self.initial_cell = self.zeros("initial_cell")

    def lstm_params(self, input_size: int) -> dict[str, Array]:
        """The parameters that a step uses, under the names they have in the variables."""
        check_terms("normalize", self.normalize)
        units, gates = self.features, 4 * self.features
        zeros = nn.initializers.zeros_init()
        shapes = {
            "input_kernel": (self.input_kernel_init, (input_size, gates)),
            "recurrent_kernel": (self.recurrent_kernel_init, (units, gates)),
            "bias": (self.bias_init, (gates,)),
        }
        if self.use_cell_bias:
            shapes["cell_bias"] = (zeros, (units,))
        for term in self.normalize:
            shapes[f"{term}_scale"] = (self.scale_init, (self.term_size(term),))
        params = {
            name: self.param(name, init, shape, self.param_dtype)
            for name, (init, shape) in shapes.items()
        }
        params["bias"] = self.bias_factor * params["bias"]
        return params

    @nn.nowrap
    def term_size(self, term: str) -> int:
        """Number of features of a normalised term."""
        return self.features if term == "cell" else 4 * self.features

    def initial_state(
        self, batch: tuple[int, ...], key: Array | None, centered: bool = False
    ) -> Carry:
        """The learned initial state for every example, `(c, h)`, each `[*batch, H]`."""
        c = self.initial_value("initial_cell" if self.learn_initial_cell else None, batch)
        return c, self.initial_hidden_state(batch, key, centered)


class BatchNormParameters(Normalized, Recurrence):
    """What batch-normalised cells and layers share."""

    @property
    def batch_terms(self) -> Sequence[str]:
        """The terms that statistics of the batch normalise: all that are normalised."""
        return self.normalize

    @nn.nowrap
    def epsilon_of(self, term: str) -> float:
        """What is added to the variance of a term."""
        return self.epsilon

    @nn.nowrap
    def normalizer(
        self,
        params: dict[str, Array],
        given: dict[str, Statistics] | None,
        where: dict[str, Array | None] | None = None,
        axis: tuple[int, ...] = (-2,),
        moments: dict[str, Moments | None] | None = None,
    ) -> Normalizer:
        """Equation 5 without its shift, by the statistics `given`, or the batch's own if None.

        `where` says for each term which rows count; `moments` are those of the batch, where they
        are known.
        """

        def normalize(term: str, x: Array) -> tuple[Array, Moments | None]:
            if term not in self.normalize:
                return x, None
            return self.normalized(
                x,
                params[f"{term}_scale"],
                None if given is None else given[term],
                self.epsilon_of(term),
                None if where is None else where[term],
                axis,
                None if moments is None else moments[term],
            )

        return normalize


class BNLSTMParameters(BatchNormParameters, LSTMParameters):
    """What the batch-normalised LSTM's cell and layer share.

    Attributes:
      normalize: which terms are normalised, of `input`, `recurrent` and `cell`. A term left out
        enters as it is and has neither scale nor statistics.
      input_epsilon: `epsilon` of the input term, where that is another.
    """

    normalize: Sequence[str] = ("input", "recurrent", "cell")
    input_epsilon: float | None = None

    @nn.nowrap
    def epsilon_of(self, term: str) -> float:
        """What is added to the variance of a term."""
        own = term == "input" and self.input_epsilon is not None
        return self.input_epsilon if own else self.epsilon


class LNLSTMParameters(LSTMParameters):
    """What the layer-normalised LSTM's cell and layer share.

    Attributes:
      normalize: which terms are normalised, of `input`, `recurrent` and `cell`. A term left out
        enters as it is and has no scale.
      epsilon: added to the variance.
      scale_init: initialiser of the scales (gamma).
      initial_hidden_init: initialiser of the learned initial hidden state. From zeros, with inputs
        that are zero, all terms stay without variance, and gradients grow beyond all bounds.
    """

    normalize: Sequence[str] = ("input", "recurrent", "cell")
    epsilon: float = 1e-5
    scale_init: initializers.Initializer = nn.initializers.ones_init()
    initial_hidden_init: initializers.Initializer = nn.initializers.normal(0.1)

    @nn.nowrap
    def normalizer(self, params: dict[str, Array], *args: Any, **kwargs: Any) -> Normalizer:
        """Each example by itself: nothing of the batch, or of running statistics, is needed."""

        def normalize(term: str, x: Array) -> tuple[Array, None]:
            if term not in self.normalize:
                return x, None
            return layer_normalize(x, params[f"{term}_scale"], self.epsilon), None

        return normalize


class LSTMCell(LSTMParameters, nn.RNNCellBase):
    """One step of an LSTM with learned initial state, equations 1 to 3.

    For `flax.linen.RNN` and `flax.linen.scan`. Over whole sequences `bnlstm_jax.LSTM` is faster.
    """

    @nn.nowrap
    def products(
        self, params: dict[str, Array], carry: Carry, inputs: Array
    ) -> tuple[Array, Array]:
        """The recurrent and the input term as they enter a step, each `[batch, 4H]`."""
        recurrent_term = product(carry[1], params["recurrent_kernel"], self.dtype)
        return recurrent_term, product(inputs, params["input_kernel"], self.dtype)

    @nn.compact
    def __call__(self, carry: Carry, inputs: Array) -> tuple[Carry, Array]:
        """`(c, h)` and inputs `[batch, D]` to the new carry and the output h `[batch, H]`."""
        params = self.lstm_params(inputs.shape[-1])
        carry, _ = lstm_step(
            params, carry, *self.products(params, carry, inputs), self.normalizer(params)
        )
        return carry, self.output(carry[1])

    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> Carry:
        """The learned initial state `(c, h)`, each `[batch, H]`, for inputs `[batch, D]`.

        `rng` is used for `initial_hidden_noise` alone. Unbound, a cell gives the initial zeros.
        """
        centered = "recurrent" in self.batch_terms and self.use_running_average is False
        return self.initial_state(input_shape[:-1], rng, centered)

    @property
    def num_feature_axes(self) -> int:
        """Inputs are vectors, so one."""
        return 1


class BNLSTMCell(BNLSTMParameters, LSTMCell):
    """One step of a batch-normalised LSTM, equations 6 to 8.

    The collection `batch_stats` holds running means and variances of one step, each `[F]`. For
    statistics per time step unroll the cell with `variable_axes={'batch_stats': 0}`, in
    `flax.linen.RNN` or `flax.linen.scan`; the layer `bnlstm_jax.BNLSTM` does it by itself, and
    it alone can have its population statistics re-estimated.
    """

    @nn.compact
    def __call__(
        self, carry: Carry, inputs: Array, use_running_average: bool | None = None
    ) -> tuple[Carry, Array]:
        """`(c, h)` and inputs `[batch, D]` to the new carry and the output h `[batch, H]`."""
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        params = self.lstm_params(inputs.shape[-1])
        variables = {
            term: self.statistics_variables((self.term_size(term),), f"{term}_")
            for term in self.normalize
        }
        running = {term: Statistics(*(v.value for v in pair)) for term, pair in variables.items()}
        normalize = self.normalizer(params, running if use_running_average else None)

        carry, moments = lstm_step(params, carry, *self.products(params, carry, inputs), normalize)
        if not use_running_average:
            rows = jnp.array(inputs.shape[0])
            for term in self.normalize:
                batch = moments[term].statistics((-2,))
                self.update_statistics(variables[term], batch, rows, f"{term}_")
        return carry, self.output(carry[1])


class LNLSTMCell(LNLSTMParameters, LSTMCell):
    """One step of a layer-normalised LSTM."""


class BNSimpleCell(BatchNormParameters, nn.RNNCellBase):
    """One step of a tanh RNN whose pre-activation is normalised as a whole.

        h' = tanh(BN(h W_h + x W_x; gamma, b))

    The network of the paper's figure on gradient flow. Parameters `input_kernel [D, H]`,
    `recurrent_kernel [H, H]`, `joint_scale [H]`, `bias [H]`, `initial_hidden [H]`; statistics
    `joint_mean`, `joint_var`, each `[H]`. The carry is h.

    In the figure W_h starts as the identity.
    """

    normalize = ("joint",)

    def setup(self) -> None:
        """Makes the learned initial state."""
        self.initial_hidden = self.zeros("initial_hidden")

    @nn.compact
    def __call__(
        self, carry: Array, inputs: Array, use_running_average: bool | None = None
    ) -> tuple[Array, Array]:
        """h `[batch, H]` and inputs `[batch, D]` to the new h, as carry and as output."""
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        shape = (self.features,)
        input_kernel = self.param(
            "input_kernel",
            self.input_kernel_init,
            (inputs.shape[-1], self.features),
            self.param_dtype,
        )
        recurrent_kernel = self.param(
            "recurrent_kernel", self.recurrent_kernel_init, shape * 2, self.param_dtype
        )
        bias = self.zeros("bias")
        scale = self.param("joint_scale", self.scale_init, shape, self.param_dtype)
        variables = self.statistics_variables(shape, "joint_")
        running = {"joint": Statistics(*(v.value for v in variables))}

        total = product(carry, recurrent_kernel, self.dtype) + product(
            inputs, input_kernel, self.dtype
        )
        normalize = self.normalizer(
            {"joint_scale": scale}, running if use_running_average else None
        )
        joint, moments = normalize("joint", total)
        if not use_running_average:
            batch, rows = moments.statistics((-2,)), jnp.array(inputs.shape[0])
            self.update_statistics(variables, batch, rows, "joint_")
        h = jnp.tanh(joint + bias)
        return h, self.output(h)

    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> Array:
        """The learned initial state `[batch, H]` for inputs `[batch, D]`."""
        centered = self.use_running_average is False
        return self.initial_hidden_state(input_shape[:-1], rng, centered)

    @property
    def num_feature_axes(self) -> int:
        """Inputs are vectors, so one."""
        return 1
