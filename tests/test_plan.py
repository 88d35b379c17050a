"""The chunk plan: within its memory, whole where it has to be, and better by its own model than its neighbours."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from egrsd_kernels.backends import Needs
from egrsd_kernels.backends.triton.common import ROW_TILE, Configs, Machine
from egrsd_kernels.backends.triton.plan import (
    FROZEN_BYTES,
    MOST_ROWS,
    _chunks,
    ceil_div,
    chunk_plan,
    kept_plan,
)
from egrsd_kernels.backends.triton.sparse.plan import LISTED_ENTRIES, sparse_plan
from egrsd_kernels.backends.triton.tuning import FLOAT32, HALF, configs

H100 = Machine(132, True, configs(torch.bfloat16, torch.device("cpu"), True, 232_448))
FROZEN, TRAINED = Needs(True, False, False), Needs(True, True, False)
V = 151_936


def held(plan, size: int, how: Machine, needs, itemsize: int = 2) -> int:
    """Bytes of a chunk's buffers: exponentials, gathered rows, row sums, tiles of dhidden where that is needed."""
    c, h = how.configs.vocab, how.configs.hidden
    per_row = plan.slice_tiles * c.cols * itemsize + size * itemsize + 4 * ceil_div(V, c.cols)
    return plan.rows * per_row + needs[0] * 4 * plan.partial_tiles * h.rows * h.cols


@given(
    tokens=st.integers(1, 70_000),
    size=st.integers(2, 700).map(lambda x: 8 * x),
    budget=st.integers(1, 2 << 30),
    needs=st.sampled_from([FROZEN, TRAINED, Needs(False, True, False), Needs(True, False, True)]),
    config=st.sampled_from([*HALF, FLOAT32]),
    programs=st.integers(1, 200),
)
def test_any_plan_is_within_its_memory(tokens, size, budget, needs, config, programs):
    how = Machine(programs, True, Configs(config, config, config))
    row_tiles, col_tiles = ceil_div(tokens, ROW_TILE), ceil_div(V, config.cols)
    plan = chunk_plan(row_tiles, V, size, 2, how, budget, needs)
    assert plan.rows % ROW_TILE == 0 and ROW_TILE <= plan.rows <= row_tiles * ROW_TILE
    assert 1 <= plan.slice_tiles <= col_tiles
    if needs[1] or needs[2]:
        assert plan.slice_tiles == col_tiles
    smallest = plan.rows == ROW_TILE and plan.slice_tiles == (col_tiles if needs != FROZEN else 1)
    if needs[1] and plan.rows >= tokens:
        budget += 2 * V * size  # a float32 gradient of the head would take so much more than one in 16 bits
    assert smallest or held(plan, size, how, needs) <= budget


def test_memory_does_not_grow_with_the_batch():
    for size in (1024, 2048, 2560, 4096, 5120):
        for tokens in (16_384, 65_536, 1 << 20):
            plan = chunk_plan(ceil_div(tokens, ROW_TILE), V, size, 2, H100, 1 << 30, FROZEN)
            assert held(plan, size, H100, FROZEN) <= FROZEN_BYTES
            plan = chunk_plan(ceil_div(tokens, ROW_TILE), V, size, 2, H100, 1 << 30, TRAINED)
            assert held(plan, size, H100, TRAINED) <= 1 << 30


def test_one_chunk_where_it_fits():
    """It needs no float32 gradient of the head, to add up in and to convert."""
    for size in (1024, 2048, 2560, 4096, 5120):
        for tokens, budget in ((1, 1 << 30), (1000, 1 << 30), (4096, 1 << 30), (6100, 2 << 30)):
            plan = chunk_plan(ceil_div(tokens, ROW_TILE), V, size, 2, H100, budget, TRAINED)
            assert plan.rows >= tokens, (size, tokens)


def test_rounds_of_the_grid_are_full():
    """What the model is for: tiles of dhidden that nearly fill whole rounds of an H100's 132 multiprocessors."""
    for size in (1024, 2048, 2560, 4096, 5120):
        plan = chunk_plan(128, V, size, 2, H100, 1 << 30, FROZEN)
        tiles = plan.rows // ROW_TILE * ceil_div(size, H100.configs.hidden.cols)
        assert tiles / (ceil_div(tiles, 132) * 132) > 0.95, size


def test_a_plan_of_rows_not_seen_before_is_cheap():
    """Counted in chunks that the model looks at, 5 us each: of hundreds that there are, most are ruled out unseen."""
    for size in (2560, 4096):
        for needs, budget in ((FROZEN, FROZEN_BYTES), (TRAINED, 1 << 30)):
            chunk_plan(128, V, size, 2, H100, 1 << 30, needs)
            known = _chunks(V, size, 2, H100, budget, needs, 1)._steps
            for row_tiles in range(129, 500, 37):
                before = len(known)
                chunk_plan(row_tiles, V, size, 2, H100, 1 << 30, needs)
                assert len(known) - before <= 60


def test_the_plan_is_the_fastest_by_its_model():
    """Of all ways to cut the rows that fit: what is ruled out unseen is slower."""
    for row_tiles in (1, 7, 34, 61, 300):
        for needs in (FROZEN, TRAINED):
            chunks = _chunks(V, 2560, 2, H100, FROZEN_BYTES, needs, 1)

            def steps(way, row_tiles=row_tiles, chunks=chunks):
                full, rest = divmod(row_tiles, way[0])
                return full * chunks.steps(*way) + (chunks.steps(rest, *way[1:]) if rest else 0)

            ways = [way for tiles in range(1, min(row_tiles, 34) + 1) for way in chunks.ways(tiles)]
            found = chunks.fastest(row_tiles, range(1, min(row_tiles, 34) + 1))
            assert found == min(ways, key=steps, default=None)


def test_sparse_plans_are_within_their_memory():
    for size, budget in ((1024, 1 << 30), (2560, 1 << 30), (5120, 400 << 20)):
        for tokens in (1, 1000, 5000, 1 << 20):
            for config, itemsize in ((HALF[0], 2), (FLOAT32, 4)):
                col_tiles, row_tiles = ceil_div(V, config.cols), ceil_div(tokens, ROW_TILE)
                how = Machine(132, True, Configs(config, config, config))

                def used(plan, needs, sums, size=size, itemsize=itemsize, config=config, col_tiles=col_tiles):
                    per_row = (V + size) * itemsize + 4 * col_tiles
                    entry = 48 if needs[1] else 8
                    found = plan.rows * 4 * col_tiles * sums
                    partial = 4 * plan.partial_tiles * config.rows * config.cols
                    return (plan.rows + plan.reserve) * per_row + found + entry * plan.listed * plan.entries + partial

                for needs, sums in ((FROZEN, 1), (TRAINED, 1), (FROZEN, 5)):
                    plan = sparse_plan(row_tiles, V, size, itemsize, how, budget, needs, sums)
                    # The gradient of a 16-bit head is not there yet.
                    allowed = budget + (2 * V * size if needs[1] and itemsize == 2 else 0)
                    assert used(plan, needs, sums) <= allowed
                    assert plan.rows % ROW_TILE == 0 and ROW_TILE <= plan.rows <= row_tiles * ROW_TILE
                    assert plan.rows <= plan.reserve <= 2 * plan.rows
                    assert plan.listed % plan.rows == 0 and plan.rows <= plan.listed
                    if needs[1]:
                        assert plan.listed * plan.entries <= max(LISTED_ENTRIES, plan.rows * plan.entries)
                    else:
                        assert plan.listed == plan.reserve == plan.rows
                    if tokens > plan.rows:  # two tiles of rows more would not fit
                        share = 3 if needs[1] else 2
                        assert used(plan, needs, sums) + 2 * share * ROW_TILE * V * itemsize > 0.95 * allowed


@given(
    tokens=st.integers(1, 70_000),
    size=st.integers(2, 700).map(lambda x: 8 * x),
    budget=st.one_of(st.integers(0, 2 << 30), st.just(1 << 40)),
    needs=st.sampled_from([FROZEN, TRAINED, Needs(True, True, False, first_column=16)]),
    config=st.sampled_from([*HALF, FLOAT32]),
    programs=st.integers(1, 200),
)
def test_what_is_kept_of_how_many_rows(tokens, size, budget, needs, config, programs):
    """As many tiles of rows as fit, in chunks of nearly equal size; the whole vocabulary of each row."""
    how = Machine(programs, True, Configs(config, config, config))
    row_tiles, col_tiles = ceil_div(tokens, ROW_TILE), ceil_div(V, config.cols)
    plan, rows = kept_plan(row_tiles, V, size, 2, how, budget, needs)
    numbers = col_tiles * config.cols + (size if needs.weight else 0)
    assert rows % ROW_TILE == 0 and plan.rows % ROW_TILE == 0 and plan.rows <= MOST_ROWS
    assert plan.slice_tiles == col_tiles and 2 * numbers * rows <= budget
    if rows < tokens:
        assert (2 * numbers + 64) * (rows + ROW_TILE) > budget
    if rows:
        assert rows < ceil_div(rows, plan.rows) * (plan.rows + ROW_TILE)
        assert plan.partial_tiles >= ceil_div(plan.rows, config.rows) * ceil_div(size, config.cols)
