"""Break-A-Scene in plain PyTorch: several concepts out of one photograph (Avrahami et al. 2023)."""

__version__ = "0.1.0"
