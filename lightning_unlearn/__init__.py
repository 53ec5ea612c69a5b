"""Which training images made this picture possible? Data attribution for diffusion models by unlearning."""

__version__ = "0.1.0"
