"""Model files: folders, single files and names of the hub, read into the networks or refused by name."""
