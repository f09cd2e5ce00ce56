"""Trains the miniature Stable Diffusion of `weights/mini` from nothing."""
