"""Pack rows that begin alike into one sequence, which holds their beginning once, and batch such sequences.

    shared ids | rest of row 1 | rest of row 2 | ...

The rest of each row takes the positions that follow the shared ones, and sees only these and itself. So each
position has the same inputs as in a row of its own. HellaSwag's four endings of one context take 1.68M
positions in this way, and 3.17M one by one. Source of the idea: tree attention (SpecInfer, Miao et al. 2024).
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt2_model import EOT


@dataclass(frozen=True, slots=True)
class Row:
    """A context and the continuation to score, as token ids. An empty context stands for `<|endoftext|>`."""

    context: list[int]
    continuation: list[int]

    def inputs(self, block_size: int) -> list[int]:
        """Return all ids but the last, which predicts nothing; if that is too many, the last `block_size`."""
        return [*(self.context or [EOT]), *self.continuation][-(block_size + 1) : -1]


class RowScore(NamedTuple):
    """The score of a continuation: nats; whether all its tokens, and whether its last one, are the likeliest."""

    logprob: float
    greedy: bool
    last_greedy: bool


@dataclass(frozen=True, slots=True)
class Pack:
    """One sequence of input ids for one row or more."""

    rows: list[int]  # their numbers
    tokens: list[int]
    positions: list[int]  # each token's position in its row
    branches: list[int]  # 0 for what the rows share; 1, 2, ... for the rest of each row
    scored: list[list[int]]  # for each row, the places whose output predicts its continuation


def pack(rows: Sequence[Row], first: int, block_size: int, share: bool) -> list[Pack]:
    """Pack the rows of an item, numbered from `first` on: into one sequence if they begin alike and `share`."""
    inputs = [row.inputs(block_size) for row in rows]
    low, high = min(inputs, default=[]), max(inputs, default=[])  # all begin with what these two share
    shared = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    if shared == 0 or (len(rows) > 1 and not share):
        return [part for i, row in enumerate(rows) for part in pack([row], first + i, block_size, share)]
    whole = Pack(list(range(first, first + len(rows))), low[:shared], list(range(shared)), [0] * shared, [])
    for branch, (row, ids) in enumerate(zip(rows, inputs, strict=True), 1):
        moved = len(whole.tokens) - shared
        places = range(len(ids) - len(row.continuation), len(ids))
        whole.scored.append([place + moved if place >= shared else place for place in places])
        whole.tokens.extend(ids[shared:])
        whole.positions.extend(range(shared, len(ids)))
        whole.branches.extend([branch] * (len(ids) - shared))
    return [whole]


@dataclass(frozen=True)
class Layout:
    """What GPT.hidden takes in place of a KVCache: the tokens' positions and what they see. It stores nothing."""

    places: Tensor  # (batch, time)
    mask: Tensor  # (batch, 1, time, time), True where a position sees another

    def positions(self, time: int) -> Tensor:
        """Return each token's position in its row."""
        return self.places

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values as they are, and the mask."""
        return key, value, self.mask

    def advance(self, time: int) -> None:
        """Do nothing, as nothing is kept."""


@dataclass(frozen=True)
class Batch:
    """Packs in lines of one length; a line's packs do not see each other. Arrays: (lines, length)."""

    packs: list[Pack]  # in the order of their lines
    starts: list[int]  # where each begins, counted over all lines
    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    groups: NDArray[np.int16]  # number of the pack in its line; -1 for the padding on the right
    branches: NDArray[np.int16]

    @property
    def rows(self) -> list[int]:
        """Numbers of the rows, pack by pack."""
        return [row for part in self.packs for row in part.rows]

    @property
    def causal(self) -> bool:
        """True if plain causal attention is right: each line is one row."""
        return bool(self.groups.max() == 0 and self.branches.max() == 0)

    def layout(self, device: torch.device) -> Layout:
        """Return positions and mask for the model."""
        groups, branches = (torch.from_numpy(part).to(device) for part in (self.groups, self.branches))
        place = torch.arange(groups.shape[1], device=device)
        seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
        seen &= groups[:, None, :] == groups[:, :, None]
        seen &= place[None, :] <= place[:, None]
        return Layout(torch.from_numpy(self.positions).to(device), seen[:, None])


def lay_out(lines: Sequence[Sequence[Pack]], num_lines: int | None = None, length: int | None = None) -> Batch:
    """Lay these lines out as a batch, padded to `num_lines` of `length` tokens; None pads no more than needed."""
    needed = max(sum(len(pack.tokens) for pack in line) for line in lines)
    shape = (num_lines or len(lines), length or needed)
    tokens, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    groups, branches = np.full(shape, -1, dtype=np.int16), np.zeros(shape, dtype=np.int16)
    starts = []
    for number, line in enumerate(lines):
        start = 0
        for group, part in enumerate(line):
            where = (number, slice(start, start + len(part.tokens)))
            tokens[where], positions[where], branches[where] = part.tokens, part.positions, part.branches
            groups[where] = group
            starts.append(number * shape[1] + start)
            start += len(part.tokens)
    return Batch([part for line in lines for part in line], starts, tokens, positions, groups, branches)


def fill_lines(packs: Sequence[Pack], length: int) -> list[list[Pack]]:
    """Put packs, longest first, each into the line where it leaves the least room (best-fit decreasing)."""
    lines: list[list[Pack]] = []
    rooms: list[tuple[int, int]] = []  # room and number of each line, sorted
    for part in packs:
        place = bisect_left(rooms, (len(part.tokens), 0))
        if place == len(rooms):
            rooms.append((length, len(lines)))
            lines.append([])
        room, number = rooms.pop(place)
        lines[number].append(part)
        insort(rooms, (room - len(part.tokens), number))
    return lines
