"""Rows as a prefix tree, a model's forward over it, and the proof that each row is what it is alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from egrsd_kernels.packing import Pack, pack_rows

# -------------------------------------------------------------------------------------------------------------- trees

# Few ids, so that rows share prefixes to every depth, are prefixes of one another, and are equal.
ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=14)
FAR_IDS = st.sampled_from([0, 255, 256, 2**31, 2**62])  # whose bytes sort otherwise in the other order


def prefixes(rows: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(row[: n + 1]) for row in rows for n in range(len(row))}


def check(packs: list[Pack], rows: list[list[int]], budget: int) -> None:
    """All that a list of packs promises, by the prefixes that its tokens end."""
    assert sorted(row for pack in packs for row in pack.rows) == list(range(len(rows)))
    for pack in packs:
        mine = [rows[row] for row in pack.rows]
        ids = pack.input_ids.tolist()
        # Each row comes back, and each prefix is there once.
        for row, places in zip(mine, pack.places, strict=True):
            assert pack.input_ids[places].tolist() == row
            assert pack.position_ids[places].tolist() == list(range(len(row)))
        ending = {}
        for row, places in zip(mine, pack.places, strict=True):
            for n, place in enumerate(places.tolist()):
                assert ending.setdefault(place, tuple(row[: n + 1])) == tuple(row[: n + 1])
        assert len(pack) == len(ids) == len(ending) == len(prefixes(mine))
        # Within the budget, or a single row with what costs nothing beside it.
        longest = max(mine, key=len)
        assert len(pack) <= budget or all(row == longest[: len(row)] for row in mine)
        # A token sees the prefixes of what it ends, and nothing else.
        index = torch.arange(len(pack))
        seen = (index <= index[:, None]) & (index[:, None] < pack.ends)
        for query in range(len(pack)):
            assert seen[query].nonzero()[:, 0].tolist() == sorted(
                key for key in ending if ending[key] == ending[query][: len(ending[key])]
            )
        # So say the segments and their paths.
        assert [s.start for s in pack.segments] == [0, *torch.tensor([s.length for s in pack.segments]).cumsum(0)[:-1]]
        for number, segment in enumerate(pack.segments):
            last = segment.start + segment.length - 1
            path = [pack.segments[one] for one in pack.path(number)]
            assert path[-1] == segment
            assert [t for s in path for t in range(s.start, s.start + s.length)] == seen[last].nonzero()[:, 0].tolist()
            assert int(pack.ends[segment.start]) == int(pack.ends[last])  # no branch within


@settings(max_examples=150, deadline=None)
@given(rows=ROWS, budget=st.integers(1, 60))
def test_each_prefix_stands_once_and_every_row_comes_back(rows, budget):
    packs = pack_rows(rows, budget=budget)
    check(packs, rows, budget)
    # A tree that the budget holds is in one pack.
    for first in {row[0] for row in rows}:
        tree = [number for number, row in enumerate(rows) if row[0] == first]
        if len(prefixes([rows[number] for number in tree])) <= budget:
            assert len([pack for pack in packs if {*tree} & {*pack.rows}]) == 1


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.lists(FAR_IDS, min_size=1, max_size=6), min_size=1, max_size=8))
def test_ids_of_any_size(rows):
    check(pack_rows(rows, budget=1000), rows, 1000)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), rows=ROWS, budget=st.integers(1, 60))
def test_targets_are_read_at_the_token_before_each(data, rows, budget):
    targets = [[False, *(data.draw(st.booleans()) for _ in row[1:])] for row in rows]
    found = []
    for pack in pack_rows(rows, budget=budget, targets=targets):
        assert pack.target_rows.tolist() == sorted(pack.target_rows.tolist())
        for row, position, token, hidden in zip(
            pack.target_rows.tolist(),
            pack.target_positions.tolist(),
            pack.target_ids.tolist(),
            pack.hidden_index.tolist(),
            strict=True,
        ):
            assert token == rows[row][position]
            assert hidden == pack.places[pack.rows.index(row)][position - 1]
            found.append((row, position))
    assert sorted(found) == [(r, p) for r, row in enumerate(targets) for p, asked in enumerate(row) if asked]


@settings(max_examples=50, deadline=None)
@given(data=st.data(), rows=ROWS)
def test_padded_rows_are_the_same_rows(data, rows):
    width = max(map(len, rows)) + data.draw(st.integers(0, 3))
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        left = data.draw(st.integers(0, width - len(row)))
        ids[number, left : left + len(row)] = torch.tensor(row)
        mask[number, left : left + len(row)] = True
    found, expected = pack_rows(ids, budget=30, mask=mask.long()), pack_rows(rows, budget=30)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.rows == other.rows and one.segments == other.segments
        for name in ("input_ids", "position_ids", "target_rows", "target_positions", "target_ids", "hidden_index"):
            assert getattr(one, name).equal(getattr(other, name)), name


def test_one_hidden_state_predicts_every_branch():
    (pack,) = pack_rows([[5, 6, 7], [5, 6, 8], [5, 6]], budget=10, targets=[[0, 0, 1], [0, 0, 1], [0, 0]])
    assert pack.hidden_index.tolist() == [1, 1]
    assert pack.target_ids.tolist() == [7, 8]
    assert pack.target_rows.tolist() == [0, 1]


def test_a_tree_above_the_budget_is_cut_where_its_rows_share_least():
    system, one, two = [1] * 10, [2] * 10, [3] * 10
    rows = [[*system, *prompt, answer] for answer in range(4, 8) for prompt in (one, two)]
    packs = pack_rows(rows, budget=30)
    assert [len(pack) for pack in packs] == [24, 24]
    assert [pack.rows for pack in packs] == [(0, 2, 4, 6), (1, 3, 5, 7)]


def test_parts_of_a_cut_tree_that_meet_in_a_pack_share_again():
    # 1 1 and its longest branch fill a pack; the branches on its either side find room together.
    rows = [[1, 1, 0, 0], [1, 1, *[1] * 20], [1, 1, 2, 2]]
    packs = pack_rows(rows, budget=22)
    assert [(pack.rows, len(pack)) for pack in packs] == [((1,), 22), ((0, 2), 6)]


def test_packs_are_filled_by_the_largest_first():
    rows = [[number] * length for number, length in enumerate([4, 7, 3, 6])]
    assert [pack.rows for pack in pack_rows(rows, budget=10)] == [(1, 2), (0, 3)]


def test_a_row_longer_than_the_budget_is_a_pack_alone():
    rows = [[1] * 9, [2, 2], [1] * 9, [1] * 4, [1, 2]]
    packs = pack_rows(rows, budget=5)
    assert [(pack.rows, len(pack)) for pack in packs] == [((0, 2, 3), 9), ((1, 4), 4)]


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([], {}, "rows: expected at least one"),
        ([[1], []], {}, "rows: row 1 has no token"),
        ([[1], [3, -2]], {}, "rows: row 1 has the id -2"),
        ([[1.5]], {}, "rows: row 0: expected integers"),
        ([[1]], {"budget": 0}, "budget: expected a number of tokens of at least 1, got 0"),
        ([[1, 2]], {"targets": [[0, 1], [0]]}, "targets: expected one entry for each of 1 rows, got 2"),
        ([[1, 2]], {"targets": [[0]]}, "targets: row 0 has 2 tokens, got 1 entries"),
        ([[1, 2]], {"targets": [[1, 1]]}, "targets: row 0 asks for its first token, which nothing predicts"),
        ([[1, 2]], {"mask": torch.ones(1, 2)}, "mask: expected none for rows that are not padded"),
        (torch.ones(2, 2), {}, r"rows: expected \(B, L\) integers, got \(2, 2\) torch.float32"),
        (torch.ones(2, 2).long(), {"mask": torch.ones(2, 3)}, r"mask: expected \(2, 2\) as the rows, got \(2, 3\)"),
        (
            torch.ones(1, 3).long(),
            {"mask": torch.tensor([[0, 1, 1]]), "targets": torch.tensor([[1, 0, 1]])},
            "targets: 1 of them are masked",
        ),
    ],
)
def test_what_is_no_rows_is_said_in_a_line(rows, options, words):
    with pytest.raises((TypeError, ValueError), match=f"^{words}") as error:
        pack_rows(rows, **{"budget": 10, **options})
    assert "\n" not in str(error.value)
