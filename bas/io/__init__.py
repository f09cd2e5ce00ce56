"""The disk: files that are whole or absent, images, figures and settings files."""
