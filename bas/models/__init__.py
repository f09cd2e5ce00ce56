"""The networks of Stable Diffusion: layers, attention, UNet, VAE and text encoder."""
