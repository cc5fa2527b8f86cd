"""LSTM, BN-LSTM and LN-LSTM over whole sequences.

On sequences of equal length, the layers compute the same as the cells of `bnlstm_jax.cells` under
`flax.linen.RNN`, and are faster; see `bnlstm_jax.recurrence`. Unlike its cell, BNLSTM masks
statistics by `seq_lengths`, and at inference uses the last time step's statistics past `max_steps`.

The layers take the call arguments of `flax.linen.RNN`, and work in `flax.linen.Bidirectional`. In
this file, arrays are time-major: `[T, B, F]`.
"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnlstm_jax import recurrence
from bnlstm_jax.batch_norm import (
    check_rows,
    normalizes_by_running,
    pooled_axis,
    refuse_arrays,
    running_statistics,
    update_statistics,
)
from bnlstm_jax.cells import (
    TERMS,
    Carry,
    Variant,
    check_terms,
    initial_params,
    initial_state,
    lstm_params,
    term_size,
)
from bnlstm_jax.initializers import Initializer, forget_bias, semi_orthogonal
from bnlstm_jax.normalization import (
    Normalization,
    Statistics,
    statistics_dtype,
    varying_alike,
)
from bnlstm_jax.recurrence.problem import Problem


class RecurrentLayer(nn.Module):
    """Base class of LSTM, BNLSTM and LNLSTM, which declare its fields."""

    def setup(self) -> None:
        """Makes the learned initial state."""
        self.initial_cell, self.initial_hidden = initial_params(self)

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        use_running_average: bool | None = None,
        *,
        initial_carry: Carry | None = None,
        init_key: Array | None = None,
        first_step: Array | int | None = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Array | tuple[Carry, Array]:
        """Maps sequences `[batch, time, input]` to outputs `[batch, time, features]`.

        Args:
          inputs: sequences `[batch, time, input]`, or `[time, batch, input]` if `time_major`. With
            `vocab_size`, integers without the last axis.
          use_running_average: as the attribute of BNLSTM; set exactly one of the two. LSTM and
            LNLSTM ignore it, so that a model can use any of the three layers.
          initial_carry: `(c, h)`, each `[batch, features]`; None for the learned state.
          init_key: key of `initial_hidden_noise`; None for the rng stream `noise`.
          first_step: number of time steps before these inputs, if a long sequence is run in pieces:
            inference then uses the statistics of the steps from `first_step` on. Pass the carry of
            the previous piece as `initial_carry`.
          seq_lengths: number of valid steps of each sequence, integers `[batch]`, clipped to
            `[0, time]`; None if all steps are valid. In the padding after its valid steps, a
            sequence keeps its state, and its outputs repeat the last hidden state. Values of the
            padding have no effect, unless BNLSTM's `mask_statistics` counts them.
          return_carry, time_major, reverse, keep_order: override the attributes.

        Returns:
          The outputs h, or with `return_carry` a tuple of the carry `(c, h)` after the last valid
          step and the outputs.

        Raises:
          ValueError: a field is out of range, an argument has the wrong shape or dtype, or the
            implementation does not support the layer. Under batch statistics, also if the batch has
            one sequence, if `first_step` is not zero, or if, without `max_steps`, a sequence is
            longer than the one that initialised the layer.
          TypeError: `inputs` is not an array, or `use_running_average` is an array, a list or, for
            BNLSTM, not a boolean.
          RuntimeError: the kernel that `implementation` names cannot be compiled.
        """
        call = _Call(
            initial_carry,
            init_key,
            first_step,
            seq_lengths,
            use_running_average,
            return_carry=self.return_carry if return_carry is None else return_carry,
            time_major=self.time_major if time_major is None else time_major,
            reverse=self.reverse if reverse is None else reverse,
            keep_order=self.keep_order if keep_order is None else keep_order,
        )
        return _run(self, inputs, call)


class LSTM(RecurrentLayer):
    """An LSTM over whole sequences, equations 1 to 3.

    Example::

        layer = LSTM(100)
        variables = layer.init(key, x)  # x [batch, time, input]
        y = layer.apply(variables, x)  # y [batch, time, 100]

    The parameters are `input_kernel [D, 4H]`, `recurrent_kernel [H, 4H]`, `bias [4H]`,
    `cell_bias [H]`, and the initial state `initial_cell [H]` and `initial_hidden [H]`.
    `flax.linen.LSTMCell` has neither a cell bias nor a learned initial state; see `Variant`.

    Attributes:
      features: number of hidden units H.
      vocab_size: number of symbols V, if inputs are integers in `[0, V)`; None for dense inputs. A
        symbol is equivalent to its one-hot vector. Integers out of range give NaN.
      input_kernel_init, recurrent_kernel_init, bias_init: initialisers of `input_kernel [D, 4H]`
        (or `[V, 4H]`), `recurrent_kernel [H, 4H]`, `bias [4H]`.
      initial_hidden_init: initialiser of the learned initial hidden state `[H]`.
      initial_hidden_noise: standard deviation of Gaussian noise on the initial hidden state, at
        inference too, from the rng stream `noise`.
      variant: departures from the equations; see `bnlstm_jax.Variant`.
      time_major: sequences are `[time, batch, ...]` rather than `[batch, time, ...]`.
      return_carry: return `(carry, outputs)` rather than the outputs alone.
      reverse, keep_order: `reverse` runs each sequence from its last valid step to its first;
        `keep_order` then returns outputs in the order of the inputs.
      unroll: time steps per loop iteration of `xla` and `reference`; no effect on kernels.
      implementation: `auto`, `xla`, `reference`, or a kernel: `cpu`, `gpu` or `tpu`; see
        `bnlstm_jax.recurrence`. `auto` may compile a kernel at its first use, with the system's
        compiler, and keeps it in the user's cache folder. Only `reference` supports forward mode.
        Kernels support only first derivatives. `gpu` leaves batches above 128 to `xla`.
        `jax.export` needs `xla` or `reference`; for gradients in bfloat16, `reference`.
      dtype: dtype of outputs and of the operands of matrix products; by default the promoted dtype
        of inputs and parameters, float32 or wider.
      param_dtype: dtype of the parameters. The state is in float32 or wider.
    """

    features: int
    vocab_size: int | None = None
    input_kernel_init: Initializer = semi_orthogonal()
    recurrent_kernel_init: Initializer = semi_orthogonal()
    bias_init: Initializer = forget_bias(1.0)
    initial_hidden_init: Initializer = nn.initializers.zeros_init()
    initial_hidden_noise: float = 0.0
    variant: Variant = Variant()
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    unroll: int = 1
    implementation: str = "auto"
    dtype: Any = None
    param_dtype: Any = jnp.float32


class LNLSTM(RecurrentLayer):
    """A layer-normalised LSTM over whole sequences, for comparison with BNLSTM.

    Training and inference are the same, and there are no statistics. If inputs have one feature,
    normalisation of the input term keeps only the feature's sign. The parameters are those of LSTM,
    and the scales `input_scale [4H]`, `recurrent_scale [4H]` and `cell_scale [H]`.

    Attributes:
      features: number of hidden units H.
      normalize: the terms to normalise, a subset of `input`, `recurrent` and `cell`. Other terms
        are used as they are, and have no scale.
      epsilon: added to variances.
      scale_init: initialiser of the scales (gamma).
      vocab_size: number of symbols V, if inputs are integers in `[0, V)`; None for dense inputs.
        See `LSTM`.
      input_kernel_init, recurrent_kernel_init, bias_init: initialisers of `input_kernel [D, 4H]`
        (or `[V, 4H]`), `recurrent_kernel [H, 4H]`, `bias [4H]`.
      initial_hidden_init: initialiser of the learned initial hidden state `[H]`. With zeros, zero
        inputs would give all terms zero variance, and gradients would explode.
      initial_hidden_noise: standard deviation of Gaussian noise on the initial hidden state, at
        inference too, from the rng stream `noise`.
      variant: departures from the equations; see `bnlstm_jax.Variant`.
      time_major: sequences are `[time, batch, ...]` rather than `[batch, time, ...]`.
      return_carry: return `(carry, outputs)` rather than the outputs alone.
      reverse, keep_order: `reverse` runs each sequence from its last valid step to its first;
        `keep_order` then returns outputs in the order of the inputs.
      unroll: time steps per loop iteration of `xla` and `reference`; no effect on kernels.
      implementation: `auto`, `xla`, `reference`, or the kernel `tpu`; see `bnlstm_jax.recurrence`.
        Only `reference` supports forward mode. `tpu` supports only first derivatives. `jax.export`
        needs `xla` or `reference`.
      dtype: dtype of outputs and of the operands of matrix products; by default the promoted dtype
        of inputs and parameters, float32 or wider.
      param_dtype: dtype of the parameters. Moments and state are in float32 or wider.
    """

    features: int
    normalize: Sequence[str] = TERMS
    epsilon: float = 1e-5
    scale_init: Initializer = nn.initializers.ones_init()
    vocab_size: int | None = None
    input_kernel_init: Initializer = semi_orthogonal()
    recurrent_kernel_init: Initializer = semi_orthogonal()
    bias_init: Initializer = forget_bias(1.0)
    initial_hidden_init: Initializer = nn.initializers.normal(0.1)
    initial_hidden_noise: float = 0.0
    variant: Variant = Variant()
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    unroll: int = 1
    implementation: str = "auto"
    dtype: Any = None
    param_dtype: Any = jnp.float32


class BNLSTM(RecurrentLayer):
    """A batch-normalised LSTM over whole sequences, equations 6 to 8.

    Example::

        layer = BNLSTM(100, max_steps=784)
        variables = layer.init(key, x, use_running_average=True)
        # Training, then inference.
        y, updated = layer.apply(
            variables, x, use_running_average=False, mutable=["batch_stats"])
        y = layer.apply({**variables, **updated}, x, use_running_average=True)

    The parameters are those of LSTM, and the scales `input_scale [4H]`, `recurrent_scale [4H]` and
    `cell_scale [H]`. The collection `batch_stats` holds the statistics of each time step,
    `{input,recurrent,cell}_{mean,var}`, each `[max_steps, F]`: F is H for the cell, else 4H.
    Training updates them as running averages; `bnlstm_jax.estimate_population_statistics`
    re-estimates them. Inference uses the last row for all steps past `max_steps`. In a reversed
    layer, the first row belongs to the first step of the recurrence. Updated statistics have no
    gradient. `flax.linen.Bidirectional` does not pass `use_running_average` on: set it as a field
    of its layers.

    Attributes:
      features: number of hidden units H.
      max_steps: number of time steps with statistics of their own. Training does not record the
        statistics of later steps. If None, it is the length of the sequence that initialises the
        layer, and longer training sequences raise a ValueError.
      normalize: the terms to normalise, a subset of `input`, `recurrent` and `cell`. Other terms
        are used as they are, and have neither scale nor statistics.
      use_running_average: if True, normalise by `batch_stats` (inference), else by the batch's own
        moments (training). Set it here or in the call.
      momentum: decay rate of the running averages.
      epsilon: added to variances.
      axis_name: axis of `vmap`, `pmap` or `shard_map` over which batch statistics are pooled. With
        `xla`, take gradients within `vmap`: `vmap(grad(...))`. Kernels do not support it in
        training.
      scale_init: initialiser of the scales (gamma); 0.1 in the paper.
      shared_statistics: record one set of statistics `[F]` for all time steps; `max_steps` must be
        None. Training still normalises each step by its own moments. The paper finds statistics per
        time step necessary; this field is for comparison.
      input_statistics: `per_step`, or `sequence` to normalise the input term by moments `[4H]` of
        all time steps together, in training too.
      mask_statistics: count only valid steps of `seq_lengths` in statistics. A tuple of terms
        applies this to those terms only. A time step with one valid sequence has variance 0. If
        False, all steps count, finished sequences with their last state, as in the paper's released
        code.
      vocab_size: number of symbols V, if inputs are integers in `[0, V)`; None for dense inputs.
        See `LSTM`.
      input_kernel_init, recurrent_kernel_init, bias_init: initialisers of `input_kernel [D, 4H]`
        (or `[V, 4H]`), `recurrent_kernel [H, 4H]`, `bias [4H]`.
      initial_hidden_init: initialiser of the learned initial hidden state `[H]`.
      initial_hidden_noise: standard deviation of Gaussian noise on the initial hidden state, at
        inference too, from the rng stream `noise`.
      variant: departures from the equations; see `bnlstm_jax.Variant`.
      time_major: sequences are `[time, batch, ...]` rather than `[batch, time, ...]`.
      return_carry: return `(carry, outputs)` rather than the outputs alone.
      reverse, keep_order: `reverse` runs each sequence from its last valid step to its first;
        `keep_order` then returns outputs in the order of the inputs.
      unroll: time steps per loop iteration of `xla` and `reference`; no effect on kernels.
      implementation: `auto`, `xla`, `reference`, or a kernel: `cpu`, `gpu` or `tpu`; see
        `bnlstm_jax.recurrence`. `auto` may compile a kernel at its first use, with the system's
        compiler, and keeps it in the user's cache folder. Under batch statistics, only `reference`
        supports forward mode and second derivatives. Kernels never do. `tpu` and `gpu` give no
        gradients of running statistics. `gpu` leaves batches above 128 to `xla`. `jax.export` needs
        `xla` or `reference`; for gradients in bfloat16, `reference`.
      dtype: dtype of outputs and of the operands of matrix products; by default the promoted dtype
        of inputs and parameters, float32 or wider.
      param_dtype: dtype of the parameters. Statistics and state are in float32 or wider.
    """

    features: int
    max_steps: int | None = None
    normalize: Sequence[str] = TERMS
    use_running_average: bool | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    axis_name: str | None = None
    scale_init: Initializer = nn.initializers.constant(0.1)
    shared_statistics: bool = False
    input_statistics: str = "per_step"
    mask_statistics: bool | Sequence[str] = True
    vocab_size: int | None = None
    input_kernel_init: Initializer = semi_orthogonal()
    recurrent_kernel_init: Initializer = semi_orthogonal()
    bias_init: Initializer = forget_bias(1.0)
    initial_hidden_init: Initializer = nn.initializers.zeros_init()
    initial_hidden_noise: float = 0.0
    variant: Variant = Variant()
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    unroll: int = 1
    implementation: str = "auto"
    dtype: Any = None
    param_dtype: Any = jnp.float32


Layer = LSTM | LNLSTM | BNLSTM


def abstract_problem(layer: RecurrentLayer, batch: int = 1) -> Problem:
    """A layer's `Problem` of shapes only, for `recurrence.choose` and `why_unsupported`."""
    state: Any = jax.ShapeDtypeStruct((batch, layer.features), statistics_dtype(layer.param_dtype))
    kernel: Any = jax.ShapeDtypeStruct((layer.features, 4 * layer.features), layer.param_dtype)
    norm = normalization(layer)
    return Problem(kernel, {}, (state, state), None, norm=norm, dtype=layer.dtype)


def normalization(layer: RecurrentLayer) -> Normalization:
    """Which terms a layer normalises, and how.

    Raises:
      ValueError: `normalize`, `mask_statistics` or `input_statistics` has an unknown value.
    """
    if isinstance(layer, LSTM):
        return Normalization()
    check_terms("normalize", layer.normalize)
    terms = tuple(layer.normalize)
    if isinstance(layer, LNLSTM):
        return Normalization(terms, "layer", layer.epsilon, layer.variant.input_epsilon)
    masked = layer.mask_statistics
    if isinstance(masked, bool):
        masked = TERMS if masked else ()
    check_terms("mask_statistics", masked)
    if layer.input_statistics not in ("per_step", "sequence"):
        raise ValueError(
            f"input_statistics: expected 'per_step' or 'sequence', got {layer.input_statistics!r}"
        )
    return Normalization(
        terms,
        epsilon=layer.epsilon,
        input_epsilon=layer.variant.input_epsilon,
        masked=tuple(masked),
        whole_input=layer.input_statistics == "sequence",
        axis_name=layer.axis_name,
    )


class _Call(NamedTuple):
    """The arguments of `RecurrentLayer.__call__` except inputs; attributes replace None."""

    initial_carry: Carry | None
    init_key: Array | None
    first_step: Array | int | None
    seq_lengths: Array | None
    use_running_average: bool | None
    return_carry: bool
    time_major: bool
    reverse: bool
    keep_order: bool

    def enter(self, inputs: Array, keep_padding: bool) -> tuple[Array, Array | None]:
        """Inputs in the order of the recurrence, `[T, B, ...]`, and which are valid, `[T, B, 1]`.

        Unless `keep_padding`, padding is set to zero: NaN or infinity would reach the gradients.
        """
        inputs = inputs if self.time_major else jnp.swapaxes(inputs, 0, 1)
        inputs = flip_sequences(inputs, self.seq_lengths) if self.reverse else inputs
        if self.seq_lengths is None:
            return inputs, None
        t = jnp.arange(inputs.shape[0], dtype=jnp.int32)[:, None]
        valid = (t < self.seq_lengths[None])[..., None]
        if not keep_padding:
            inputs = jnp.where(valid if inputs.ndim == 3 else valid[..., 0], inputs, 0)
        return inputs, valid

    def leave(self, carry: Carry, outputs: Array) -> Array | tuple[Carry, Array]:
        """The result of the call, with outputs in the layout of its inputs."""
        if self.reverse and self.keep_order:
            outputs = flip_sequences(outputs, self.seq_lengths)
        outputs = outputs if self.time_major else jnp.swapaxes(outputs, 0, 1)
        return (carry, outputs) if self.return_carry else outputs


def _run(layer: RecurrentLayer, inputs: Array, call: _Call) -> Array | tuple[Carry, Array]:
    """Runs a layer."""
    norm = normalization(layer)
    refuse_arrays(layer, call.use_running_average)
    training = bool(norm.batch_terms) and not normalizes_by_running(layer, call.use_running_average)
    call = _checked(layer, inputs, call, training)
    inputs, valid = call.enter(inputs, keep_padding=training and norm.counts_padding)
    steps, batch = inputs.shape[:2]

    features = inputs.shape[-1] if layer.vocab_size is None else layer.vocab_size
    params = lstm_params(layer, features, norm.terms)
    running = {term: _running(layer, term, steps) for term in norm.batch_terms}
    statistics = None
    if running and not training:
        statistics = {
            term: _at_steps(layer, term, each, call.first_step, steps)
            for term, each in running.items()
        }
    carry, key = call.initial_carry, call.init_key
    if carry is None:
        if key is None and layer.initial_hidden_noise > 0:
            key = layer.make_rng("noise")
        centered = training and _centered(layer, norm, valid, steps)
        carry = initial_state(layer, (batch,), key, centered)

    problem = varying_alike(_problem(layer, norm, params, carry, inputs, valid, statistics))
    name = recurrence.choose(layer.implementation, problem)
    if norm.axis_name is not None:
        axis_name = pooled_axis(layer, not training)
        problem = problem.replace(norm=dataclasses.replace(norm, axis_name=axis_name))
    result = recurrence.run(name, problem)
    if training and steps:
        for term, each in running.items():
            counted = valid if term in norm.masked else None
            count = jnp.full(steps, batch) if counted is None else counted.sum((1, 2))
            _record(layer, term, each, result.moments[term], count)
    return call.leave(result.carry, result.hidden.astype(layer.dtype or result.hidden.dtype))


def _problem(
    layer: RecurrentLayer,
    norm: Normalization,
    params: dict[str, Array],
    carry: Carry,
    inputs: Array,
    valid: Array | None,
    statistics: dict[str, Statistics] | None,
) -> Problem:
    """The layer's recurrence over `inputs`, with arrays in the dtype of its state."""
    params = jax.tree.map(jnp.asarray, params)  # without x64, NumPy's float64 is float32
    state = _state_dtype(layer, inputs, params)
    symbols = layer.vocab_size is not None
    if not symbols and not jnp.issubdtype(inputs.dtype, jnp.floating):
        inputs = inputs.astype(state)
    kernel = params.pop("recurrent_kernel")
    params, carry, statistics = jax.tree.map(lambda x: x.astype(state), (params, carry, statistics))
    return Problem(
        kernel,
        params,
        carry,
        inputs=None if symbols else inputs,
        symbols=inputs if symbols else None,
        valid=valid,
        statistics=statistics,
        norm=norm,
        dtype=layer.dtype,
        unroll=layer.unroll,
    )


def _centered(
    layer: RecurrentLayer, norm: Normalization, valid: Array | None, steps: int
) -> Array | bool:
    """Sequences whose first recurrent term is normalised by batch moments; see `initial_state`.

    A sequence without steps outputs its initial state, whose gradient is then needed. If it counts
    in the moments of the others, gradients cancel only over all sequences together: then no
    sequence is centered.
    """
    if "recurrent" not in norm.terms or not steps:
        return False
    if valid is None:
        return True
    started = valid[0]
    if "recurrent" in norm.masked:
        return started
    all_started = started.all()
    if axis_name := pooled_axis(layer):
        all_started = jax.lax.pmin(all_started.astype(jnp.int32), axis_name) > 0
    return all_started


def _state_dtype(layer: RecurrentLayer, inputs: Array, params: dict[str, Array]) -> jnp.dtype:
    """The dtype of state, moments and statistics in a call: float32, or wider."""
    dtypes = [layer.param_dtype, *([layer.dtype] if layer.dtype else [])]
    dtypes += [param.dtype for param in params.values()]
    if jnp.issubdtype(inputs.dtype, jnp.floating):
        dtypes.append(inputs.dtype)
    return statistics_dtype(jnp.result_type(*map(jnp.dtype, dtypes)))


def _checked(layer: RecurrentLayer, inputs: Array, call: _Call, training: bool) -> _Call:
    """Checks the arguments of a call, and clips lengths to `[0, time]`."""
    name, axes = type(layer).__name__, "time, batch" if call.time_major else "batch, time"
    if not hasattr(inputs, "dtype"):
        got = type(inputs).__name__
        raise TypeError(f"{name}: expected an array of inputs [{axes}, features], got a {got}")
    got = f"got {inputs.dtype}{list(inputs.shape)}"
    if layer.vocab_size is None and inputs.ndim != 3:
        symbols = inputs.ndim == 2 and jnp.issubdtype(inputs.dtype, jnp.integer)
        hint = f"; set vocab_size for symbols [{axes}]" if symbols else ""
        raise ValueError(f"{name}: expected inputs [{axes}, features], {got}{hint}")
    if layer.vocab_size is not None and (
        inputs.ndim != 2 or not jnp.issubdtype(inputs.dtype, jnp.integer)
    ):
        raise ValueError(f"{name} with vocab_size: expected inputs of integers [{axes}], {got}")
    steps, batch = inputs.shape[:2] if call.time_major else inputs.shape[1::-1]
    _check_first_step(call.first_step, training)
    if training:
        check_rows(layer, batch)
    if call.initial_carry is not None:
        shapes = [jnp.shape(state) for state in call.initial_carry]
        if shapes != [(batch, layer.features)] * 2:
            expected = f"(c, h), each [{batch}, {layer.features}]"
            raise ValueError(f"initial_carry: expected {expected}, got shapes {shapes}")
        c, h = call.initial_carry
        call = call._replace(initial_carry=(c, h))
    if call.seq_lengths is None:
        return call
    lengths = call.seq_lengths
    lengths = lengths if isinstance(lengths, Array | np.ndarray) else jnp.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        got = f"{lengths.dtype}{list(lengths.shape)}"
        raise ValueError(f"seq_lengths: expected integers [{batch}], got {got}")
    # In int32: narrower integers may not hold the number of steps. Wider ones would wrap around.
    if lengths.dtype.itemsize >= 4:
        lengths = lengths.clip(0, np.iinfo(np.int32).max)
    return call._replace(seq_lengths=jnp.clip(jnp.asarray(lengths, jnp.int32), 0, steps))


def _check_first_step(first_step: Array | int | None, training: bool) -> None:
    """Raises a ValueError unless `first_step` is None or a number of steps.

    Training allows only None or a constant 0.
    """
    if first_step is None:
        return
    dtype, shape = jnp.result_type(first_step), jnp.shape(first_step)
    if shape or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"first_step: expected an integer, got {dtype}{list(shape)}")
    try:
        known = operator.index(first_step)
    except jax.errors.TracerIntegerConversionError:
        known = None
    if known is not None and known < 0:
        raise ValueError(f"first_step: expected at least 0, got {known}")
    if training and known != 0:
        raise ValueError(
            "first_step: expected None or a constant 0 under batch statistics; run sequences whole"
        )


def flip_sequences(x: Array, seq_lengths: Array | None) -> Array:
    """Reverses `x` `[T, B, ...]` in time; with lengths `[B]`, padding stays at the end."""
    if seq_lengths is None:
        return jnp.flip(x, axis=0)
    t, seq_lengths = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None], seq_lengths[None]
    source = jnp.where(t < seq_lengths, seq_lengths - 1 - t, t)
    return jnp.take_along_axis(x, source.reshape(source.shape + (1,) * (x.ndim - 2)), axis=0)


# ---- Statistics of BNLSTM.


def _is_whole(layer: RecurrentLayer, term: str) -> bool:
    """Whether the moments of a term are of all time steps together."""
    return term == "input" and layer.input_statistics == "sequence"


def _running(layer: RecurrentLayer, term: str, steps: int) -> Statistics:
    """The running statistics of a term; `steps` is the length of this call's sequences."""
    if layer.shared_statistics and layer.max_steps is not None:
        raise ValueError(f"max_steps: expected None with shared_statistics, got {layer.max_steps}")
    per_step = not (layer.shared_statistics or _is_whole(layer, term))
    if per_step and layer.is_initializing() and not (layer.max_steps or steps):
        raise ValueError(
            "max_steps: expected a number if the layer is initialised by sequences without steps"
        )
    shape: tuple[int, ...] = (term_size(layer, term),)
    mean: Any = nn.unbox(layer.get_variable("batch_stats", f"{term}_mean"))
    stored: tuple[int, ...] = getattr(mean, "shape", ())
    if per_step:
        # Without max_steps, stored statistics may have any number of steps.
        rows = stored[0] if len(stored) == 2 and layer.max_steps is None else steps
        shape = (layer.max_steps or rows, *shape)
    if stored and stored != shape:
        raise ValueError(
            f"max_steps={layer.max_steps}, shared_statistics={layer.shared_statistics}, "
            f"input_statistics={layer.input_statistics!r}: expected batch_stats/{term}_mean of the "
            f"shape {list(shape)}, got {list(stored)}"
        )
    return running_statistics(layer, shape, f"{term}_")


def _at_steps(
    layer: RecurrentLayer,
    term: str,
    running: Statistics,
    first_step: Array | int | None,
    steps: int,
) -> Statistics:
    """Running statistics of the steps from `first_step` on; the last row for steps past it."""
    if _is_whole(layer, term):
        return running
    first = jnp.asarray(0 if first_step is None else first_step, jnp.int32)
    t = first + jnp.arange(steps, dtype=jnp.int32)
    mean, var = map(jnp.atleast_2d, running)
    rows = jnp.clip(t, 0, len(mean) - 1)
    return Statistics(mean[rows], var[rows])


def _record(
    layer: RecurrentLayer, term: str, running: Statistics, batch: Statistics, count: Array
) -> None:
    """Updates a term's running statistics with those of the batch, `[T, F]` or `[F]`.

    Steps past the last row of the running statistics are not recorded.
    """
    if batch.mean.ndim == 1:
        count = count.sum()
    elif not layer.shared_statistics:
        rows, steps = running.mean.shape[0], count.shape[0]
        if layer.max_steps is None and steps > rows:
            raise ValueError(
                f"max_steps: expected at most {rows} time steps, as in the sequence that "
                f"initialised the layer, got {steps}; set max_steps"
            )

        def to_rows(x: Array) -> Array:
            x = x[:rows]
            return jnp.pad(x, [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1))

        batch, count = Statistics(*map(to_rows, batch)), to_rows(count)
    update_statistics(layer, running, batch, count, f"{term}_")
