"""Operator families: schemas, fakes, vmap rules. Each file is one family, and its docstring is the contract."""
