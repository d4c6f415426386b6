"""Training one adapter: where it starts, its batches, loss, checkpoints."""
