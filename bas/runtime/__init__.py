"""The machine: its device, the processes that share a job, signals and the progress line."""
