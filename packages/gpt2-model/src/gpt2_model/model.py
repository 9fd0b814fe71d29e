"""GPT-2 as a PyTorch module. Its parts and weights are named as in the Hugging Face checkpoint.

Read it from `GPT.forward` upwards: tokens -> embeddings -> blocks -> norm -> logits. `plain_attention` says in
three lines what attention is. cpu/training.py computes parts of it faster on a CPU; cache.py keeps the keys and
values of earlier tokens during generation.

Tensors are named with their shapes, one letter for each dimension:

    B  batch: sequences                  H  attention heads
    T  time: positions of the tokens     D  head_dim: width of a head, C / H
    S  positions attended to             I  mlp_dim: hidden width of the MLP, 4 C
    C  n_embd: width of the stream       V  vocab_size
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gpt2_model.activations import activation_bytes
from gpt2_model.checkpoints import load_save
from gpt2_model.checkpoints.tokenizer_files import SpecialIds
from gpt2_model.config import GPTConfig
from gpt2_model.cpu.int8 import Int8Matrix, quantize
from gpt2_model.cpu.training import causal_attention, head_loss, look_up
from gpt2_model.tokenizer import Tokenizer, model_tokenizer


def plain_attention(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Return softmax(scale * q k^T) v, (B, H, T, D): the formula of the kernels that CausalSelfAttention calls.

    In GPT-2 the scale is 1 / sqrt(D). The mask, (B, 1, T, S), is True where a query may look; without one
    attention is causal, and S is T.
    """
    if mask is None:  # each position sees itself and what came before
        mask = torch.ones(q_BHTD.shape[2], k_BHSD.shape[2], dtype=torch.bool, device=q_BHTD.device).tril()
    scores_BHTS = scale * q_BHTD @ k_BHSD.transpose(2, 3)
    weights_BHTS = scores_BHTS.masked_fill(~mask, -math.inf).softmax(dim=3)
    return weights_BHTS @ v_BHSD


def _gelu_new(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        # The same function, since 0.5 (1 + tanh(u)) = sigmoid(2u). Compiled, tanh takes 3 times as long as exp.
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
    """What attention must know of earlier tokens; KVCache implements it.

    `positions` returns the positions of the next `time` tokens, (B, T). `extend` takes a layer's keys and values
    of these tokens, (B, H, T, D); it returns all that they may attend to, (B, H, S, D), and the mask,
    (B, 1, T, S), or None for causal attention. `advance` notes that all layers have computed `time` tokens.
    """

    def positions(self, time: int) -> Tensor: ...
    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]: ...
    def advance(self, time: int) -> None: ...


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

    def forward(self, x_BTC: Tensor, cache: AttentionContext | None = None) -> Tensor:
        """Return the attention of each token to itself and earlier ones, after c_proj: (B, T, C)."""
        B, T, C = x_BTC.shape
        q_BHTD, k_BHSD, v_BHSD = (
            part_BTC.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for part_BTC in self.c_attn(x_BTC).split(C, dim=2)
        )
        mask = None
        if cache is not None:
            k_BHSD, v_BHSD, mask = cache.extend(self.layer, k_BHSD, v_BHSD)
        if self.upcast:
            q_BHTD, k_BHSD, v_BHSD = q_BHTD.float(), k_BHSD.float(), v_BHSD.float()
        if mask is None:
            y_BHTD = causal_attention(q_BHTD, k_BHSD, v_BHSD, self.scale)
        else:
            y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=mask, scale=self.scale)
        y_BTC = y_BHTD.to(x_BTC.dtype).transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y_BTC)  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear layers with an activation between them, applied to each position separately."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_dim)
        self.c_proj = nn.Linear(config.mlp_dim, config.n_embd)
        self.activation = ACTIVATION_FUNCTIONS[config.activation_function]

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTI = self.activation(self.c_fc(x_BTC))
        return self.c_proj(h_BTI)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention, then MLP, each on the normalised residual stream and added back to it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, cache: AttentionContext | None = None) -> Tensor:
        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC), cache)
        return x_BTC + self.mlp(self.ln_2(x_BTC))  # type: ignore[no-any-return]


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Return an uninitialised embedding. On "meta", nn.Embedding's initialisation imports a compiler (1.7 s)."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019). There is no dropout: pretraining recipes of this size use none.

    Attributes:
        activation_checkpointing: keep only each block's input for the backward pass, which computes the rest again
            (Chen et al. 2016). This saves memory in training; without gradients it changes nothing.
        tokenizer: that of the model's folder; else GPT-2's for a vocabulary of 50,257 to 50,304, or None.
        special_ids: what the folder says of ids that begin and end a text; a tokenizer has its own.
    """

    activation_checkpointing: bool = False
    activation_bytes = staticmethod(activation_bytes)
    tokenizer: Tokenizer | None
    special_ids: SpecialIds

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer, self.special_ids = model_tokenizer(config.vocab_size, None)
        self.wte = _embedding(config.vocab_size, config.n_embd)
        self.wpe = _embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        # If tied, the output projection is wte itself: one tensor that is counted, trained and saved once.
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if not self.wte.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights from torch's global generator, as OpenAI's code does (gpt-2, src/model.py).

        Weights are normal with deviation 0.02, positions with 0.01. The projections into the residual stream are
        divided by sqrt(2 * n_layer), since 2 * n_layer of them add up there. Biases are 0, norms 1.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
            else:
                std = 0.01 if name == "wpe.weight" else residual_std if "c_proj" in name else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, *, return_logits: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return logits and, with targets, the mean cross-entropy in nats per token.

        Args:
            tokens: (B, T) int64 ids, T at most config.block_size, else a ValueError.
            targets: (B, T) int64, the id that follows each position; -100 is ignored.
            return_logits: False, with targets: return the loss alone, as training needs it, and keep no logits.

        Returns:
            (logits (B, T, V) or None, loss () in fp32 or None).
        """
        loss_only = targets is not None and not return_logits
        x_BTC, wte_VC = look_up(self.wte, tokens, share_gradient=loss_only)
        x_BTC = self._transform(x_BTC)
        head_VC = wte_VC if self.lm_head is None else self.lm_head.weight
        if targets is not None and loss_only:
            return None, head_loss(x_BTC, head_VC, targets)  # the same loss as below
        logits_BTV, loss = F.linear(x_BTC, head_VC), None
        if targets is not None:  # in fp32: a bf16 log-sum-exp over 50,257 terms keeps two digits
            loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets.flatten())
        return logits_BTV, loss

    def hidden(self, tokens: Tensor, cache: AttentionContext | None = None) -> Tensor:
        """Return the final hidden states of tokens (B, T), after the last norm: (B, T, C).

        With a cache, `tokens` continue its rows and are added to it; the cache must have room for them.
        """
        return self._transform(self.wte(tokens), cache)

    def _transform(self, x_BTC: Tensor, cache: AttentionContext | None = None) -> Tensor:
        """Add the positions to token embeddings; apply the blocks and the last norm."""
        T = x_BTC.shape[1]
        if cache is None and self.config.block_size < T:
            raise ValueError(f"{T} tokens do not fit the model's context of {self.config.block_size}")
        positions = torch.arange(T, device=x_BTC.device) if cache is None else cache.positions(T)
        x_BTC = x_BTC + self.wpe(positions)
        recompute = self.activation_checkpointing and cache is None and torch.is_grad_enabled()
        for block in self.h:
            if recompute:  # nothing in a block is random, so there is no generator state to restore
                x_BTC = checkpoint(block, x_BTC, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTC = block(x_BTC, cache)
        if cache is not None:
            cache.advance(T)
        return self.ln_f(x_BTC)  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states: (..., C) -> (..., V)."""
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The output projection, (V, C), which is the token embedding if they are tied."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.ln_f.weight.device

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, dtype: torch.dtype = torch.float32) -> "GPT":
        """Load a Hugging Face folder, a weights file, another project's checkpoint, or a model of the hub.

        Args:
            name_or_path: a folder with config.json and safetensors or .bin weights, whole or sharded; one weights
                file with config.json next to it; a run folder of gpt2-train, from which the newest checkpoint is
                loaded; a file of nanoGPT, build-nanogpt or llm.c, without the rows that pad the vocabulary; or a
                hub name like "gpt2-medium" or "owner/model@revision", downloaded once into Hugging Face's cache.
            dtype: the type of the weights; torch.int8 quantises them, for generation and evaluation only.

        Returns:
            The model on the CPU, in eval mode.

        Raises:
            OSError: no such folder, no weights in it, or the hub cannot be reached.
            ValueError: a config this model cannot follow exactly, weights that do not fit it, or a damaged file.
        """
        is_int8 = dtype == torch.int8
        config, weights, folder = load_save.load(name_or_path, torch.float32 if is_int8 else dtype)
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            model = cls(config)
        model.tokenizer, model.special_ids = model_tokenizer(config.vocab_size, folder)
        model.load_state_dict(weights, assign=True)
        del weights  # so that quantize can free one matrix after another
        if is_int8:
            quantize(model)
        return model.eval()

    @staticmethod
    def inspect(name_or_path: str | Path) -> GPTConfig:
        """Return the config of what `from_pretrained` would load, after the same checks except of the values."""
        return load_save.inspect(name_or_path)[0]

    @staticmethod
    def inspect_with_tokenizer(name_or_path: str | Path) -> tuple[GPTConfig, Tokenizer | None]:
        """Return the config, as `inspect` does, and the tokenizer of what `from_pretrained` would load."""
        config, folder = load_save.inspect(name_or_path)
        return config, model_tokenizer(config.vocab_size, folder)[0]

    def text_tokenizer(self) -> Tokenizer:
        """Return the tokenizer for text; a ValueError says that there is none, or why it cannot be followed."""
        size, tokenizer = self.config.vocab_size, self.tokenizer
        if tokenizer is None:
            why = "put its tokenizer.json into its folder, or give token ids (in Python)"
            raise ValueError(f"the model has no tokenizer for its vocabulary of {size:,}: {why}")
        if tokenizer.problem:
            raise ValueError(tokenizer.problem)
        if tokenizer.num_base > size:
            more = (
                f"the folder's tokenizer has {tokenizer.num_base:,} tokens, the model's vocabulary only {size:,}"
            )
            raise ValueError(f"{more}: they do not belong together; give token ids (in Python)")
        return tokenizer

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an fp32 Hugging Face model folder, which transformers, vLLM and llama.cpp's converter can load."""
        if isinstance(self.wte, Int8Matrix):
            raise ValueError("an int8 model cannot be saved: load it in fp32 or bf16 to write a copy")
        load_save.save(self.config, self.state_dict(), Path(folder), self.tokenizer, self.special_ids)
