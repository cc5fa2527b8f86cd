"""PyTorch's layers for the benchmark: BN-LSTM as an eager loop, and `torch.nn.LSTM`.

Imported only where PyTorch is installed.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import rnn

from experiments.benchmarking.timing import Program


def flip_sequences(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverses `x` `[T, B, ...]` in time; with lengths `[B]`, the padding stays at the end."""
    if lengths is None:
        return x.flip(0)
    t = torch.arange(x.shape[0], device=x.device)[:, None]
    source = torch.where(t < lengths, lengths - 1 - t, t)
    return x.take_along_dim(source.reshape(source.shape + (1,) * (x.ndim - 2)), dim=0)


class BNLSTM(torch.nn.Module):
    """`bnlstm_jax.BNLSTM` in training, as a plain PyTorch loop over time steps.

    Parameters and statistics have the same names and shapes. With lengths, finished rows keep their
    state but count in all statistics, as with `mask_statistics=False`: PyTorch's batch
    normalisation has no mask. That is cheaper than counting valid rows only.

    Args:
      features: number of hidden units H.
      inputs: features of dense inputs, or number of symbols.
      steps: number of time steps with statistics of their own.
      symbols: inputs are integers.
      reverse: run from the last valid step to the first; outputs keep the order of the inputs.
    """

    def __init__(
        self, features: int, inputs: int, steps: int, symbols: bool = False, reverse: bool = False
    ) -> None:
        super().__init__()
        self.symbols, self.reverse = symbols, reverse
        gates = 4 * features
        parameters = {
            "input_kernel": torch.randn(inputs, gates) / inputs**0.5,
            "recurrent_kernel": torch.randn(features, gates) / features**0.5,
            "bias": torch.zeros(gates),
            "cell_bias": torch.zeros(features),
            "initial_hidden": torch.zeros(features),
            "initial_cell": torch.zeros(features),
        }
        for term, size in (("input", gates), ("recurrent", gates), ("cell", features)):
            parameters[f"{term}_scale"] = torch.full((size,), 0.1)
            self.register_buffer(f"{term}_mean", torch.zeros(steps, size))
            self.register_buffer(f"{term}_var", torch.ones(steps, size))
        for name, value in parameters.items():
            self.register_parameter(name, torch.nn.Parameter(value))

    def normalize(self, term: str, x: Tensor, t: int, shift: Tensor | None = None) -> Tensor:
        """Equation 5 for a term `[B, F]` at time step t."""
        mean, var = getattr(self, f"{term}_mean")[t], getattr(self, f"{term}_var")[t]
        scale = getattr(self, f"{term}_scale")
        return functional.batch_norm(x, mean, var, scale, shift, training=True, momentum=0.01)

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Maps sequences `[B, T, D]`, or symbols `[B, T]`, to outputs `[B, T, H]`."""
        x = inputs.transpose(0, 1)
        if self.reverse:
            x = flip_sequences(x, lengths)
        steps, batch = x.shape[:2]
        kernel = self.input_kernel
        input_terms = functional.embedding(x, kernel) if self.symbols else x @ kernel
        valid = [None] * steps
        if lengths is not None:
            valid = (torch.arange(steps, device=x.device)[:, None] < lengths)[..., None].unbind(0)
        h = self.initial_hidden.expand(batch, -1)
        c = self.initial_cell.expand(batch, -1)
        outputs = []
        # Not input_terms[t]: the backward pass of each indexing would fill an array of all steps.
        for t, (input_term, goes_on) in enumerate(zip(input_terms.unbind(0), valid, strict=True)):
            total = self.normalize("recurrent", h @ self.recurrent_kernel, t)
            total = total + self.normalize("input", input_term, t, self.bias)
            f, i, o, g = total.chunk(4, -1)
            new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            c = new_c if goes_on is None else torch.where(goes_on, new_c, c)
            new_h = torch.sigmoid(o) * torch.tanh(self.normalize("cell", c, t, self.cell_bias))
            h = new_h if goes_on is None else torch.where(goes_on, new_h, h)
            outputs.append(h)
        y = torch.stack(outputs)
        return (flip_sequences(y, lengths) if self.reverse else y).transpose(0, 1)


class Pass(NamedTuple):
    """A training pass.

    Attributes:
      features: hidden units H.
      inputs: `[B, T, D]`, or with `vocab_size` symbols `[B, T]`.
      lengths: valid steps `[B]`, for layers in both directions; None for one direction.
      vocab_size: number of symbols.
      rate: learning rate of an update; None for only the forward pass. An update changes dense
        inputs of several features too.
      device: `cpu` or `cuda`.
      autocast: PyTorch's autocast chooses what is bfloat16; else everything is float32.
    """

    features: int
    inputs: np.ndarray
    lengths: np.ndarray | None
    vocab_size: int | None
    rate: float | None
    device: str
    autocast: bool


def candidates(given: Pass) -> dict[str, Callable[[], Program]]:
    """Functions that make the programs of layers, by name."""
    precision = "autocast" if given.autocast else "float32"
    return {
        f"PyTorch BN-LSTM, eager, {precision}": functools.partial(eager_bn_lstm, given),
        f"torch.nn.LSTM, {precision}": functools.partial(own_lstm, given),
    }


def eager_bn_lstm(given: Pass) -> Program:
    """A pass of `BNLSTM`, or of one for each direction."""
    torch.manual_seed(0)
    x, dense = batch_tensors(given)
    lengths = None if given.lengths is None else torch.from_numpy(given.lengths).to(given.device)
    layers = torch.nn.ModuleList(
        BNLSTM(given.features, dense.shape[2], x.shape[1], given.vocab_size is not None, reverse)
        for reverse in ((False,) if lengths is None else (False, True))
    ).to(given.device)

    def outputs() -> Tensor:
        return torch.cat([layer(x, lengths) for layer in layers], -1)

    return make_program(given, outputs, layers, x)


def own_lstm(given: Pass) -> Program:
    """A pass of `torch.nn.LSTM`."""
    torch.manual_seed(0)
    x, dense = batch_tensors(given)
    both = given.lengths is not None
    layer = torch.nn.LSTM(dense.shape[2], given.features, batch_first=True, bidirectional=both)
    layer.to(given.device)

    def outputs() -> Tensor:
        if not both:
            return layer(dense)[0]
        packed = rnn.pack_padded_sequence(
            dense, torch.from_numpy(given.lengths), batch_first=True, enforce_sorted=False
        )
        y, _ = rnn.pad_packed_sequence(layer(packed)[0], batch_first=True, total_length=x.shape[1])
        return y

    return make_program(given, outputs, layer, x)


def batch_tensors(given: Pass) -> tuple[Tensor, Tensor]:
    """Inputs unchanged, and dense inputs, with symbols as one-hot vectors."""
    x = torch.from_numpy(given.inputs).to(given.device)
    if given.vocab_size is None:
        return x, x
    return x, functional.one_hot(x.long(), given.vocab_size).float()


def make_program(
    given: Pass, outputs: Callable[[], Tensor], layer: torch.nn.Module, x: Tensor
) -> Program:
    """The program that computes outputs and, with a learning rate, makes an update."""
    cuda = given.device == "cuda"
    if cuda:
        torch.set_float32_matmul_precision("high")  # TF32, which is XLA's default too
    learned = list(layer.parameters())
    if given.vocab_size is None and x.shape[2] > 1:
        learned.append(x.requires_grad_())

    def run() -> None:
        with (
            torch.set_grad_enabled(given.rate is not None),
            torch.autocast(given.device, torch.bfloat16, enabled=given.autocast),
        ):
            y = outputs()
        if given.rate is not None:
            gradients = torch.autograd.grad(y.float().square().mean(), learned)
            with torch.no_grad():
                for parameter, gradient in zip(learned, gradients, strict=True):
                    parameter.add_(gradient, alpha=-given.rate)
        if cuda:
            torch.cuda.synchronize()

    return Program(run, peak_memory(run) if cuda else None)


def peak_memory(run: Callable[[], None]) -> int:
    """Bytes of GPU memory that a run needs beyond those already allocated."""
    run()  # libraries keep some memory from their first use on
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before
