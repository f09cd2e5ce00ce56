"""From prompts to images: the denoising loop and what is built on it.

sampler.py has the loop; the other files build galleries, attention maps and local editing on it.
"""
