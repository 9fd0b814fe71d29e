"""The shape of a GPT-2, the four published sizes, and the operations of a training token. No torch here."""

from ast import literal_eval
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

EOT = 50256  # <|endoftext|>: comes before every document; GPT-2's only special token, and its last
PADDED = 50304  # the vocabulary size, 50,257, rounded up to a multiple of 64 and of 128, as many models have it
ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu", "tanh")


@dataclass(frozen=True)
class GPTConfig:
    """The shape and the maths of a GPT-2. The defaults are OpenAI's 124M.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3, and the
    fields of transformers' GPT2Config that change the function computed.

    Attributes:
        block_size: longest sequence, in tokens (`n_positions` in a Hugging Face config).
        vocab_size: number of token ids; 50,257 for GPT-2's own BPE.
        n_layer: number of transformer blocks.
        n_head: attention heads of a block; must divide `n_embd`.
        n_embd: width of the residual stream.
        n_inner: hidden width of the MLP; None means 4 * n_embd.
        activation_function: that of the MLP; `gelu_new` (GPT-2's own) is the tanh approximation of GELU.
        layer_norm_epsilon: added to the variance.
        scale_attn_weights: divide attention scores by sqrt(head width).
        scale_attn_by_inverse_layer_idx: also divide them by the block's number, counted from 1 (Mistral's GPT-2s).
        reorder_and_upcast_attn: compute attention scores and their softmax in fp32 whatever the rest runs in.
        tie_word_embeddings: use the token embedding as the output projection.
    """

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is bool:
                fits, needed = type(value) is bool, "true or false"
            elif field.type is float:
                fits, needed = type(value) in (float, int) and 0 < value < 1e9, "a number above 0"
            elif field.type is str:
                fits, needed = value in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"
            else:
                absent = value is None and field.name == "n_inner"
                fits, needed = absent or (type(value) is int and value > 0), "a positive whole number"
            if not fits:
                raise ValueError(f"{field.name} must be {needed}, not {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP."""
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    @property
    def matrix_parameters(self) -> int:
        """Number of parameters in the blocks' matrices, which Muon trains and autocast copies."""
        return self.n_layer * (4 * self.n_embd**2 + 2 * self.n_embd * self.mlp_dim)

    @property
    def num_parameters(self) -> int:
        """Number of all parameters, with tied embeddings counted once: 124,439,808 for the default."""
        width = self.n_embd
        head = 0 if self.tie_word_embeddings else self.vocab_size * width
        embeddings = (self.vocab_size + self.block_size) * width
        biases, norms = 5 * width + self.mlp_dim, 4 * width
        return embeddings + head + self.matrix_parameters + self.n_layer * (biases + norms) + 2 * width

    def with_fields(self, assignments: Mapping[str, str]) -> "GPTConfig":
        """Return a copy with fields replaced from text, as in `--model n_layer=4`; ValueError if one is wrong."""
        known = [field.name for field in fields(self)]
        for name in sorted(assignments.keys() - known):
            raise ValueError(f"unknown model field {name!r}: choose from {', '.join(known)}")
        return replace(self, **{name: _value(text) for name, text in assignments.items()})


def _value(text: str) -> Any:
    """Return the value that a word stands for: true, false, none, a number, or the word itself."""
    try:
        return literal_eval(text.capitalize())
    except (ValueError, SyntaxError):
        return text


PRESETS: Mapping[str, GPTConfig] = {
    "124M": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "350M": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "774M": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "1558M": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}
# The paper's names; in fact the models have 124, 355, 774 and 1,558 million parameters.
PAPER_NAMES = {"117M": "124M", "345M": "350M", "762M": "774M", "1542M": "1558M"}
# OpenAI's models of these sizes, as the hub calls them.
OPENAI_NAMES = {"124M": "gpt2", "350M": "gpt2-medium", "774M": "gpt2-large", "1558M": "gpt2-xl"}


def flops_per_token(config: GPTConfig, seq_len: int) -> int:
    """Return the operations of a training token, forward and backward: 803 million for 124M at 1,024 tokens.

    6 for each parameter, plus 6 * n_layer * n_embd * seq_len for attention, halved because it is causal. This is
    llm.c's count (train_gpt2.cu, gpt2_estimate_mfu). PaLM's appendix B, which nanoGPT follows, counts the masked
    half too and comes out at 855 million: compare MFU only between equal counts.
    """
    return 6 * config.num_parameters + 6 * config.n_layer * config.n_embd * seq_len
