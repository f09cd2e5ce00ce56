"""The training loop, its checkpoints, and the files of a run folder.

loop.py has the step and both phases. The attention loss is computed in bas/losses.py. checkpoints.py saves a run to
resume it; `finish` in loop.py saves the tuned model.
"""
