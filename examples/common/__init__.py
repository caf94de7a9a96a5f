"""What the example scripts share: data, models, the training loop and plots. Not part of the installed package."""
