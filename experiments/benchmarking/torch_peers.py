"""What `scripts.benchmark` compares with in PyTorch: BN-LSTM as an eager loop, and torch.nn.LSTM.

Nothing else here needs PyTorch: this is imported only where it is installed.
"""

import functools
from collections.abc import Callable

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
    """`bnlstm_jax.BNLSTM` in training, as one writes it in PyTorch: a loop over time steps.

    Parameters and statistics have the same names and shapes. With lengths, finished rows keep their
    state and count in all statistics, as by `mask_statistics=False`: PyTorch's batch normalisation
    has no mask. That is cheaper than counting valid rows alone.

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
        """Equation 5, of a term `[B, F]` at time step t."""
        mean, var = getattr(self, f"{term}_mean")[t], getattr(self, f"{term}_var")[t]
        scale = getattr(self, f"{term}_scale")
        return functional.batch_norm(x, mean, var, scale, shift, training=True, momentum=0.01)

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Sequences `[B, T, D]`, or symbols `[B, T]`, to outputs `[B, T, H]`."""
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
        # Not input_terms[t]: the backward pass of each such would fill an array of all steps.
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


def programs(
    features: int,
    inputs: np.ndarray,
    lengths: np.ndarray | None,
    vocab_size: int | None,
    rate: float | None,
    device: str,
    autocast: bool,
) -> dict[str, Program]:
    """A training pass of each peer.

    Args:
      features: number of hidden units H.
      inputs: `[B, T, D]`, or with `vocab_size` symbols `[B, T]`.
      lengths: valid steps `[B]`, for layers in both directions; None for one direction.
      vocab_size: number of symbols.
      rate: learning rate of an update by gradient descent; None for the forward pass alone. Dense
        inputs of several features are updated too.
      device: `cpu` or `cuda`.
      autocast: let PyTorch choose what is bfloat16; else all is float32.
    """
    cuda = device == "cuda"
    if cuda:
        torch.set_float32_matmul_precision("high")  # TF32, which is XLA's default too
    torch.manual_seed(0)
    both = lengths is not None
    steps = inputs.shape[1]
    x = torch.from_numpy(inputs).to(device)
    dense = functional.one_hot(x.long(), vocab_size).float() if vocab_size else x
    size = dense.shape[2]
    lengths_here = torch.from_numpy(lengths).to(device) if both else None
    eager = torch.nn.ModuleList(
        BNLSTM(features, size, steps, vocab_size is not None, reverse)
        for reverse in ((False, True) if both else (False,))
    ).to(device)
    own = torch.nn.LSTM(size, features, batch_first=True, bidirectional=both).to(device)
    learned = [x.requires_grad_()] if vocab_size is None and size > 1 else []

    def run_eager() -> Tensor:
        return torch.cat([layer(x, lengths_here) for layer in eager], -1)

    def run_own() -> Tensor:
        if not both:
            return own(dense)[0]
        packed = rnn.pack_padded_sequence(
            dense, torch.from_numpy(lengths), batch_first=True, enforce_sorted=False
        )
        return rnn.pad_packed_sequence(own(packed)[0], batch_first=True, total_length=steps)[0]

    def train(outputs: Callable[[], Tensor], parameters: list[Tensor]) -> None:
        with (
            torch.set_grad_enabled(rate is not None),
            torch.autocast(device, torch.bfloat16, enabled=autocast),
        ):
            y = outputs()
        if rate is not None:
            gradients = torch.autograd.grad(y.float().square().mean(), parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.add_(gradient, alpha=-rate)
        if cuda:
            torch.cuda.synchronize()

    peers = {
        "PyTorch BN-LSTM, eager": functools.partial(
            train, run_eager, [*eager.parameters(), *learned]
        ),
        "torch.nn.LSTM": functools.partial(train, run_own, [*own.parameters(), *learned]),
    }
    precision = "autocast" if autocast else "float32"
    return {
        f"{name}, {precision}": Program(run, peak_memory(run) if cuda else None)
        for name, run in peers.items()
    }


def peak_memory(run: Callable[[], None]) -> int:
    """Bytes of the GPU that a run needs beside what was there before."""
    run()  # what libraries keep from their first use on
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before
