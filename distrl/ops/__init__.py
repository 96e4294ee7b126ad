"""Pure functions on tensors and ragged arrays: losses, augmentations, metrics."""
