"""Rows of token ids as packs in which every shared prefix stands once.

Rows are sorted by their ids. What a row adds to the one before it is then all that is new of it, and these parts, one
after another, are the tokens of a prefix tree, depth first: every token before the tokens that follow it.

    rows       sorted     packed      1 2 | 3 | 4 5 | 7
    1 2 4 5    1 2 3      positions   0 1   2   2 3   0
    1 2 3      1 2 4 5    ends        5 5   3   5 5   6
    7          7

A token sees the tokens up to itself whose branch has not ended: key ≤ query < ends[key].
"""

from __future__ import annotations

import functools
import sys
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional

Values: TypeAlias = Tensor | Sequence[int] | Sequence[bool]


class Segment(NamedTuple):
    """Packed tokens start, ..., start + length - 1: no row branches off within. parent: of the segments, or -1."""

    start: int
    length: int
    parent: int


class Paths(NamedTuple):
    """The tokens that each of S segments sees: those of its path from the root, itself the last; int64, on the CPU.

    keys: (G,), the packed tokens of all paths, one after another. cu_queries, cu_keys: (S + 1,), where segments begin
    among the packed tokens, and their paths among the keys. longest_segment, longest_path: in tokens.
    """

    keys: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    longest_segment: int
    longest_path: int


@dataclass(frozen=True, eq=False)
class Pack:
    """Rows for one forward. All tensors are int64, on the CPU until :meth:`to` moves them.

    rows: which of the rows that were packed stand here, ascending. places: for each, the packed index (L,) of its
    tokens. input_ids, position_ids: (N,), depth first; a branch goes on from its parent's positions. segments: in the
    order of the tokens.

    The targets are the tokens that were asked for, row by row: target_rows (M,) and target_positions (M,) say which,
    target_ids (M,) are the tokens, and hidden_index (M,) is the packed token before each, whose hidden state predicts
    it. One hidden state predicts the first token of every branch after it. target_numbers (M,) count the targets of all
    rows that were packed, row by row: where each stands in a tensor for all packs, whatever shares its prefix. Among M,
    the targets of a row begin at cu_seqlens (S + 1,), for the S rows that have some. targets: how many there are in all
    packs of the call.
    """

    rows: tuple[int, ...]
    places: tuple[Tensor, ...]
    input_ids: Tensor
    position_ids: Tensor
    segments: tuple[Segment, ...]
    target_rows: Tensor
    target_positions: Tensor
    target_ids: Tensor
    target_numbers: Tensor
    hidden_index: Tensor
    cu_seqlens: Tensor
    targets: int

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device | str) -> Pack:
        """The same with its tensors on another device."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in held.items() if isinstance(value, Tensor)}
        return replace(self, places=tuple(place.to(device) for place in self.places), **moved)

    @functools.cached_property
    def ends(self) -> Tensor:
        """(N,): behind the last packed token that sees each token."""
        after = [start + length for start, length, _ in self.segments]
        for index in reversed(range(len(after))):  # children stand behind their parent
            parent = self.segments[index].parent
            if parent >= 0:
                after[parent] = max(after[parent], after[index])
        with torch.inference_mode(False):  # it is kept, and a later pass may have gradients
            lengths = torch.tensor([segment.length for segment in self.segments])
            return torch.tensor(after).repeat_interleave(lengths)

    @functools.cached_property
    def paths(self) -> Paths:
        """What each segment sees, one after another."""
        parts: list[tuple[int, int]] = []
        seen = []
        for number in range(len(self.segments)):
            path = [self.segments[one] for one in self.path(number)]
            parts += ((start, length) for start, length, _ in path)
            seen.append(sum(length for _, length, _ in path))
        starts, lengths = torch.tensor(parts).T
        keys = torch.arange(int(lengths.sum())) + (starts - lengths.cumsum(0) + lengths).repeat_interleave(lengths)
        queries = torch.tensor([segment.length for segment in self.segments])
        cu_queries, cu_keys = (functional.pad(one.cumsum(0), (1, 0)) for one in (queries, torch.tensor(seen)))
        return Paths(keys, cu_queries, cu_keys, int(queries.max()), max(seen))

    def path(self, segment: int) -> list[int]:
        """The segments that one sees, from the root to itself."""
        path = []
        while segment >= 0:
            path.append(segment)
            segment = self.segments[segment].parent
        return path[::-1]


def pack_rows(
    rows: Tensor | Sequence[Values],
    *,
    budget: int,
    mask: Tensor | None = None,
    targets: Tensor | Sequence[Values] | None = None,
) -> list[Pack]:
    """Pack rows of token ids into as few tokens as the budget lets them share.

    Prefixes are found by the ids alone, to any depth. A tree of more tokens than the budget is cut where its rows share
    least, and each part has the prefix; then the largest part goes first, each into the first pack with room for it. A
    row longer than the budget is a pack alone, with the rows that are equal to it or a prefix of it. The order of
    equal rows decides nothing.

    Args:
        rows: sequences or (L,) tensors of ids of at least 0, each with a token or more; or a padded (B, L) integer
            tensor.
        budget: the most tokens in a pack.
        mask: (B, L), bool or 0/1, for padded rows: which entries are tokens. Default: all.
        targets: for each row, or as (B, L), bool or 0/1 for each token: whether its log p is asked for. A row's first
            token has none. Default: all tokens but the first.

    Returns:
        The packs; every row is in one of them.

    Raises:
        TypeError, ValueError: in one line, for what these are not.
    """
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ValueError(f"budget: expected a number of tokens of at least 1, got {budget!r}")
    ids, wanted = _read(rows, mask, targets)
    # Bytes of equally wide big-endian numbers compare as the numbers do, in one call for a row.
    keys = [_key(row) for row in ids]
    order = sorted(range(len(ids)), key=keys.__getitem__)
    shared = [0, *(_common(ids[one], ids[other]) for one, other in pairwise(order))]
    parts = _parts([len(ids[row]) for row in order], shared, budget)
    first = [0, *accumulate(int(asked.sum()) for asked in wanted)]
    return [_pack(chosen, order, shared, ids, wanted, first) for chosen in _fill(parts, budget)]


def pack_responses(
    prompts: Sequence[Values],
    responses: Sequence[Values],
    *,
    budget: int,
    device: torch.device | str = "cpu",
) -> list[Pack]:
    """:func:`pack_rows` of each prompt with its response behind it; the targets are the responses' tokens, all of them.

    Packs of other prompts before the same responses (the teacher's) share other prefixes, and have the same targets in
    the same order: target_numbers count through the responses one after another, target_rows says which.

    Args:
        prompts: token ids of at least 0, one sequence or (L,) tensor with a token or more for each response.
        responses: token ids. An empty response is in no pack; one of them at least has a token.
        budget: the most tokens in a pack.
        device: of the packs' tensors.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it expects.
    """
    for name, given in (("prompts", prompts), ("responses", responses)):
        if isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a sequence of rows without padding, got a {tuple(given.shape)} tensor")
    if len(prompts) != len(responses):
        raise ValueError(f"responses: expected one for each of {len(prompts)} prompts, got {len(responses)}")
    kept, rows, targets = [], [], []
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        before, after = _vector("prompts", number, prompt), _vector("responses", number, response)
        if not len(before):
            raise ValueError(f"prompts: row {number} has no token, expected one that predicts the response's first")
        if len(after):
            kept.append(number)
            rows.append(torch.cat([before, after]))
            targets.append(torch.arange(len(rows[-1])) >= len(before))
    if not kept:
        raise ValueError(f"responses: expected a token in one of them at least, got {len(responses)} empty ones")
    number_of = torch.tensor(kept)
    return [
        replace(pack, rows=tuple(kept[row] for row in pack.rows), target_rows=number_of[pack.target_rows]).to(device)
        for pack in pack_rows(rows, budget=budget, targets=targets)
    ]


# ------------------------------------------------------------------------------------------------------------ the rows


def _read(
    rows: Tensor | Sequence[Values], mask: Tensor | None, targets: Tensor | Sequence[Values] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """For each row its ids (L,) int64 and which of them are asked for (L,) bool, checked."""
    if isinstance(rows, Tensor):
        ids, wanted = _unpadded(rows, mask, targets)
    elif mask is not None:
        raise ValueError("mask: expected none for rows that are not padded")
    else:
        ids = [_vector("rows", number, row) for number, row in enumerate(rows)]
        if targets is None:
            wanted = [torch.ones(len(row), dtype=torch.bool) for row in ids]
            for row in wanted:
                row[:1] = False
        else:
            wanted = [_vector("targets", number, row).bool() for number, row in enumerate(targets)]
    if not ids:
        raise ValueError("rows: expected at least one")
    if len(wanted) != len(ids):
        raise ValueError(f"targets: expected one entry for each of {len(ids)} rows, got {len(wanted)}")
    for number, (row, asked) in enumerate(zip(ids, wanted, strict=True)):
        if not len(row):
            raise ValueError(f"rows: row {number} has no token")
        if len(asked) != len(row):
            raise ValueError(f"targets: row {number} has {len(row)} tokens, got {len(asked)} entries")
        if asked[0]:
            raise ValueError(f"targets: row {number} asks for its first token, which nothing predicts")
    return ids, wanted


def _unpadded(
    rows: Tensor, mask: Tensor | None, targets: Tensor | Sequence[Values] | None
) -> tuple[list[Tensor], list[Tensor]]:
    if rows.ndim != 2 or rows.is_floating_point() or rows.dtype == torch.bool:
        raise TypeError(f"rows: expected (B, L) integers, got {tuple(rows.shape)} {rows.dtype}")
    for name, given in (("mask", mask), ("targets", targets)):
        if given is not None and (not isinstance(given, Tensor) or given.shape != rows.shape):
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"{name}: expected {tuple(rows.shape)} as the rows, got {got}")
    rows = rows.detach().cpu().long()
    valid = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask.detach().cpu().bool()
    if targets is None:
        # The first token of a row is the first that is valid.
        asked = valid & (valid.cumsum(1) > 1)
    else:
        asked = cast(Tensor, targets).detach().cpu().bool()
        if (asked & ~valid).any():
            raise ValueError(f"targets: {int((asked & ~valid).sum())} of them are masked")
    pairs = list(zip(rows, asked, valid, strict=True))
    ids = [_vector("rows", number, row[kept]) for number, (row, _, kept) in enumerate(pairs)]
    return ids, [one[kept] for _, one, kept in pairs]


def _vector(name: str, number: int, row: Values) -> Tensor:
    """(L,) int64 of one row, of at least 0."""
    if isinstance(row, Tensor):
        if row.ndim != 1 or row.is_floating_point():
            raise TypeError(f"{name}: row {number}: expected (L,) integers, got {tuple(row.shape)} {row.dtype}")
        vector = row.detach().cpu().long()
    else:
        try:
            numbers = array("q", row)
        except (TypeError, OverflowError) as error:
            raise TypeError(f"{name}: row {number}: expected integers: {error}") from None
        vector = torch.frombuffer(numbers, dtype=torch.int64) if numbers else torch.empty(0, dtype=torch.int64)
    if len(vector) and int(vector.min()) < 0:
        raise ValueError(f"{name}: row {number} has {int(vector.min())}, expected integers of at least 0")
    return vector


def _key(row: Tensor) -> bytes:
    numbers = array("q", row.tolist())
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers.tobytes()


def _common(one: Tensor, other: Tensor) -> int:
    """The length of the longest common prefix."""
    length = min(len(one), len(other))
    differ = (one[:length] != other[:length]).nonzero()
    return int(differ[0]) if len(differ) else length


# ----------------------------------------------------------------------------------------------------------- the packs


class _Part(NamedTuple):
    """Sorted rows first, ..., last, and the tokens of their tree."""

    first: int
    last: int
    tokens: int


def _parts(lengths: list[int], shared: list[int], budget: int) -> list[_Part]:
    """Neighbours that share most are joined first, while their tree keeps to the budget or costs nothing more."""
    new = list(accumulate(length - common for length, common in zip(lengths, shared, strict=True)))

    def joined(first: int, last: int) -> _Part:
        return _Part(first, last, lengths[first] + new[last] - new[first])

    # Each part, by its first and by its last row.
    at_first = {row: joined(row, row) for row in range(len(lengths))}
    at_last = dict(at_first)
    for row in sorted(range(1, len(lengths)), key=lambda row: -shared[row]):
        left, right = at_last[row - 1], at_first[row]
        both = joined(left.first, right.last)
        if shared[row] and both.tokens <= max(budget, left.tokens, right.tokens):
            del at_last[row - 1], at_first[row]
            at_first[both.first] = at_last[both.last] = both
    return list(at_first.values())


def _fill(parts: list[_Part], budget: int) -> list[list[_Part]]:
    """First fit, decreasing."""
    packs: list[list[_Part]] = []
    room: list[int] = []
    for part in sorted(parts, key=lambda part: -part.tokens):
        number = next((number for number, left in enumerate(room) if part.tokens <= left), None)
        if number is None:
            number = len(packs)
            packs.append([])
            room.append(budget)
        packs[number].append(part)
        room[number] -= part.tokens
    return packs


def _pack(
    parts: list[_Part],
    order: list[int],
    shared: list[int],
    ids: list[Tensor],
    wanted: list[Tensor],
    first: list[int],
) -> Pack:
    places: dict[int, Tensor] = {}
    tokens, positions, before = [], [], {}  # before: of the first packed token of each new part, the one it follows
    starts: set[int] = set()
    size, place, above = 0, torch.empty(0, dtype=torch.int64), 0
    for sorted_row in (row for part in sorted(parts) for row in range(part.first, part.last + 1)):
        row = order[sorted_row]
        # Parts of one tree that meet here share what all rows between them share.
        common = min(shared[above + 1 : sorted_row + 1]) if places else 0
        added = len(ids[row]) - common
        last = int(place[common - 1]) if common else -1
        if common:
            starts.add(last + 1)
        if added:
            starts.add(size)
            before[size] = last
        place = torch.cat([place[:common], torch.arange(size, size + added)])
        places[row] = place
        tokens.append(ids[row][common:])
        positions.append(torch.arange(common, common + added))
        size, above = size + added, sorted_row
    begins = sorted(starts - {size})
    segments = tuple(
        Segment(start, end - start, bisect_right(begins, before.get(start, start - 1)) - 1)
        for start, end in pairwise([*begins, size])
    )
    rows = tuple(sorted(places))
    asked = [wanted[row].nonzero()[:, 0] for row in rows]
    counts = torch.tensor([len(one) for one in asked])
    return Pack(
        rows=rows,
        places=tuple(places[row] for row in rows),
        input_ids=torch.cat(tokens),
        position_ids=torch.cat(positions),
        segments=segments,
        target_rows=torch.tensor(rows).repeat_interleave(counts),
        target_positions=torch.cat(asked),
        target_ids=torch.cat([ids[row][one] for row, one in zip(rows, asked, strict=True)]),
        target_numbers=torch.cat([torch.arange(first[row], first[row + 1]) for row in rows]),
        hidden_index=torch.cat([places[row][one - 1] for row, one in zip(rows, asked, strict=True)]),
        cu_seqlens=functional.pad(counts[counts > 0].cumsum(0), (1, 0)),
        targets=first[-1],
    )
