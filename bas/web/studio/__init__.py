"""The studio: one local page from a photograph to pictures. It reads and writes the folders of the commands alone."""
