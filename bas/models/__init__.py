"""The networks of Stable Diffusion: layers, attention, UNet, VAE and text encoder.

attention.py computes the cross-attention maps, which the UNet returns.
"""
