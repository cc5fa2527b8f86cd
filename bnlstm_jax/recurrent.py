"""Whole-sequence layers: the recurrence of `bnlstm_jax.cells` over all time steps.

Equal to the cells under `flax.linen.RNN`, and faster: see `bnlstm_jax.implementations`. Beyond the
cells they mask statistics by `seq_lengths`, and at inference go on past `max_steps` with the last
time step's statistics.

Inside, arrays are time-major: `[T, B, F]`.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bnlstm_jax import cuda_gpu
from bnlstm_jax.cells import (
    BNLSTMParameters,
    Carry,
    LNLSTMParameters,
    LSTMParameters,
    check_terms,
    look_up,
    lstm_step,
    product,
)
from bnlstm_jax.implementations import (
    BY_STEP,
    IMPLEMENTATIONS,
    NAMES,
    choose,
    log_choice,
    reference,
    xla,
)
from bnlstm_jax.normalization import Moments, Statistics, statistics_dtype

# Inputs of up to so many features are multiplied by their kernel in every step, forward and again
# backward: on CPU that takes less time than to write their product `[time, batch, 4H]` to memory
# and read it, and it halves the memory of a training step. Other devices are not measured yet.
SMALL_INPUT = 256


def flip_sequences(x: Array, seq_lengths: Array | None) -> Array:
    """Reverses `x` `[T, B, ...]` in time; with lengths `[B]`, the padding stays at the end."""
    if seq_lengths is None:
        return jnp.flip(x, axis=0)
    t = jnp.arange(x.shape[0])[:, None]
    source = jnp.where(t < seq_lengths, seq_lengths - 1 - t, t)
    return jnp.take_along_axis(x, source.reshape(source.shape + (1,) * (x.ndim - 2)), axis=0)


def at_steps(statistics: Array, t: Array) -> Array:
    """Rows t of statistics `[max_steps, F]`, the last row beyond; `[F]` are for every step."""
    rows = jnp.atleast_2d(statistics)
    return rows[jnp.minimum(t, len(rows) - 1)]


class RecurrentLayer(LSTMParameters):
    """The recurrence of all layers; an LSTM is the case in which no term is normalised.

    Keywords are those of `flax.linen.RNN`, and the layers fit `flax.linen.Bidirectional`.

    Attributes:
      vocab_size: number of symbols V where inputs are integers in `[0, V)`. A symbol stands for its
        one-hot vector, whose product with the input kernel `[V, 4H]` is a row of it.
      time_major: sequences are `[time, batch, ...]` rather than `[batch, time, ...]`.
      return_carry: return `(carry, outputs)` rather than outputs alone.
      reverse: run from the last valid step of each sequence to its first.
      keep_order: with `reverse`, return outputs in the order of the inputs.
      unroll: time steps per iteration of the compiled loop.
      implementation: `xla`, or `reference`, a plain scan that takes more time and memory to
        differentiate, or one kernel for all steps, without `axis_name`: `tpu`, or `gpu` (batches
        of more than 128 are run by `xla` then). `auto` is the kernel for the device at hand where
        its tests have passed on such a device, `xla` elsewhere, and logs which and why. All but
        `reference` are differentiated once, in reverse mode only, and `xla` in a mapped function
        with an `axis_name`: `vmap(grad(...))`. Running statistics take the plain scan in place of
        `xla`; the kernels have no gradients of running statistics.
    """

    vocab_size: int | None = None
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    unroll: int = 1
    implementation: str = "auto"

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        *,
        initial_carry: Carry | None = None,
        init_key: Array | None = None,
        first_step: Array | int | None = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        use_running_average: bool | None = None,
    ) -> Array | tuple[Carry, Array]:
        """Runs over sequences `[batch, time, input]`, giving outputs `[batch, time, features]`.

        Args:
          inputs: the sequences, `[batch, time, input]`, or `[time, batch, input]` if `time_major`;
            with `vocab_size` integers, without the last axis.
          initial_carry: `(c, h)`, each `[batch, features]`; the learned state if None.
          init_key: key of the noise on the initial hidden state; the rng stream `noise` if None.
          first_step: number of time steps run before, for a long sequence that is run in pieces
            with the carry handed on. At inference statistics are those of the steps from there.
          seq_lengths: valid steps of each sequence, integers `[batch]`; all if None.
            From there on a sequence keeps its state, and its outputs repeat the last one.
          return_carry, time_major, reverse, keep_order: override the attributes.
          use_running_average: overrides BNLSTM's attribute. The others take it too, without effect,
            so that a model can hold any.

        Returns:
          The outputs h; with `return_carry` the carry `(c, h)` after the last valid step, and the
          outputs.

        Raises:
          ValueError: inputs have another rank or type than the layer is made for; a training
            sequence is not given from its first step on, or, without `max_steps`, is longer than
            that which initialised the layer.
        """
        return_carry = self.return_carry if return_carry is None else return_carry
        time_major = self.time_major if time_major is None else time_major
        reverse = self.reverse if reverse is None else reverse
        keep_order = self.keep_order if keep_order is None else keep_order
        if self.batch_terms:
            use_running_average = nn.merge_param(
                "use_running_average", self.use_running_average, use_running_average
            )

        self.check_inputs(inputs)
        from_start = first_step is None or (isinstance(first_step, int) and first_step == 0)
        if self.batch_terms and not use_running_average and not from_start:
            raise ValueError("under batch statistics a sequence is run whole: without first_step")
        if not time_major:
            inputs = jnp.swapaxes(inputs, 0, 1)  # [T, B, D], or [T, B] symbols
        if reverse:
            inputs = flip_sequences(inputs, seq_lengths)
        if self.vocab_size is None:
            inputs = inputs.astype(jnp.promote_types(inputs.dtype, jnp.bfloat16))  # no integers
            steps, batch, input_size = inputs.shape
        else:
            steps, batch, input_size = *inputs.shape, self.vocab_size
        valid = None  # [T, B, 1]
        if seq_lengths is not None:
            valid = (jnp.arange(steps)[:, None] < seq_lengths)[..., None]

        params = self.lstm_params(input_size)
        variables = {
            term: self.statistics_variables(self.statistics_shape(term, steps), f"{term}_")
            for term in self.batch_terms
        }
        masked = [term for term in self.batch_terms if self.masks_statistics(term)]

        def counted(valid: Array | None) -> dict[str, Array | None]:
            """Which rows count in each term's statistics."""
            return {term: valid if term in masked else None for term in self.batch_terms}

        state = statistics_dtype(self.param_dtype)
        kernels = {name: params.pop(name) for name in ("input_kernel", "recurrent_kernel")}
        params = jax.tree.map(lambda p: p.astype(state), params)
        symbols = None
        if self.vocab_size is not None:
            inputs, symbols = None, inputs

        given = self.batch_terms and use_running_average
        of_sequence = "input" in self.batch_terms and self.input_statistics == "sequence"
        running = None
        if given:  # of every step, the last row from there on
            t = (0 if first_step is None else first_step) + jnp.arange(steps)
            running = {
                term: Statistics(*(at_steps(v.value, t) for v in pair))
                for term, pair in variables.items()
            }
            if of_sequence:
                running["input"] = Statistics(*(v.value for v in variables["input"]))

        if initial_carry is None:
            if init_key is None and self.initial_hidden_noise > 0:
                init_key = self.make_rng("noise")
            centered = "recurrent" in self.batch_terms and not use_running_average
            initial_carry = self.initial_state((batch,), init_key, centered)
        initial_carry = jax.tree.map(lambda v: v.astype(state), initial_carry)

        implementation = self.chosen_implementation(batch)
        in_cuda = implementation == "gpu"
        if in_cuda:
            running = jax.tree.map(jax.lax.stop_gradient, running)
        # The input term is normalised before the recurrence; else in its step.
        whole = of_sequence or (in_cuda and "input" in self.batch_terms)
        input_axes = (-3, -2) if of_sequence else (-2,)

        def input_terms(
            kernels: dict[str, Array], params: dict[str, Array], inputs: Array | None
        ) -> tuple[Array, Moments | None]:
            """`x W_x` of all time steps at once, `[T, B, 4H]`, normalised if `whole`."""
            terms = self.input_term(kernels, inputs, symbols)
            if not whole:
                return terms, None
            return self.normalizer(params, running, counted(valid), input_axes)("input", terms)

        def by_steps(kernels, params, carry, inputs):
            """By an implementation that is made of the step."""
            on_tpu = implementation == "tpu"
            # A TPU's kernel has no bfloat16 product over a single feature, and no look-up.
            one_hot = on_tpu and symbols is not None
            no_product = on_tpu and input_size == 1 and self.dtype == jnp.bfloat16
            of_input = None
            if whole or no_product or input_size > SMALL_INPUT:
                inputs, of_input = input_terms(kernels, params, inputs)
            else:
                params = params | {"input_kernel": kernels["input_kernel"].astype(state)}

            def step(params, carry, recurrent_term, inputs, rest, moments):
                running, symbols, valid = rest
                if "input_kernel" in params:
                    if one_hot:
                        vocabulary = jax.lax.broadcasted_iota(jnp.int32, (1, input_size), 1)
                        inputs, symbols = (symbols == vocabulary).astype(state), None
                    inputs = self.input_term(params, inputs, symbols)
                of_batch = self.normalizer(params, running, counted(valid), moments=moments)

                def normalize(term: str, x: Array) -> tuple[Array, Moments | None]:
                    return (x, None) if whole and term == "input" else of_batch(term, x)

                return lstm_step(params, carry, recurrent_term, inputs, normalize, valid)

            run = BY_STEP[implementation]
            if given and run is xla:  # which would keep gradients from the statistics
                run = reference
            of_steps = running
            if given and whole:
                of_steps = {term: pair for term, pair in running.items() if term != "input"}
            rest = of_steps, symbols[..., None].astype(jnp.int32) if one_hot else symbols, valid
            kernel = kernels["recurrent_kernel"]
            return run(step, kernel, params, carry, inputs, rest, self.dtype, self.unroll), of_input

        @functools.partial(jax.checkpoint, policy=cuda_gpu.KEEP)
        def by_cuda(kernels, params, carry, inputs):
            """By CUDA's kernel; for the backward pass the input terms are computed anew."""
            inputs, of_input = input_terms(kernels, params, inputs)
            result = cuda_gpu.gpu(
                kernels["recurrent_kernel"],
                params,
                carry,
                inputs + params["bias"],
                valid,
                counted(valid),
                running,
                self.batch_terms,
                self.epsilon_of("recurrent") if self.batch_terms else 0.0,
                self.dtype,
            )
            return result, of_input

        run = by_cuda if in_cuda else by_steps
        (carry, (outputs, moments)), of_input = run(kernels, params, initial_carry, inputs)
        outputs = self.output(outputs)

        if self.batch_terms and not use_running_average:
            for term in self.batch_terms:
                every = valid is None or term not in masked
                count = jnp.full(steps, batch) if every else valid.sum((1, 2))
                if whole and term == "input":
                    of_batch = of_input.statistics(input_axes)
                else:
                    of_batch = moments[term].statistics((-2,))
                self.record_statistics(term, variables[term], of_batch, count)

        if reverse and keep_order:
            outputs = flip_sequences(outputs, seq_lengths)
        if not time_major:
            outputs = jnp.swapaxes(outputs, 0, 1)
        return (carry, outputs) if return_carry else outputs

    @nn.nowrap
    def input_term(
        self, params: dict[str, Array], inputs: Array | None, symbols: Array | None
    ) -> Array:
        """`x W_x`, `[..., batch, 4H]`, of inputs or symbols."""
        kernel = params["input_kernel"].astype(self.param_dtype)
        if symbols is not None:
            return look_up(symbols, kernel, self.dtype)
        return product(inputs, kernel, self.dtype)

    @nn.nowrap
    def refusal(self, implementation: str, batch: int) -> str | None:
        """Why an implementation cannot run this layer on so many sequences; None if it can."""
        if IMPLEMENTATIONS[implementation] is None:
            return None
        if self.batch_terms and self.axis_name is not None:
            return "has the batch on one device, and there is an axis_name"
        if implementation == "tpu":
            return None
        if set(self.normalize) - set(self.batch_terms):
            return "has no layer normalisation"
        return cuda_gpu.refusal(self.features, batch, self.param_dtype, self.dtype)

    @nn.nowrap
    def chosen_implementation(self, batch: int) -> str:
        """The implementation for so many sequences; not `auto`, but what that is for them."""
        name = self.implementation
        if name == "auto":
            return choose(self.features, functools.partial(self.refusal, batch=batch))
        in_kernel = min(batch, cuda_gpu.LARGEST_BATCH) if name == "gpu" else batch
        if reason := self.refusal(name, in_kernel):
            raise ValueError(f"implementation {name!r} {reason}; take 'xla'")
        if batch > in_kernel:  # such a batch does not leave a GPU idle
            log_choice(name, "xla", f"the kernel takes up to {in_kernel} sequences")
            return "xla"
        return name

    @nn.nowrap
    def check_inputs(self, inputs: Array) -> None:
        """Refuses inputs of another kind than the layer is made for, and other implementations."""
        if self.implementation not in NAMES:
            names = " or ".join(map(repr, NAMES))
            raise ValueError(f"implementation is {self.implementation!r}; it is {names}")
        given = f"these are {inputs.dtype}{list(inputs.shape)}"
        if self.vocab_size is None and inputs.ndim != 3:
            symbols = "; for symbols [batch, time] set vocab_size" if inputs.ndim == 2 else ""
            raise ValueError(f"inputs are to be [batch, time, input], {given}{symbols}")
        if self.vocab_size is not None and (
            inputs.ndim != 2 or not jnp.issubdtype(inputs.dtype, jnp.integer)
        ):
            raise ValueError(f"with vocab_size inputs are integers [batch, time], {given}")


class LSTM(RecurrentLayer):
    """An LSTM over whole sequences, equations 1 to 3.

    Example::

        layer = LSTM(100)
        variables = layer.init(key, x)  # x [batch, time, input]
        y = layer.apply(variables, x)  # y [batch, time, 100]
    """


class LNLSTM(LNLSTMParameters, RecurrentLayer):
    """A layer-normalised LSTM over whole sequences: what to hold the batch-normalised one against.

    Training and inference are the same, and there are no statistics to keep. Normalised inputs of
    one feature are left with their sign alone: for those leave `input` out of `normalize`.
    """


class BNLSTM(BNLSTMParameters, RecurrentLayer):
    """A batch-normalised LSTM over whole sequences, equations 6 to 8.

    Example::

        layer = BNLSTM(100, max_steps=784)
        variables = layer.init(key, x, use_running_average=True)
        # Training, then inference.
        y, updated = layer.apply(
            variables, x, use_running_average=False, mutable=["batch_stats"])
        y = layer.apply({**variables, **updated}, x, use_running_average=True)

    Statistics are kept for each time step, in the collection `batch_stats`:
    `{input,recurrent,cell}_{mean,var}`, each `[max_steps, F]`. Training moves them towards those
    of the batch; `bnlstm_jax.population` estimates them anew. Inference goes on past `max_steps`
    with the last row. In a reversed layer the rows follow the recurrence, not the inputs. Under
    batch statistics only first derivatives in reverse mode (`jax.grad`, `jax.vjp`) are defined; the
    updated statistics have none.

    Attributes:
      max_steps: number of time steps with statistics of their own; those of later steps are not
        kept. By default the length of the sequence that initialises the layer, and no training
        sequence may be longer then.
      shared_statistics: keep the running mean and variance of all time steps together, `[F]`,
        rather than of each; without `max_steps` then. In training each step is normalised by its
        own batch either way. The paper finds separate ones necessary; this is to see why.
      input_statistics: `per_step`, or `sequence` for input statistics `[4H]` over all time steps
        together, in training too.
      mask_statistics: count only valid steps of `seq_lengths` in statistics. The paper's released
        code counts all, with the frozen state of finished sequences: False does the same. Names of
        terms choose those for which only valid steps count.
    """

    max_steps: int | None = None
    shared_statistics: bool = False
    input_statistics: str = "per_step"
    mask_statistics: bool | Sequence[str] = True

    @nn.nowrap
    def masks_statistics(self, term: str) -> bool:
        """Whether only valid steps count in a term's statistics."""
        if isinstance(self.mask_statistics, bool):
            return self.mask_statistics
        check_terms("mask_statistics", self.mask_statistics)
        return term in self.mask_statistics

    @nn.nowrap
    def statistics_shape(self, term: str, steps: int) -> tuple[int, ...]:
        """Shape of a term's statistics, for sequences of `steps` steps."""
        if self.input_statistics not in ("per_step", "sequence"):
            raise ValueError(
                f"input_statistics is {self.input_statistics!r}; it is 'per_step' or 'sequence'"
            )
        if self.shared_statistics and self.max_steps is not None:
            raise ValueError("shared_statistics are of all time steps: leave max_steps out")
        of_all_steps = term == "input" and self.input_statistics == "sequence"
        if of_all_steps or self.shared_statistics:
            return (self.term_size(term),)
        return (self.max_steps or steps, self.term_size(term))

    def record_statistics(
        self, term: str, variables: list[nn.Variable], batch: Statistics, count: Array
    ) -> None:
        """Moves the running average of a term; see `update_statistics`.

        `batch` is `[T, F]` or `[F]`; `count` `[T]` rows are behind each time step. Steps past the
        last one with statistics of its own leave none.
        """
        if batch.mean.ndim == 1:
            count = count.sum()
        elif not self.shared_statistics:
            rows, steps = variables[0].value.shape[0], count.shape[0]
            if steps > rows and self.max_steps is None:
                raise ValueError(
                    f"statistics are kept for {rows} time steps, the length of the sequence that "
                    f"initialised the layer, and this one has {steps}: set max_steps (of a reader, "
                    "passage_steps or question_steps)"
                )

            def to_rows(x: Array) -> Array:
                x = x[:rows]
                return jnp.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1))

            batch, count = Statistics(*map(to_rows, batch)), to_rows(count)
        self.update_statistics(variables, batch, count, f"{term}_")
