"""The evaluation of the paper: protocol, baselines, metrics, data set and user study.

runner.py runs and scores trials, protocol.py lists them, metrics.py measures images.
"""
