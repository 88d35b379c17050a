"""Rows of a batch as packs: what is read of each, and where it stands in (B, T).

TRL's batches have prompts padded on the left and completions padded on the right. Packs have neither, and only rows
that a completion's token is asked of; what they give goes back to the places of TRL's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl.trainer.utils import split_tensor_dict

from egrsd_kernels.packing import Pack, pack_rows

MAX_TOKENS_PER_PACK = 8192
INDEX = "rollout_index"  # of a buffered batch: which of the generation's rollouts each row is


class Part(NamedTuple):
    """A pack, and where in (B, T) its M targets stand: rows (M,) and columns (M,).

    counted: whether they are asked for. A pack that keeps other processes company has one target that is not.
    """

    pack: Pack
    rows: Tensor
    columns: Tensor
    counted: bool = True

    @property
    def target_ids(self) -> Tensor:
        """(M,), on the device of rows and columns."""
        return self.pack.target_ids.to(self.rows.device)

    @property
    def cu_seqlens(self) -> Tensor:
        """(S + 1,): where each row's targets begin, on the same device."""
        return self.pack.cu_seqlens.to(self.rows.device)

    def of(self, values: Tensor) -> Tensor:
        """(M,): the entries (B, T) that belong to the targets."""
        return values[self.rows, self.columns]

    def put(self, into: Tensor, values: Tensor) -> None:
        """Put (M,) to their places in (B, T), and nothing where the targets do not count."""
        if self.counted:
            into[self.rows, self.columns] = values.to(into)


def parts_of(
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    *,
    budget: int,
    row_limit: float,
    as_many_as: Callable[[int], int],
) -> list[Part]:
    """The parts of input_ids (B, L) under attention_mask (B, L), whose last completion_length columns are read.

    Args:
        budget: the most tokens in a pack; a longer row is one alone.
        row_limit: the length up to which rows may stand together; a longer row is a pack alone, too.
        as_many_as: how many packs the process with the most of them has, given how many this one has.
    """
    device, first = input_ids.device, input_ids.shape[1] - completion_length
    ids, valid = input_ids.cpu(), attention_mask.cpu().bool()
    rows = valid[:, first:].any(dim=1).nonzero()[:, 0].tolist()
    columns = [valid[row].nonzero()[:, 0] for row in rows]
    short = [index for index, places in enumerate(columns) if len(places) <= row_limit]
    together = [short] if short else []
    parts = []
    for chosen in (*together, *([index] for index in range(len(rows)) if len(columns[index]) > row_limit)):
        tokens = [ids[rows[index]][columns[index]] for index in chosen]
        targets = [columns[index] >= first for index in chosen]
        for pack in pack_rows(tokens, budget=budget, targets=targets):
            numbers = [chosen[row] for row in pack.rows]
            counts = torch.tensor([int(targets[row].sum()) for row in pack.rows])
            at_rows = torch.tensor([rows[index] for index in numbers]).repeat_interleave(counts)
            at_columns = torch.cat([columns[index][columns[index] >= first] for index in numbers]) - first
            parts.append(Part(pack, at_rows.to(device), at_columns.to(device)))
    missing = max(as_many_as(len(parts)), 1) - len(parts)
    return parts + [_company(ids, valid, device) for _ in range(missing)]


def _company(ids: Tensor, valid: Tensor, device: torch.device) -> Part:
    """The smallest forward through all of a model: FSDP and ZeRO-3 wait for every process at every layer."""
    token = int(ids[valid][0])
    (pack,) = pack_rows([[token, token]], budget=2)
    nowhere = torch.zeros(1, dtype=torch.int64, device=device)
    return Part(pack, nowhere, nowhere, counted=False)


def groups_together(batches: Sequence[Mapping[str, Any]], num_generations: int) -> list[dict[str, Any]]:
    """A generation's batches with the same rollouts in another order: those of a group beside one another.

    TRL has shuffled the rollouts; the groups follow in the order in which they first appear. INDEX tells them, and is
    dropped.
    """
    joined = {name: _joined([batch[name] for batch in batches]) for name in batches[0]}
    groups = (joined.pop(INDEX) // num_generations).tolist()
    first = {group: place for place, group in reversed(list(enumerate(groups)))}
    order = sorted(range(len(groups)), key=lambda place: first[groups[place]])  # stable
    return split_tensor_dict({name: _ordered(values, order) for name, values in joined.items()}, len(batches))


def _joined(parts: list[Any]) -> Any:
    if parts[0] is None or (isinstance(parts[0], Tensor) and not parts[0].ndim):
        return parts[0]
    return torch.cat(parts) if isinstance(parts[0], Tensor) else [entry for part in parts for entry in part]


def _ordered(values: Any, order: list[int]) -> Any:
    if values is None or (isinstance(values, Tensor) and not values.ndim):
        return values
    return values[order] if isinstance(values, Tensor) else [values[place] for place in order]
