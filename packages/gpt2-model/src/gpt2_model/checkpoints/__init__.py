"""Checkpoints on the disk and on the hub, to and from (GPTConfig, tensors)."""
