"""Training: the loop of both phases, and all that surrounds it in a run folder."""
