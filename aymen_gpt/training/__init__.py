"""Batches -> checkpoints and curves: the training loop and what it needs."""
