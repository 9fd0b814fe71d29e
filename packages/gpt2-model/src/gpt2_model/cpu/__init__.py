"""What makes a CPU fast: operators for training, an engine in C for generation, and int8 weights."""
