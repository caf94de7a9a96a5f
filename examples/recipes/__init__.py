"""The losses of public VAE trainers, each as one call of `fused_elbo`. Not part of the installed package."""
