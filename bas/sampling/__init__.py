"""From prompts to images: the denoising loop and what is built on it."""
