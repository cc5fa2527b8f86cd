"""The Attentive Reader of "Recurrent Batch Normalization" as plain loops in NumPy.

Like tests/reference.py it is in double precision, and shares with the library only the names of
parameters: nested dicts, with `passage` and `question` for the encoders, each with `forward` and
perhaps `backward`. Statistics have the same names. Vectors are rows, and gates have the order
forget, input, output, candidate. There is no dropout.
"""

from typing import NamedTuple

import numpy as np

from tests.reference import TERMS, bn_lstm, moments

SEQUENCE_EPSILON = 1e-6  # of sequence-wide input statistics


class Form(NamedTuple):
    recurrence: bool = False  # terms of the recurrence are normalised
    sequence: bool = False  # the input term over all tokens together rather than per step
    attention: bool = False  # terms of attention and read-out are normalised
    bidirectional: bool = False


FORMS = {
    "lstm": Form(),
    "bn_lstm": Form(recurrence=True),
    "bn_everywhere": Form(recurrence=True, attention=True),
    "bn_e_star": Form(recurrence=True, sequence=True, attention=True),
    "bn_e_star_star": Form(True, True, True, True),
}


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
    """Logits, attention weights, and the statistics of the batch (or the given ones).

    mask_statistics: False as in the released code, which masks only sequence-wide input
        statistics; in W_d's term one step of padding after the longest passage counts. With True,
        only tokens count.
    statistics: population statistics to normalise with; None for batch statistics.
    """
    form = FORMS[form]
    found = {}

    def encode(name, words, lengths):
        x, valid = params["embedding"][words], np.arange(words.shape[1]) < lengths[:, None]
        masked = TERMS if mask_statistics else TERMS[:1] if form.sequence else ()
        hidden, last, found[name] = [], [], {}
        for direction in ("forward", "backward")[: 1 + form.bidirectional]:
            backward = direction == "backward"
            y, (_, u), found[name][direction] = bn_lstm(
                params[name][direction],
                x,
                normalize=TERMS if form.recurrence else (),
                statistics=None if statistics is None else statistics.get(name, {}).get(direction),
                seq_lengths=lengths,
                input_statistics="sequence" if form.sequence else "per_step",
                mask_statistics=masked,
                reverse=backward,
                keep_order=backward,
                epsilon=epsilon,
                input_epsilon=SEQUENCE_EPSILON if form.sequence else None,
            )
            hidden.append(y * valid[..., None] if backward else y)
            last.append(u)
        return np.concatenate(hidden, axis=2), np.concatenate(last, axis=1)

    def term(name, x, counted):
        x = x @ params[f"{name}_kernel"]
        if not form.attention:
            return x
        if statistics is None:
            mean, var = moments(x, counted)
        else:
            mean, var = (np.asarray(statistics[f"{name}_norm"][k], float) for k in ("mean", "var"))
        found[f"{name}_norm"] = {"mean": mean, "var": var}
        return params[f"{name}_norm"]["scale"] * (x - mean) / np.sqrt(var + epsilon)

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
