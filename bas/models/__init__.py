"""The networks of Stable Diffusion, written out: layers, attention, UNet, VAE and the text tower."""
