"""The evaluation of the paper: protocol, baselines, metrics, data set and user study."""
