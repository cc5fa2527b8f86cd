"""The Attentive Reader against arrays that the authors' released code computed.

The arrays are in tests/data/authors. All tests are in double precision. Training uses batch
statistics. Evaluation uses population statistics, except for the encoders' input terms, which the
authors' code normalises by the batch.

Training BN-e** needs one change. After the end of a passage its backward states are zero here, as
in the fork of the code that trained the paper's BN-e**. In the branch that computed the arrays they
are copies of earlier states. These states count in the statistics of one term of attention, so the
test replaces the zeros by the copies.
"""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from experiments.models.attentive_reader import (
    FORMS,
    AttentiveReader,
    Quirks,
    with_input_statistics,
)
from tests import authors
from tests.authors import assert_agrees

CASES = authors.read_cases("reader")
EVALUATIONS = authors.read_cases("reader_population")
WORDS, UNITS = 13, 4

# Without normalisation: attention's gradients are small differences of larger terms, which costs
# two digits. Found: 6e-14 at most.
LSTM = 1e-12
# Only input terms use batch statistics, and their variances are far from zero. Found: 2e-16.
EVALUATION = authors.NO_BATCH_STATISTICS

# The authors' names. Their gates stand in the order i, f, o, g.
ENCODERS = {"passage": "encoder_desc_word", "question": "encoder_q"}
DIRECTIONS = {"forward": "", "backward": "_r"}
LAYER = {
    "input_kernel": "W",
    "recurrent_kernel": "U",
    "bias": "b",
    "initial_hidden": "h0",
    "input_scale": "input_gammas",
    "recurrent_scale": "recurrent_gammas",
    "cell_scale": "output_gammas",
    "cell_bias": "output_betas",
}
TERMS = {
    "passage": "ff_att_ctx",
    "question": "ff_att_q",
    "attended": "ff_out_ctx",
    "readout_question": "ff_out_q",
    "mean": "ff_out_mean_d",
}
OTHERS = {
    "embedding": "Wemb_word",
    "bilinear_kernel": "ff_att_bi_dq",
    "attention_kernel": "ff_att_proj",
    "attention_bias": "ff_att_ctx_b",
    "readout_bias": "ff_out_q_b",
}
NAMES = {
    ("readout", "kernel"): "ff_logit_W",
    ("readout", "bias"): "ff_logit_b",
    **{(ours,): theirs for ours, theirs in OTHERS.items()},
    **{(f"{term}_kernel",): f"{theirs}_W" for term, theirs in TERMS.items()},
    **{(f"{term}_norm", "scale"): f"{theirs}_gamma" for term, theirs in TERMS.items()},
    **{
        (encoder, direction, name): f"{of_encoder}{suffix}_{theirs}"
        for encoder, of_encoder in ENCODERS.items()
        for direction, suffix in DIRECTIONS.items()
        for name, theirs in LAYER.items()
    },
}


STATISTICS = {
    **{
        (f"{term}_norm", moment): f"{theirs}_{moment}"
        for term, theirs in TERMS.items()
        for moment in ("mean", "var")
    },
    **{
        (encoder, direction, f"{term}_{moment}"): f"{of_encoder}{suffix}_{term}_{moment}"
        for encoder, of_encoder in ENCODERS.items()
        for direction, suffix in DIRECTIONS.items()
        for term in ("input", "recurrent", "cell")
        for moment in ("mean", "var")
    },
}


def reader_fields(form, extra_terms):
    """The fields that make a reader compute what the authors' code does."""
    return {
        **FORMS[form],
        "quirks": Quirks(
            count_padding=True,
            double_bias=True,
            bilinear=extra_terms,
            mean_passage=extra_terms,
        ),
    }


def form_of(case):
    return case[: -len("_0_0")]


def tolerance(case):
    return LSTM if form_of(case) == "lstm" else authors.BATCH_STATISTICS


def converted(path, x):
    if path == ("attention_kernel",):
        return x[:, None]
    of_gates = len(path) == 3 and x.shape[-1] == 4 * UNITS
    return authors.reorder_gates(x, "ifog") if of_gates else x


def parameters(case, prefix="p"):
    """The parameters of a case, or their gradients: values by path, by this library's names."""
    return by_path(CASES[case], NAMES, prefix)


def by_path(arrays, names, prefix):
    paths = {path: f"{prefix}_{name}" for path, name in names.items()}
    paths = {path: name for path, name in paths.items() if name in arrays}
    assert set(paths.values()) == {name for name in arrays if name.startswith(f"{prefix}_")}
    return {path: converted(path, arrays[name]) for path, name in paths.items()}


def wrap_backward_states(lengths):
    """Repeats a passage's backward states after its end, as the authors' branch does."""

    def intercept(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if context.method_name != "__call__" or context.module.name != "passage":
            return result
        y, last = result
        forward, backward = jnp.split(y, 2, axis=-1)
        t = jnp.arange(y.shape[1]) % lengths[:, None]
        return jnp.concatenate([forward, jnp.take_along_axis(backward, t[..., None], 1)], -1), last

    return nn.intercept_methods(intercept)


@functools.cache
def differentiated(form, extra_terms, implementation):
    """Gradients of the authors' cost, with log probabilities and attention."""
    fields = reader_fields(form, extra_terms)
    reader = AttentiveReader(
        WORDS, UNITS, implementation=implementation, param_dtype=jnp.float64, **fields
    )

    def cost(params, batch, weights):
        context = contextlib.nullcontext()
        if form == "bn_e_star_star":
            context = wrap_backward_states(batch[2])
        with context:
            logits, updated = reader.apply(
                {"params": traverse_util.unflatten_dict(params)},
                *batch,
                use_running_average=False,
                mutable=["batch_stats", "intermediates"],
            )
        logp = jax.nn.log_softmax(logits)
        (attention,) = updated["intermediates"]["attention"]
        return (weights * logp).sum(), (logp, attention)

    return jax.jit(jax.grad(cost, has_aux=True))


# To save time, `reference` runs only the form with the most parts.
RUNS = [(case, "xla") for case in CASES] + [("bn_e_star_star_1_1", "reference")]


@pytest.mark.parametrize("case, implementation", RUNS)
def test_outputs_attention_and_gradients_match_the_authors_code(case, implementation):
    arrays, params = CASES[case], parameters(case)
    batch = arrays["d"].T, arrays["q"].T, arrays["dl"], arrays["ql"]
    function = differentiated(form_of(case), case.endswith("_1"), implementation)
    with jax.enable_x64(True):
        gradients, (logp, attention) = function(params, batch, arrays["w"])
    assert_agrees(logp, arrays["logp"], tolerance(case), "log probabilities")
    assert_agrees(attention, arrays["alpha"][..., 0].T, tolerance(case), "attention")
    expected = parameters(case, "g")
    assert gradients.keys() == expected.keys()
    for path, gradient in expected.items():
        name = "/".join(path)
        if form_of(case) != "lstm" and path[-1] == "initial_hidden":
            # Normalisation removes the initial hidden state.
            authors.assert_only_rounding(gradients[path], gradient, name)
        else:
            assert_agrees(gradients[path], gradient, tolerance(case), name)


@pytest.mark.parametrize("case", EVALUATIONS)
def test_evaluation_matches_the_authors_code(case):
    arrays, expected = CASES[case], EVALUATIONS[case]
    batch = arrays["d"].T, arrays["q"].T, arrays["dl"], arrays["ql"]
    statistics = by_path(expected, STATISTICS, "s")
    # The authors' sequences are longer than their statistics.
    steps = [len(statistics[name, "forward", "cell_mean"]) for name in ("passage", "question")]
    assert np.all(np.array(steps) < [len(arrays["d"]), len(arrays["q"])])
    fields = reader_fields(form_of(case), extra_terms=True) | dict(
        passage_steps=steps[0], question_steps=steps[1], param_dtype=jnp.float64
    )
    reader = AttentiveReader(WORDS, UNITS, implementation="xla", **fields)

    def evaluate(variables, adapt):
        variables = jax.tree.map(jnp.asarray, variables)
        if adapt:
            variables = with_input_statistics(reader, variables, batch)
        logits, kept = reader.apply(
            variables, *batch, use_running_average=True, mutable=["intermediates"]
        )
        return jax.nn.log_softmax(logits), kept["intermediates"]["attention"][0]

    variables = {"params": parameters(case), "batch_stats": statistics}
    variables = {name: traverse_util.unflatten_dict(values) for name, values in variables.items()}
    with jax.enable_x64(True):
        logp, attention = jax.jit(evaluate, static_argnums=1)(variables, True)
        by_population, _ = jax.jit(evaluate, static_argnums=1)(variables, False)
    assert_agrees(logp, expected["logp"], EVALUATION, "log probabilities")
    assert_agrees(attention, expected["alpha"][..., 0].T, EVALUATION, "attention")
    assert np.abs(np.asarray(by_population) - expected["logp"]).max() > 0.1


def test_cases_cover_all_forms():
    assert {form_of(case) for case in CASES} == set(FORMS)
    assert len(CASES) == 3 * len(FORMS)
    sequence = {form for form, fields in FORMS.items() if "input_statistics" in fields}
    assert {form_of(case) for case in EVALUATIONS} == sequence
