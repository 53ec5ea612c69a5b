"""Which weights are unlearned, per-sample gradients of layers, and deltas."""
