"""Recurrent batch normalisation for Flax: LSTMs normalised at every time step.

"Recurrent Batch Normalization", Cooijmans, Ballas, Laurent, Gulcehre, Courville; ICLR 2017.
"""

from bnlstm_jax.batch_norm import CURRENT_BATCH_STATS, BatchNorm
from bnlstm_jax.cells import BNLSTMCell, BNSimpleCell, LNLSTMCell, LSTMCell
from bnlstm_jax.layers import BNLSTM, LNLSTM, LSTM
from bnlstm_jax.population import estimate_population_statistics

__version__ = "0.1.0"

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
    "estimate_population_statistics",
]
