"""Modules of plain torch with flat keyword arguments."""
