"""How many rows a chunk has, and how much of the vocabulary is stored at a time: by a model of the products' shapes.

A persistent kernel takes as long as its fullest multiprocessor: a product of 80 tiles on 132 multiprocessors takes as
long as one of 132. The model counts these rounds, in steps of the inner loop, and adds what tiles and launches cost
besides. The factors are an H100's; only their ratios matter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .common import ROW_TILE, Config, Machine

MAX_SPLITS = 16
# In steps of the inner loop (0.85 us on an H100): reading and writing a float32 tile; what of that is left where TMA
# adds a tile behind the next one's back; storing a tile of exponentials; a launch.
PARTIAL_STEPS = 16
REDUCE_STEPS = 7
STORE_STEPS = 3
LAUNCH_STEPS = 4
# How many bytes of the head all multiprocessors together read from memory during a step.
STEP_BYTES = 2.5e6
LAUNCHES = {"chunk": 12, "slice": 6}
# With these limits on the memory of a chunk, more buys no speed where the head is frozen.
MOST_ROWS = 4352
FROZEN_BYTES = 350 << 20


@dataclass(frozen=True)
class Plan:
    """``rows`` of a chunk, and ``slice_tiles``, the width of a stored slice of the vocabulary, in tiles of its pass."""

    rows: int
    slice_tiles: int


def ceil_div(a: int, b: int) -> int:
    """triton.cdiv without its wrapper, which costs 20 times as much: a plan divides thousands of times."""
    return -(-a // b)


def partial_tiles(config: Config, rows: int, hidden_size: int, programs: int) -> int:
    """Room for the tiles of dhidden, or for parts of their sums where they are too few to fill the device."""
    tiles = ceil_div(rows, config.rows) * ceil_div(hidden_size, config.cols)
    return tiles if tiles >= programs else 2 * programs


def _product_steps(tiles: int, steps: int, most: int, programs: int) -> int:
    """Steps of the hidden gradient's product, its sum cut as ``split_count`` of the kernel cuts it."""
    return min(
        ceil_div(tiles * splits, programs) * ceil_div(steps, splits) + tiles * splits * PARTIAL_STEPS // programs
        for splits in range(1, MAX_SPLITS + 1)
        if splits == 1 or tiles * splits <= most
    )


@functools.lru_cache(maxsize=1024)
def chunk_plan(
    row_tiles: int, vocabulary: int, hidden_size: int, itemsize: int, machine: Machine, budget: int,
    needs: tuple[bool, bool, bool],
) -> Plan:  # fmt: skip
    """The fastest plan by the model, among those whose buffers stay within ``budget`` bytes (or are the smallest).

    The gradient of a head in float32, which chunks add up in, is beside that budget.

    row_tiles: rows to work on, in tiles of ROW_TILE. needs: gradients of (hidden, weight, bias).
    """
    programs, tma, configs = machine
    c = configs.vocab
    col_tiles = ceil_div(vocabulary, c.cols)
    whole = needs[1] or needs[2]
    if not whole:
        budget = min(budget, FROZEN_BYTES)
    head_bytes_steps = vocabulary * hidden_size * itemsize / STEP_BYTES

    def chunk_steps(tiles: int, width: int) -> float:
        """Time of a chunk of so many row tiles, over slices of so many column tiles."""
        total = LAUNCHES["chunk"] * LAUNCH_STEPS
        depth = ceil_div(hidden_size, c.depth) + STORE_STEPS
        h = configs.hidden
        most = partial_tiles(h, tiles * ROW_TILE, hidden_size, programs)
        outputs = ceil_div(tiles * ROW_TILE, h.rows) * ceil_div(hidden_size, h.cols)
        full, rest = divmod(col_tiles, width)
        for count, cols in ((full, width), (1, rest)):
            if cols and count:
                read = head_bytes_steps * cols / col_tiles
                steps = max(ceil_div(tiles * cols, programs) * depth, read) + LAUNCHES["slice"] * LAUNCH_STEPS
                if needs[0]:
                    # Steps of the two products are alike in time: a tile has as many elements in both.
                    product = _product_steps(outputs, ceil_div(cols * c.cols, h.depth), most, programs)
                    steps += max(product, read)
                total += count * steps
        if needs[1]:
            o = configs.head
            outputs = ceil_div(vocabulary, o.rows) * ceil_div(hidden_size, o.cols)
            depth = ceil_div(tiles * ROW_TILE, o.depth)
            steps = max(depth + REDUCE_STEPS, PARTIAL_STEPS) if tma else depth + PARTIAL_STEPS
            total += ceil_div(outputs, programs) * steps
        return total

    def buffers(tiles: int) -> int:
        """Bytes beside the exponentials: gathered rows, row sums of the vocabulary pass, and tiles of dhidden."""
        rows = tiles * ROW_TILE
        partial = partial_tiles(configs.hidden, rows, hidden_size, programs) * configs.hidden.rows * configs.hidden.cols
        return rows * (hidden_size * itemsize + 4 * col_tiles + 32) + 4 * partial * needs[0]

    def widths(tiles: int, budget: int) -> set[int]:
        """Slice widths worth a look: equal slices, and ones that end with a full round of the vocabulary pass."""
        tile_bytes = tiles * ROW_TILE * c.cols * itemsize
        most = min(col_tiles, (budget - buffers(tiles)) // tile_bytes)
        if whole:
            return {col_tiles} if most == col_tiles else set()
        if most < 1:
            return set()
        fewest = ceil_div(col_tiles, most)
        equal = {ceil_div(col_tiles, slices) for slices in range(fewest, min(fewest + 3, col_tiles) + 1)}
        return equal | {cols for cols in range(max(1, most - programs), most + 1) if tiles * cols % programs == 0}

    # One chunk needs no float32 gradient of the head, to add up in and to convert; what that spares it may take.
    spared = vocabulary * hidden_size * max(0, 4 - itemsize)
    if needs[1] and widths(row_tiles, budget + spared):
        return Plan(row_tiles * ROW_TILE, col_tiles)
    best, best_steps = Plan(ROW_TILE, col_tiles if whole else 1), float("inf")
    for tiles in range(1, (row_tiles if whole else min(row_tiles, MOST_ROWS // ROW_TILE)) + 1):
        full, rest = divmod(row_tiles, tiles)
        for width in widths(tiles, budget):
            steps = full * chunk_steps(tiles, width) + (chunk_steps(rest, width) if rest else 0)
            if steps < best_steps:
                best, best_steps = Plan(tiles * ROW_TILE, width), steps
    return best
