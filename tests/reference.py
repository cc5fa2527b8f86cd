"""Batch-normalised LSTM as a plain loop in NumPy double precision.

This file is written from the equations of the paper and shares nothing with the library, so that
the two can be compared. Vectors are rows: inputs are [batch, time, input], kernels multiply from
the right, and the last axis has the four gates in the order forget, input, output, candidate. For
each time step t

    a_t = s_h * N(h_{t-1} W_h) + s_x * N(x_t W_x) + b
    f, i, o, g = split(a_t)
    c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
    h_t = sigmoid(o) * tanh(s_c * N(c_t) + b_c)

with N(x) = (x - mean) / sqrt(var + epsilon). Each time step has its own mean and (biased) variance,
over the batch or from given tables with one row for each step. A term that is not normalised is
used as it is, without the scale.
"""

import numpy as np

TERMS = ("input", "recurrent", "cell")


def sigmoid(x):
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def moments(values, counted):
    """Mean and biased variance of the entries that `counted` selects, NaN if it selects none."""
    chosen = values[counted]
    if len(chosen) == 0:
        nothing = np.full(values.shape[-1], np.nan)
        return nothing, nothing
    mean = chosen.mean(axis=0)
    return mean, ((chosen - mean) ** 2).mean(axis=0)


def flip(values, lengths):
    """Reverse the first lengths[b] entries of each row b; the padding behind them stays."""
    flipped = values.copy()
    for b, n in enumerate(lengths):
        flipped[b, :n] = values[b, :n][::-1]
    return flipped


def bn_lstm(
    params,
    inputs,
    *,
    normalize=TERMS,
    statistics=None,
    seq_lengths=None,
    input_statistics="per_step",
    mask_statistics=True,
    initial_carry=None,
    reverse=False,
    keep_order=False,
    epsilon=1e-5,
    input_epsilon=None,
    bias_factor=1.0,
    operand=lambda x: x,
    over="batch",
):
    """Run the recurrence; return the outputs, the final (c, h) and the statistics of the batch.

    statistics: None to normalise with the statistics of this batch (training), else a dict with
        `{term}_mean` and `{term}_var`, whose last row is used for all later steps (inference).
    seq_lengths: number of valid steps of each row; after them the row keeps its state.
    mask_statistics: count only the valid rows in the statistics, of some terms or of all.
    input_epsilon: epsilon of the input term; None for `epsilon`.
    bias_factor: how often the bias is added.
    operand: applied to both factors of every matrix product, to imitate a coarser precision.
    over: `features` for layer normalisation, each row by its own mean and variance.

    The returned statistics are a dict like `statistics`, [time, features] each, or [features] for
    sequence-wide input statistics. Steps with fewer than two rows to count have NaN. Missing
    parameters `initial_cell` and `cell_bias` are zero.
    """
    x = np.asarray(inputs, np.float64)
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    batch, time = x.shape[:2]
    features = len(p["initial_hidden"])
    p = {"initial_cell": np.zeros(features), "cell_bias": np.zeros(features)} | p
    lengths = np.full(batch, time) if seq_lengths is None else np.asarray(seq_lengths)
    if reverse:
        x = flip(x, lengths)
    valid = np.arange(time) < lengths[:, None]  # [batch, time]
    masked = {True: TERMS, False: ()}.get(mask_statistics, mask_statistics)
    counted = {term: valid if term in masked else np.ones_like(valid) for term in TERMS}
    found = {f"{term}_{kind}": [] for term in normalize for kind in ("mean", "var")}

    def normalised(term, values, rows, step):
        if term not in normalize:
            return values
        if over == "features":
            mean, var = values.mean(-1, keepdims=True), values.var(-1, keepdims=True)
        elif statistics is None:
            mean, var = moments(values, rows)
            has_variance = np.sum(rows) > 1
            found[f"{term}_mean"].append(np.where(has_variance, mean, np.nan))
            found[f"{term}_var"].append(np.where(has_variance, var, np.nan))
        else:
            mean, var = (np.asarray(statistics[f"{term}_{kind}"]) for kind in ("mean", "var"))
            if mean.ndim == 2:
                row = min(step, len(mean) - 1)
                mean, var = mean[row], var[row]
        other = term == "input" and input_epsilon is not None
        deviation = np.sqrt(var + (input_epsilon if other else epsilon))
        return p[f"{term}_scale"] * (values - mean) / deviation

    projected = operand(x) @ operand(p["input_kernel"])  # [batch, time, 4 * features]
    whole_sequence = input_statistics == "sequence"
    if whole_sequence:
        projected = normalised("input", projected, counted["input"], None)

    if initial_carry is None:
        c = np.tile(p["initial_cell"], (batch, 1))
        h = np.tile(p["initial_hidden"], (batch, 1))
    else:
        c, h = (np.asarray(state, np.float64) for state in initial_carry)

    outputs = np.empty((batch, time, features))
    for t in range(time):
        keep = valid[:, t, None]
        from_input = projected[:, t]
        if not whole_sequence:
            from_input = normalised("input", from_input, counted["input"][:, t], t)
        recurrent = operand(h) @ operand(p["recurrent_kernel"])
        recurrent = normalised("recurrent", recurrent, counted["recurrent"][:, t], t)
        a = recurrent + from_input + bias_factor * p["bias"]
        f, i, o, g = np.split(a, 4, axis=-1)
        c = np.where(keep, sigmoid(f) * c + sigmoid(i) * np.tanh(g), c)
        shown = np.tanh(normalised("cell", c, counted["cell"][:, t], t) + p["cell_bias"])
        h = np.where(keep, sigmoid(o) * shown, h)
        outputs[:, t] = h

    if reverse and keep_order:
        outputs = flip(outputs, lengths)
    found = {name: np.stack(rows) for name, rows in found.items() if rows}
    if whole_sequence:
        found = {name: v[0] if name.startswith("input") else v for name, v in found.items()}
    return outputs, (c, h), found


def running_average(previous, found, momentum):
    """Running statistics after one batch. Rows without a new value (too late, NaN) stay.

    Values of steps beyond the rows are ignored.
    """
    updated = {}
    for name, old in previous.items():
        new = np.array(old, np.float64)
        seen = new[: len(found[name])]  # a view: the steps that this batch has reached
        step = momentum * seen + (1.0 - momentum) * found[name][: len(new)]
        seen[...] = np.where(np.isnan(step), seen, step)
        updated[name] = new
    return updated


def finite_differences(function, values, step=1e-6):
    """Gradient of a scalar function of a dict of arrays, by central differences."""
    gradients = {}
    for name, value in values.items():
        gradient = np.empty_like(value)
        for index in np.ndindex(value.shape):
            ends = []
            for offset in (step, -step):
                moved = value.copy()
                moved[index] += offset
                ends.append(function({**values, name: moved}))
            gradient[index] = (ends[0] - ends[1]) / (2.0 * step)
        gradients[name] = gradient
    return gradients
