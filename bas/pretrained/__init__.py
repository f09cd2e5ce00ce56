"""Model files: folders, single files and hub names, read into the networks or rejected by name."""
