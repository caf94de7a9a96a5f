"""Operator families: schemas, fakes, vmap rules. elbo.py and levels.py are one family each, and their docstrings the
contract; registry.py makes them known to PyTorch."""
