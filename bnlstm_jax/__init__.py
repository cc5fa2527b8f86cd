"""Recurrent batch normalisation for Flax: LSTMs normalised at every time step.

"Recurrent Batch Normalization", Cooijmans, Ballas, Laurent, Gulcehre, Courville; ICLR 2017.
Equation numbers are the paper's; `bnlstm_jax/cells.py` lists the equations.
"""

from bnlstm_jax import batch_norm
from bnlstm_jax.batch_norm import BatchNorm
from bnlstm_jax.cells import BNLSTMCell, BNSimpleCell, LNLSTMCell, LSTMCell, Variant
from bnlstm_jax.layers import BNLSTM, LNLSTM, LSTM
from bnlstm_jax.population import estimate_population_statistics

__version__ = "0.1.0"

CURRENT_BATCH_STATS = batch_norm.CURRENT_BATCH_STATS
"""Name of the collection of the current batch's statistics. For `estimate_population_statistics`,
lifted transforms must list it beside `batch_stats`."""

__all__ = [
    "CURRENT_BATCH_STATS",
    "BNLSTM",
    "BNLSTMCell",
    "BNSimpleCell",
    "BatchNorm",
    "LNLSTM",
    "LNLSTMCell",
    "LSTM",
    "LSTMCell",
    "Variant",
    "estimate_population_statistics",
]
