"""The machine: device, processes that share a job, signals and the progress line."""
