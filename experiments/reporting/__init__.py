"""Tables and figures of runs, beside the paper's."""
