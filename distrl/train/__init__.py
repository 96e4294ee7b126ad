"""The worker side of training, and evaluation."""
