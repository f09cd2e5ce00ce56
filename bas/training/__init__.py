"""The training loop, and what surrounds it in a run folder.

loop.py has the step and both phases. The attention loss is computed in bas/losses.py. checkpoints.py saves a run to
resume it; `finish` in loop.py saves the tuned model.
"""
