import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.datasets.corpus import UNKNOWN, encode
from experiments.records import workdir
from experiments.records.checkpoints import read_best
from experiments.runtime.errors import UserError
from experiments.tasks import char_lm
from scripts import sample
from tests.scripts import LETTERS

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "scripts.sample"]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu"}


@pytest.fixture
def write(call_main):
    """Runs the command in this process; returns its stdout and stderr."""

    def write(folder, **given):
        given = {"prompt": None, "length": 20, "temperature": 1.0, "seed": 1} | given
        return call_main(sample, workdir=str(folder), **given)

    return write


def opened(folder, scale=0.7):
    """Model, variables and vocabulary of a run. Noise on the parameters makes predictions vary."""
    config = workdir.read_config(folder)
    vocabulary = workdir.read_record(folder)["vocabulary"]
    _, variables, _ = read_best(folder)
    rng = np.random.default_rng(2)
    variables["params"] = jax.tree.map(
        lambda leaf: leaf + scale * rng.normal(size=leaf.shape).astype(np.float32),
        variables["params"],
    )
    return char_lm.make_model(config, len(vocabulary)), variables, vocabulary


def drawn(run, prompt, length, temperature, seed=1):
    return "".join(itertools.islice(sample.sample(*run, prompt, temperature, seed), length))


def logits_of(run, text, length=0):
    """The model's logits after each character of `text`, read in one call.

    The text is padded to `length` characters, so that texts of several lengths compile once.
    """
    model, variables, vocabulary = run
    symbols = jnp.asarray(encode(text.ljust(length), vocabulary)[None], jnp.int32)
    logits = model.apply(variables, symbols, use_running_average=True)
    return np.asarray(logits[0, : len(text)], np.float64)


@pytest.mark.parametrize("kind", ["lstm", "bn_lstm"])
def test_temperature_0_picks_the_most_likely_character(runs, kind):
    run = opened(runs / kind)
    text = prompt = "fab "
    for _ in range(30):  # beyond the 9 time steps with statistics
        likely = np.argsort(logits_of(run, text, 40)[-1])[::-1]
        text += next(run[2][i] for i in likely if run[2][i] != UNKNOWN)
    assert prompt + drawn(run, prompt, 30, 0.0) == text
    assert len(set(text)) > 4
    assert drawn(run, prompt, 30, 1e-30, seed=5) == text[len(prompt) :]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draw_frequencies_match_the_logits(temperature):
    """Each frequency in 20,000 draws is within 5 standard deviations of the probability."""
    logits = np.array([0.0, 1.0, -2.0, 6.0, 2.5], np.float32)
    excluded = np.array([False, False, False, True, False])
    p = np.where(excluded, 0, np.exp(logits / temperature))
    p /= p.sum()
    keys = jax.random.split(jax.random.key(0), 20_000)
    symbols = jax.vmap(lambda key: sample.draw(logits, excluded, key, temperature))(keys)
    frequency = np.bincount(symbols, minlength=5) / len(keys)
    assert np.all(np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / len(keys)))


def test_long_samples_follow_the_model_distribution(runs):
    """Draws 3,000 characters, with statistics for 9 time steps.

    Given the text so far, the surprisal of a character minus its entropy has mean 0. The sum over
    all characters must be within 5 standard deviations of 0.
    """
    run, temperature = opened(runs / "bn_lstm"), 0.8
    text = "a" + drawn(run, "a", 3000, temperature)
    assert len(text) == 3001 and set(text) <= set(LETTERS)
    logits = logits_of(run, text)[:-1]
    assert np.all(np.isfinite(logits))
    logits[:, run[2].index(UNKNOWN)] = -1e9
    log_p = np.asarray(jax.nn.log_softmax(logits / temperature))
    p = np.exp(log_p)
    surprise = -np.take_along_axis(log_p, encode(text[1:], run[2])[:, None].astype(int), 1)[:, 0]
    entropy = -(p * log_p).sum(1)
    variance = (p * log_p**2).sum(1) - entropy**2
    assert abs(np.sum(surprise - entropy)) < 5 * np.sqrt(variance.sum())
    assert variance.mean() > 0.1 and entropy.std() > 0.05  # predictions vary


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0, 1e30])
def test_unknown_symbol_is_never_drawn(runs, temperature):
    run = opened(runs / "bn_lstm")
    bias = jnp.asarray(run[1]["params"]["readout"]["bias"])
    run[1]["params"]["readout"]["bias"] = bias.at[run[2].index(UNKNOWN)].add(100.0)
    assert logits_of(run, "a")[-1].argmax() == run[2].index(UNKNOWN)
    assert UNKNOWN not in drawn(run, "a", 300, temperature)


def test_command_is_reproducible_and_changes_no_files(finished, write):
    before = sorted(finished.rglob("*"))
    first = write(finished, prompt="dab")
    assert first.out.startswith("dab") and first.out.endswith("\n") and len(first.out) == 24
    assert first.err == ""
    assert write(finished, prompt="dab") == first
    assert write(finished, prompt="dab", seed=2) != first
    assert write(finished).out.startswith("\n")
    assert sorted(finished.rglob("*")) == before


def test_population_statistics_are_preferred_to_running_averages(finished, write):
    update, variables, which = read_best(finished)
    with np.load(finished / "population_statistics.npz") as file:
        for name, value in variables["batch_stats"]["layer"].items():
            np.testing.assert_array_equal(value, file[f"layer/{name}"])
    assert which == "population" and update == 3

    (finished / "population_statistics.npz").unlink()
    _, running, which = read_best(finished)
    assert which == "running"
    assert not np.allclose(
        running["batch_stats"]["layer"]["cell_mean"], variables["batch_stats"]["layer"]["cell_mean"]
    )
    assert write(finished).err == (
        "no re-estimated population statistics of update 3 yet: using running averages; to "
        f"re-estimate: python -m experiments.main --mode=evaluate --workdir={finished}\n"
    )


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_run_of_another_task_raises(finished, write):
    change(finished / "config.json", task="sequential_images")
    with pytest.raises(UserError, match=r"of the task sequential_images: it must be .* char_lm"):
        write(finished)


def test_config_of_another_version_raises(finished, write):
    config = json.loads((finished / "config.json").read_text())
    del config["model"]["shared_statistics"]
    (finished / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.model\.shared_statistics is missing"):
        write(finished)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("", "--prompt is empty"),
        ("aZa?Z", r"--prompt has 'Z\?', which the training text lacks: use only '\\n Tabcdefg'"),
        ("FAB", "--prompt has 'FAB', which .*: did you mean 'fab'"),
        (UNKNOWN, f"--prompt has '{UNKNOWN}'"),
    ],
)
def test_invalid_prompts_raise(finished, write, prompt, message):
    shutil.rmtree(finished / "checkpoints")  # the prompt is checked before they are read
    with pytest.raises(UserError, match=message):
        write(finished, prompt=prompt)


def test_default_prompt_depends_on_the_vocabulary():
    assert sample.check_prompt(None, "ab \n") == "\n"
    assert sample.check_prompt(None, "ab ") == " "
    assert sample.check_prompt(None, UNKNOWN + "ab") == "a"


@pytest.mark.parametrize("temperature", [math.nan, -0.5, math.inf])
def test_invalid_temperatures_raise(write, temperature):
    with pytest.raises(UserError, match="--temperature"):
        write("missing", temperature=temperature)


def test_closed_pipe_ends_the_command_silently(runs):
    command = [*COMMAND, f"--workdir={runs / 'lstm'}", "--prompt=dab", "--length=1000000"]
    pipe = subprocess.PIPE
    buffered = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONUNBUFFERED"}  # the default
    with subprocess.Popen(command, cwd=ROOT, env=buffered, stdout=pipe, stderr=pipe) as process:
        assert process.stdout.read(50).startswith(b"dab")  # long before it is done
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == b""
