"""How much memory a training step takes for activations, besides weights, gradients and optimizer state."""

import torch

from gpt2_model.config import GPTConfig
from gpt2_model.cpu.training import ROWS, kept_bytes, takes_own

# On a CPU the heap is never given back, and small tensors settle where the gradient of a token embedding was. The
# holes add up to this many embeddings, measured with 124M and micro-batches of 256 to 4,096 tokens.
HEAP_HOLES = 4.5


def activation_bytes(
    config: GPTConfig, batch: int, time: int, *, device_type: str, bf16: bool, compiled: bool, checkpointing: bool
) -> tuple[int, int, int]:
    """Return the bytes of training on (batch, time) tokens besides weights, gradients and the optimizer's state.

    They are counted from the tensors that autograd keeps (torch.autograd.graph.saved_tensors_hooks lists them).
    Tests hold the figures of CPUs to 10 %; those of other devices are counted in the same way. `bf16` stands for
    autocast, `compiled` for torch.compile, `checkpointing` for GPT.activation_checkpointing.

    Returns:
        (blocks, head, heap): what the backward pass of the blocks needs, and under autocast the matrices in bf16;
        logits or blocks of them, the loss, and the gradients of output projection and token embedding; and holes
        between tensors that the CPU's allocator cannot use, 0 on other devices.
    """
    rows, embedding = batch * time, 4 * config.vocab_size * config.n_embd
    layer = _layer_bytes(config, time, device_type, bf16)
    blocks = config.n_layer * layer
    if checkpointing:  # each block keeps its input; only one at a time has all the rest
        blocks = config.n_layer * 4 * config.n_embd + layer
    copies = 2 * config.matrix_parameters if bf16 else 0
    if device_type == "cpu":
        # The gradient of the projection, to which the embedding's is added; a block of logits; and in fp32 the
        # padded copy of the projection, which in bf16 is one of those of all matrices.
        head = embedding * (1 if bf16 else 2) + rows * 4 * config.n_embd
        head += min(rows, ROWS) * config.vocab_size * (2 if bf16 else 4)
        return rows * blocks + copies, head, int(HEAP_HOLES * embedding)
    # Compiled, it keeps logits and their gradient in the product's type; else softmax and two gradients in fp32.
    head = embedding + rows * config.vocab_size * ((4 if bf16 else 8) if compiled else 12)
    return rows * blocks + copies, head, 0


def _layer_bytes(config: GPTConfig, time: int, device_type: str, bf16: bool) -> int:
    """Return the bytes that a block keeps per token for the backward pass.

    In fp32 it keeps the inputs and outputs of both norms, queries, keys, values, the attention's output, and the
    activation's input and output. In bf16 the norms' inputs stay fp32, and the attention's output is kept twice,
    before and after its cast. Both keep the norms' means and deviations, and a logarithm for each head. Flash
    attention keeps no scores; ours, on a CPU in bf16, keeps the probabilities instead of its output.
    """
    width, inner = config.n_embd, config.mlp_dim
    if bf16 and takes_own(device_type, torch.bfloat16, time):
        probabilities = config.n_head * kept_bytes(time) // time
        return 2 * 4 * width + 2 * (6 * width + 2 * inner) + 4 * 4 + probabilities
    tensors = 2 * 4 * width + 2 * (7 * width + 2 * inner) if bf16 else 4 * (8 * width + 2 * inner)
    return tensors + 4 * (4 + config.n_head)
