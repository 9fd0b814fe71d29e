"""Read checkpoints from the disk and the hub as (GPTConfig, tensors), and write them."""
