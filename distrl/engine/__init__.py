"""DeepSpeed engines, one per part, and rank-independent checkpoints."""
