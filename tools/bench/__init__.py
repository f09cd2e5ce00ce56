"""Measures bas against the official training loop, side by side."""
