"""What makes a CPU fast: operators for training, an engine in C for generation, int8, memory that is kept."""
