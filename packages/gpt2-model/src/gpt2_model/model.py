"""GPT-2 as a PyTorch module. Names of parts and weights are those of the Hugging Face checkpoint."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gpt2_model.activations import activation_bytes
from gpt2_model.attention import causal_attention
from gpt2_model.config import GPTConfig
from gpt2_model.head_loss import head_loss
from gpt2_model.tied import look_up


def _gelu_new(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        # The same function, as 0.5 (1 + tanh(u)) = sigmoid(2u): the compiler's tanh takes three times its exp.
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    return F.gelu(x, approximate="tanh")


ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": _gelu_new,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class AttentionContext(Protocol):
    """Where tokens stand and what they see, if not themselves and what came before: decoding.KVCache is one."""

    def positions(self, time: int) -> Tensor:
        """Of the next `time` tokens: (batch, time)."""

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of these tokens -> all that they may look at, and the mask; None for a causal one."""

    def advance(self, time: int) -> None:
        """All layers are through with `time` tokens."""


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which each position sees itself and what came before."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.upcast = config.reorder_and_upcast_attn

    def forward(self, x: Tensor, cache: AttentionContext | None = None) -> Tensor:
        """x: (batch, time, n_embd) -> the same shape."""
        batch, time, width = x.shape
        # (batch, time, 3 * width) -> three of (batch, n_head, time, head_dim)
        query, key, value = (
            part.view(batch, time, self.n_head, width // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(width, dim=2)
        )
        mask = None
        if cache is not None:
            key, value, mask = cache.extend(self.layer, key, value)
        if self.upcast:
            query, key, value = query.float(), key.float(), value.float()
        if mask is None:
            y = causal_attention(query, key, value, self.scale)
        else:
            y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
        y = y.to(x.dtype).transpose(1, 2).reshape(batch, time, width)
        return self.c_proj(y)  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear layers with an activation between them, on each position alone."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_dim)
        self.c_proj = nn.Linear(config.mlp_dim, config.n_embd)
        self.activation = ACTIVATION_FUNCTIONS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, time, n_embd) -> the same shape."""
        return self.c_proj(self.activation(self.c_fc(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention, then MLP, each on the normalised residual stream and added back to it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: AttentionContext | None = None) -> Tensor:
        """x: (batch, time, n_embd) -> the same shape."""
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Not drawn yet: nn.Embedding would, and on the meta device torch imports its compiler for that, 1.7 s."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019). There is no dropout: pretraining recipes of this size use none.

    Attributes:
        activation_checkpointing: keep only each block's input for the backward, which computes the rest again
            (Chen et al. 2016). For training in less memory; without gradients it changes nothing.
    """

    activation_checkpointing: bool = False
    activation_bytes = staticmethod(activation_bytes)

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = _embedding(config.vocab_size, config.n_embd)
        self.wpe = _embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        # Tied, the output projection is wte itself: one tensor, counted, trained and saved once.
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if not self.wte.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights from torch's global generator, as OpenAI's code does (gpt-2, src/model.py).

        Normal with deviation 0.02, positions 0.01; the projections back into the residual stream are divided
        by sqrt(2 * n_layer), since that many of them add up in it. Biases 0, norms 1.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                is_norm_weight = name.endswith("weight")
                nn.init.constant_(parameter, 1.0 if is_norm_weight else 0.0)
            else:
                std = 0.01 if name == "wpe.weight" else residual_std if "c_proj" in name else 0.02
                nn.init.normal_(parameter, std=std)

    def hidden(self, tokens: Tensor, cache: AttentionContext | None = None) -> Tensor:
        """Final hidden states: tokens (batch, time) of ids -> (batch, time, n_embd), after the last norm.

        With a cache, `tokens` continue the rows that it holds, and are added to it; the caller sees to it that
        they fit.

        Raises:
            ValueError: more tokens than `config.block_size`, and no cache.
        """
        return self._hidden(self.wte(tokens), cache)

    def _hidden(self, embedded: Tensor, cache: AttentionContext | None = None) -> Tensor:
        """Of tokens that are looked up already, (batch, time, n_embd)."""
        time = embedded.shape[1]
        if cache is None and time > self.config.block_size:
            raise ValueError(f"{time} tokens do not fit the model's context of {self.config.block_size}")
        positions = torch.arange(time, device=embedded.device) if cache is None else cache.positions(time)
        x = embedded + self.wpe(positions)
        again = self.activation_checkpointing and cache is None and torch.is_grad_enabled()
        for block in self.h:
            # Nothing in a block is random, so there is no generator's state to restore.
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if again else block(x, cache)
        if cache is not None:
            cache.advance(time)
        return self.ln_f(x)  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary: (..., n_embd) -> (..., vocab_size)."""
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The output projection, (vocab_size, n_embd): the token embedding where they are tied."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, *, return_logits: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits and, with targets, the mean cross-entropy in nats per token.

        Args:
            tokens: (batch, time) int64 ids.
            targets: (batch, time) int64 ids that should follow each position; -100 counts for nothing.
            return_logits: False in training, where nobody reads them: they need not be kept then.

        Returns:
            (logits (batch, time, vocab_size) or None, loss () in fp32 or None).

        Raises:
            ValueError: more positions than `config.block_size`.
        """
        if targets is not None and not return_logits and tokens.device.type == "cpu":
            if torch.is_grad_enabled():
                embedded, tied = look_up(self.wte.weight, tokens)
                weight = tied if self.lm_head is None else self.lm_head.weight
            else:
                embedded, weight = self.wte(tokens), self.head_weight
            return None, head_loss(self._hidden(embedded).flatten(0, 1), weight, targets.flatten())
        hidden = self.hidden(tokens)
        logits = self.head(hidden)
        loss = None
        if targets is not None:
            # In fp32: a bf16 log-sum-exp over 50,257 terms keeps two digits.
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        return (logits if return_logits else None), loss

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.ln_f.weight.device

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, dtype: torch.dtype = torch.float32) -> "GPT":
        """The model in a Hugging Face folder, a weights file, another project's checkpoint, or on the hub.

        A folder holds config.json and safetensors or .bin weights, whole or in shards; a .safetensors or .bin file
        has its config.json beside it. nanoGPT's ckpt.pt, llm.c's .bin and OpenAI's TensorFlow folder are read too;
        the rows by which nanoGPT and llm.c pad the vocabulary to 50,304 are dropped.
        Names like "gpt2-medium" or "openai-community/gpt2" are downloaded once into Hugging Face's cache.
        Weights are converted to `dtype`; torch.int8 quantises them, for generation and evaluation only. The model
        comes in eval mode, on the CPU.

        Raises:
            FileNotFoundError: no such folder, or no weights in it.
            OSError: the hub cannot be reached, or a download broke off.
            ValueError: a config this model cannot follow exactly, weights that do not fit it, or a damaged file.
        """
        from gpt2_model.weights import load  # here, since weights.py builds GPTs

        if dtype != torch.int8:
            return load(name_or_path, dtype)
        from gpt2_model.quantize import quantize

        return quantize(load(name_or_path, torch.float32))

    @staticmethod
    def inspect(name_or_path: str | Path) -> GPTConfig:
        """The config of what `from_pretrained` would load, checked likewise, but for the weights' values.

        Raises: what `from_pretrained` raises.
        """
        from gpt2_model.weights import inspect

        return inspect(name_or_path)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a Hugging Face model folder, fp32, that transformers, vLLM and llama.cpp's converter load.

        Raises:
            ValueError: the model is quantised: its exact weights are those of the folder it came from.
        """
        from gpt2_model.quantize import Int8Matrix
        from gpt2_model.weights import save

        if isinstance(self.wte, Int8Matrix):
            raise ValueError("an int8 model cannot be saved: load it in fp32 or bf16 to write a copy")
        save(self, Path(folder))
