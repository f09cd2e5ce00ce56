"""From prompts to images: the denoising loop, grids, attention maps and local editing.

sampler.py has the loop. The other files build on it.
"""
