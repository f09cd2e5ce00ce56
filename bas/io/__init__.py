"""The disk: files, JSON, weights, images, figures, settings files and the files of a run."""
