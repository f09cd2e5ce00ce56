"""Programs of this repository that are not installed with bas; each is run as `python -m tools.NAME` from its root."""
