"""The jobs people run; each is also a module: python -m jobs.<name>."""
