"""Texts, vectors and neighbors of a store: what a language model and an embedder know of it."""
