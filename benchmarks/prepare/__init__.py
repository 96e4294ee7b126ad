"""The ways to prepare raw events that prepare_engines.py compares."""
