"""The training loop, and what surrounds it in a run folder.

loop.py has the step and both phases. The attention loss is computed in bas/losses.py. run_folder.py saves a run, its
metrics and its checkpoints.
"""
