"""The Attentive Reader of "Recurrent Batch Normalization" as plain loops in NumPy.

Like tests/reference.py it is double precision and shares nothing with the library but the names of
parameters: nested dicts, with `passage` and `question` for the encoders, each with `forward` and
perhaps `backward`, and statistics under the same names. Row vectors, gates in the order forget,
input, output, candidate. Dropout is left out.
"""

from typing import NamedTuple

import numpy as np

from tests.reference import TERMS, flip, moments, sigmoid

SEQUENCE_EPSILON = 1e-6  # of sequence-wide input statistics


class Form(NamedTuple):
    recurrence: bool = False  # terms of the recurrence are normalised
    sequence: bool = False  # the input's over all tokens together rather than for each step
    attention: bool = False  # terms of attention and read-out are normalised
    bidirectional: bool = False


FORMS = {
    "lstm": Form(),
    "bn_lstm": Form(recurrence=True),
    "bn_everywhere": Form(recurrence=True, attention=True),
    "bn_e_star": Form(recurrence=True, sequence=True, attention=True),
    "bn_e_star_star": Form(True, True, True, True),
}


def normalise(name, values, counted, scale, epsilon, given, step=None):
    """BN without its shift, by the moments of the counted values or by given ones; and the moments.

    Given are `{name}mean` and `{name}var`. For a step it is one of the rows of a table, the last
    one for all steps beyond.
    """
    if given is None:
        mean, var = moments(values, counted)
    else:
        mean, var = (np.asarray(given[name + kind], float) for kind in ("mean", "var"))
        if mean.ndim == 2:
            mean, var = (table[min(step, len(table) - 1)] for table in (mean, var))
    return scale * (values - mean) / np.sqrt(var + epsilon), (mean, var)


def recur(
    p,
    x,
    lengths,
    recurrence,
    sequence,
    masked,
    input_epsilon=1e-5,
    bias_factor=1,
    given=None,
    epsilon=1e-5,
):
    """A (BN-)LSTM over x [batch, time, D], all of whose normalised terms may be masked or not.

    Returns outputs, the last hidden state, and all moments: [time, F], or [F] of whole sequences.
    Steps with fewer than two rows to count have NaN.
    """
    batch, time = x.shape[:2]
    valid = np.arange(time) < np.asarray(lengths)[:, None]
    counted = {term: valid if term in masked else np.ones_like(valid) for term in TERMS}
    found = {f"{term}_{kind}": [] for term in TERMS * recurrence for kind in ("mean", "var")}

    def norm(term, values, rows, epsilon, step):
        if not recurrence:
            return values
        values, pair = normalise(f"{term}_", values, rows, p[f"{term}_scale"], epsilon, given, step)
        if given is None and np.sum(rows) < 2:
            pair = np.full_like(pair, np.nan)  # one row has no variance
        for kind, moment in zip(("mean", "var"), pair, strict=True):
            found[f"{term}_{kind}"].append(moment)
        return values

    from_input = x @ p["input_kernel"]
    if sequence:
        from_input = norm("input", from_input, counted["input"], input_epsilon, None)
    else:
        steps = [
            norm("input", from_input[:, t], counted["input"][:, t], input_epsilon, t)
            for t in range(time)
        ]
        from_input = np.stack(steps, axis=1)

    h = np.tile(p["initial_hidden"], (batch, 1))
    c = np.zeros_like(h)
    outputs = []
    for t in range(time):
        recurrent = norm(
            "recurrent", h @ p["recurrent_kernel"], counted["recurrent"][:, t], epsilon, t
        )
        f, i, o, g = np.split(recurrent + from_input[:, t] + bias_factor * p["bias"], 4, axis=1)
        keep = valid[:, t, None]
        c = np.where(keep, sigmoid(f) * c + sigmoid(i) * np.tanh(g), c)
        shown = norm("cell", c, counted["cell"][:, t], epsilon, t)
        if recurrence:
            shown = shown + p["cell_bias"]
        h = np.where(keep, sigmoid(o) * np.tanh(shown), h)
        outputs.append(h)
    found = {name: np.stack(rows) for name, rows in found.items()}
    if sequence and recurrence:
        found |= {name: found[name][0] for name in ("input_mean", "input_var")}
    return np.stack(outputs, axis=1), h, found


def read(
    form,
    params,
    passages,
    questions,
    passage_lengths,
    question_lengths,
    *,
    mask_statistics=False,
    statistics=None,
    epsilon=1e-5,
):
    """Logits, weights of attention, and the moments of the batch (or those given).

    mask_statistics: False is the released code, whose statistics mask nothing but sequence-wide
        input; in W_d's term one step of padding behind the longest passage counts. With True only
        tokens count anywhere.
    statistics: those of the population, to normalise with; None for those of the batch.
    """
    form = FORMS[form]
    found = {}

    def encode(name, words, lengths):
        x, valid = params["embedding"][words], np.arange(words.shape[1]) < lengths[:, None]
        masked = TERMS if mask_statistics else TERMS[:1] if form.sequence else ()
        hidden, last, found[name] = [], [], {}
        for direction in ("forward", "backward")[: 1 + form.bidirectional]:
            backward = direction == "backward"
            y, u, moments_of_layer = recur(
                params[name][direction],
                flip(x, lengths) if backward else x,
                lengths,
                form.recurrence,
                form.sequence,
                masked,
                SEQUENCE_EPSILON if form.sequence else epsilon,
                given=None if statistics is None else statistics.get(name, {}).get(direction),
                epsilon=epsilon,
            )
            found[name][direction] = moments_of_layer
            hidden.append(flip(y, lengths) * valid[..., None] if backward else y)
            last.append(u)
        return np.concatenate(hidden, axis=2), np.concatenate(last, axis=1)

    def term(name, x, counted):
        x = x @ params[f"{name}_kernel"]
        if not form.attention:
            return x
        given = None if statistics is None else statistics[f"{name}_norm"]
        x, (mean, var) = normalise("", x, counted, params[f"{name}_norm"]["scale"], epsilon, given)
        found[f"{name}_norm"] = {"mean": mean, "var": var}
        return x

    y, _ = encode("passage", passages, passage_lengths)
    _, u = encode("question", questions, question_lengths)
    batch, time = y.shape[:2]
    everyone = np.ones(batch, bool)

    counted = np.zeros((batch, time), bool)
    for b, length in enumerate(passage_lengths):
        counted[b, : length if mask_statistics else max(passage_lengths) + 1] = True
    from_passage, from_question = term("passage", y, counted), term("question", u, everyone)
    attention, attended, mean = np.zeros((batch, time)), np.zeros_like(u), np.zeros_like(u)
    for b, length in enumerate(passage_lengths):
        if not length:
            continue  # nothing to attend to: zeros
        scores = np.empty(length)
        for t in range(length):
            similarity = (y[b, t] @ params["bilinear_kernel"]) @ (u[b] @ params["bilinear_kernel"])
            inside = from_passage[b, t] + params["attention_bias"] + from_question[b] + similarity
            scores[t] = np.tanh(inside) @ params["attention_kernel"][:, 0]
        weights = np.exp(scores - scores.max())
        attention[b, :length] = weights / weights.sum()
        attended[b] = attention[b, :length] @ y[b, :length]
        mean[b] = y[b, :length].mean(axis=0)

    g = np.tanh(
        term("attended", attended, everyone)
        + term("readout_question", u, everyone)
        + term("mean", mean, everyone)
        + params["readout_bias"]
    )
    return g @ params["readout"]["kernel"] + params["readout"]["bias"], attention, found
