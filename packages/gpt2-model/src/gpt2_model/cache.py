"""The keys and values of earlier tokens, so that each token of a text is computed only once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2_model.model import GPT


class KVCache:
    """Keys and values of the tokens so far, for rows of different lengths that all start at position 0.

    Rows are filled from the left, so a row's positions and its attention do not depend on the rows beside it.

    Args:
        model: the model to cache for, with its layers and heads, on its device.
        batch: number of rows.
        capacity: longest row, in tokens. Memory: 2 * n_layer * n_embd values for each token of each row.
    """

    def __init__(self, model: GPT, batch: int, capacity: int) -> None:
        config = model.config
        if capacity > config.block_size:
            raise ValueError(f"a cache of {capacity} tokens exceeds the model's context of {config.block_size}")
        shape = (config.n_layer, batch, config.n_head, capacity, config.head_dim)
        # Zeros: what is masked is multiplied by 0, and 0 * NaN is NaN.
        self.keys = torch.zeros(shape, device=model.device, dtype=model.ln_f.weight.dtype)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=model.device)
        self.empty = True

    def positions(self, time: int) -> Tensor:
        """Return the positions of the next `time` tokens of each row, (batch, time)."""
        return self.lengths[:, None] + torch.arange(time, device=self.lengths.device)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append (batch, n_head, time, head_dim) to each row; return all that a query may see, and the mask.

        The mask is None, for causal attention, if the rows were empty. Otherwise the whole cache is returned with
        a mask: its shape is the same at every step, as a compiled step needs it.
        """
        time = key.shape[2]
        if self.empty:
            self.keys[layer, :, :, :time] = key
            self.values[layer, :, :, :time] = value
            return key, value, None
        positions = self.positions(time)
        rows = torch.arange(key.shape[0], device=key.device)[:, None]
        self.keys[layer][rows, :, positions] = key.transpose(1, 2)
        self.values[layer][rows, :, positions] = value.transpose(1, 2)
        visible = torch.arange(self.keys.shape[3], device=key.device) <= positions[:, :, None]
        return self.keys[layer], self.values[layer], visible[:, None]

    def advance(self, time: int) -> None:
        """Count `time` more tokens in every row."""
        self.lengths += time
        self.empty = False

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        index = torch.tensor(rows, device=self.lengths.device)
        self.keys = self.keys[:, index]
        self.values = self.values[:, index]
        self.lengths = self.lengths[index]
