"""Which draws are taken, as pure functions of a seed: scoring views and unlearning draws."""
