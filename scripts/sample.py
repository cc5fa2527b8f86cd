"""Writes text with a trained character model.

    python -m scripts.sample --workdir=runs/ptb_bn_lstm --prompt="the " --length=500

It needs only the folder of the run, not the data. It draws from the best checkpoint so far, with
re-estimated population statistics if the run is finished. A run of two kinds of model has a folder
for each kind, such as runs/ptb_small/bn_lstm.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array

from experiments.datasets import corpus
from experiments.models.language_model import LanguageModel
from experiments.records import workdir
from experiments.records.checkpoints import read_best, tell_statistics
from experiments.runtime import cli, paths
from experiments.runtime.errors import UserError
from experiments.tasks import char_lm

Variables = dict[str, Any]
COLDEST = 1e-6  # lower temperatures count as 0, because logits divided by them overflow


def define_flags() -> None:
    """Defines the flags of the command."""
    paths.DEFINE_path("workdir", None, "Folder of a character model's run.", required=True)
    flags.DEFINE_string("prompt", None, "Text to continue; by default a newline, or a space.")
    flags.DEFINE_integer("length", 500, "Number of characters to draw.", lower_bound=1)
    flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 takes the most likely character.")
    flags.DEFINE_integer(
        "seed", 1, "The same seed draws the same text.", lower_bound=0, upper_bound=2**32 - 1
    )


def check_prompt(prompt: str | None, vocabulary: str) -> str:
    """The prompt; by default a newline, a space, or else the first known character.

    Raises:
      UserError: the prompt is empty, or has characters that the model does not know.
    """
    known = vocabulary.replace(corpus.UNKNOWN, "")
    if prompt is None:
        return next(character for character in "\n " + known if character in known)
    if not prompt:
        raise UserError("--prompt is empty: give at least one character, or leave the flag out")
    strange = "".join(dict.fromkeys(character for character in prompt if character not in known))
    if strange:
        lower = prompt.lower()
        hint = f"use only {known if len(known) <= 100 else known[:100] + '...'!r}"
        if set(lower) <= set(known):
            hint = f"did you mean {lower!r}?"
        raise UserError(f"--prompt has {strange!r}, which the training text lacks: {hint}")
    return prompt


def draw(logits: Array, excluded: np.ndarray, key: Array, temperature: float) -> Array:
    """Draws a symbol that is not `excluded`, by logits `[V]`; at temperature 0 the likeliest."""
    if temperature < COLDEST:
        return jnp.where(excluded, -jnp.inf, logits).argmax()
    return jax.random.categorical(key, jnp.where(excluded, -jnp.inf, logits / temperature))


def sample(
    model: LanguageModel,
    variables: Variables,
    vocabulary: str,
    prompt: str,
    temperature: float,
    seed: int,
) -> Iterator[str]:
    """Yields characters that continue the prompt, without end; never `corpus.UNKNOWN`."""
    key, noise = jax.random.split(jax.random.key(seed))
    excluded = np.array([character == corpus.UNKNOWN for character in vocabulary])

    @jax.jit
    def read_and_draw(variables: Variables, symbols: Array, carry: Any, position: int):
        """Reads symbols `[1, T]` from step `position` on; returns the carry and the next symbol."""
        carry, logits = model.apply(
            variables,
            symbols,
            initial_carry=carry,
            first_step=position,
            use_running_average=True,
            return_carry=True,
            rngs={"noise": noise},
        )
        key_here = jax.random.fold_in(key, position + symbols.shape[1])
        return carry, draw(logits[0, -1], excluded, key_here, temperature)

    symbols, carry, position = corpus.encode(prompt, vocabulary).astype(np.int32), None, 0
    while True:
        carry, symbol = read_and_draw(variables, symbols[None], carry, position)
        yield vocabulary[int(symbol)]
        position += len(symbols)
        symbols = symbol[None]


def main(_: list[str]) -> None:
    """Writes the prompt and its continuation."""
    given = flags.FLAGS
    folder = Path(given.workdir)
    if not 0 <= given.temperature < math.inf:  # refuses NaN too
        raise UserError(f"--temperature={given.temperature}: it must be a number, at least 0")
    config = workdir.read_config(folder)
    workdir.check_task(config, folder, "char_lm")
    try:
        char_lm.check(config)
    except UserError as error:
        raise UserError(f"--workdir={folder} is damaged, or of another version: {error}") from error
    vocabulary = workdir.read_record(folder)["vocabulary"]
    prompt = check_prompt(given.prompt, vocabulary)
    config.model.implementation = "auto"  # the run's may be for another device
    model = char_lm.make_model(config, len(vocabulary))
    update, variables, statistics = read_best(folder)
    tell_statistics(folder, update, statistics)
    text = sample(model, variables, vocabulary, prompt, given.temperature, given.seed)
    try:
        print(prompt, end="", flush=True)
        for character in itertools.islice(text, given.length):
            print(character, end="", flush=True)
    finally:
        print()


if __name__ == "__main__":
    cli.run(main, define_flags)
