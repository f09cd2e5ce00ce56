"""The studio: one local page from a photograph to new images. It reads and writes the folders of the commands alone."""
