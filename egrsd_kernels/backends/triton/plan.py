"""How many rows a chunk has, and how much of the vocabulary is stored at a time: by a model of the products' shapes.

A persistent kernel takes as long as its fullest multiprocessor: a product of 80 tiles on 132 multiprocessors takes as
long as one of 132. The model counts these rounds, in steps of the inner loop, and adds what tiles and launches cost
besides. The factors are an H100's; only their ratios matter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from ..protocol import Needs
from .common import ROW_TILE, Config, Machine

MAX_SPLITS = 16
# In steps of the inner loop (0.85 us on an H100): reading and writing a float32 tile; what of that is left where TMA
# adds a tile behind the next one's back; storing a tile of exponentials; a launch.
PARTIAL_STEPS = 16
REDUCE_STEPS = 10
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
    """A chunk: its ``rows``; ``slice_tiles``, the width of a stored slice of the vocabulary, in tiles of its pass; and
    ``partial_tiles``, room for tiles of dhidden, or for parts of their sums."""

    rows: int
    slice_tiles: int
    partial_tiles: int


def ceil_div(a: int, b: int) -> int:
    """triton.cdiv without its wrapper, which costs 20 times as much: a plan divides thousands of times."""
    return -(-a // b)


def output_tiles(config: Config, rows: int, hidden_size: int) -> int:
    """Tiles of dhidden for so many rows."""
    return ceil_div(rows, config.rows) * ceil_div(hidden_size, config.cols)


def least_partial_tiles(config: Config, rows: int, hidden_size: int, programs: int) -> int:
    """Room for the tiles of dhidden, or for parts of their sums where they are too few to fill the device."""
    tiles = output_tiles(config, rows, hidden_size)
    return tiles if tiles >= programs else 2 * programs


def product_steps(tiles: int, steps: int, most: int, programs: int) -> int:
    """Steps of the hidden gradient's product, its sum cut as ``split_count`` of the kernel cuts it."""
    return min(
        ceil_div(tiles * splits, programs) * ceil_div(steps, splits) + tiles * splits * PARTIAL_STEPS // programs
        for splits in range(1, MAX_SPLITS + 1)
        if splits == 1 or tiles * splits <= most
    )


@functools.lru_cache(maxsize=1024)
def chunk_plan(
    row_tiles: int, vocabulary: int, hidden_size: int, itemsize: int, machine: Machine, budget: int,
    needs: Needs, sums: int = 1, alone: bool = True,
) -> Plan:  # fmt: skip
    """The fastest plan by the model, among those whose buffers stay within ``budget`` bytes (or are the smallest).

    The gradient of a head in float32, which chunks add up in, is beside that budget.

    row_tiles: rows to work on, in tiles of ROW_TILE. needs: which gradients will be asked for. sums: how many a row and
    tile of the vocabulary leave. alone: whether the head's gradient is these rows' and no others'.
    """
    programs, tma, configs = machine
    c = configs.vocab
    col_tiles = ceil_div(vocabulary, c.cols)
    whole = needs.head
    if not whole:
        budget = min(budget, FROZEN_BYTES)
    head_bytes_steps = vocabulary * hidden_size * itemsize / STEP_BYTES

    def rooms(tiles: int) -> tuple[int, ...]:
        """Numbers of partial tiles worth a look. The rows of a whole chunk are few: cut sums fill its rounds."""
        least = least_partial_tiles(configs.hidden, tiles * ROW_TILE, hidden_size, programs)
        return (least, 2 * least) if whole and needs.hidden else (least,)

    def chunk_steps(tiles: int, width: int, room: int) -> float:
        """Time of a chunk of so many row tiles, over slices of so many column tiles."""
        total: float = LAUNCHES["chunk"] * LAUNCH_STEPS
        depth = ceil_div(hidden_size, c.depth) + STORE_STEPS
        h = configs.hidden
        outputs = output_tiles(h, tiles * ROW_TILE, hidden_size)
        full, rest = divmod(col_tiles, width)
        for count, cols in ((full, width), (1, rest)):
            if cols and count:
                read = head_bytes_steps * cols / col_tiles
                steps = max(ceil_div(tiles * cols, programs) * depth, read) + LAUNCHES["slice"] * LAUNCH_STEPS
                if needs.hidden:
                    # Steps of the two products are alike in time: a tile has as many elements in both.
                    product = product_steps(outputs, ceil_div(cols * c.cols, h.depth), room, programs)
                    steps += max(product, read)
                total += count * steps
        if needs.weight:
            o = configs.head
            outputs = ceil_div(vocabulary, o.rows) * ceil_div(hidden_size - needs.first_column, o.cols)
            depth = ceil_div(tiles * ROW_TILE, o.depth)
            steps = max(depth + REDUCE_STEPS, PARTIAL_STEPS) if tma else depth + PARTIAL_STEPS
            total += ceil_div(outputs, programs) * steps
        return total

    def buffers(tiles: int, room: int) -> int:
        """Bytes beside the exponentials: gathered rows, row sums of the vocabulary pass, and tiles of dhidden."""
        rows = tiles * ROW_TILE
        partial = room * configs.hidden.rows * configs.hidden.cols
        return rows * (hidden_size * itemsize + 4 * sums * col_tiles + 32) + 4 * partial * needs.hidden

    def widths(tiles: int, room: int, budget: int) -> set[int]:
        """Slice widths worth a look: equal slices, and ones that end with a full round of the vocabulary pass."""
        tile_bytes = tiles * ROW_TILE * c.cols * itemsize
        left = budget - buffers(tiles, room)
        if left < 12 * col_tiles * tiles * ROW_TILE:  # maxima and sums of tiles, which share the exponentials' memory
            return set()
        most = min(col_tiles, left // tile_bytes)
        if whole:
            return {col_tiles} if most == col_tiles else set()
        if most < 1:
            return set()
        fewest = ceil_div(col_tiles, most)
        equal = {ceil_div(col_tiles, slices) for slices in range(fewest, min(fewest + 3, col_tiles) + 1)}
        return equal | {cols for cols in range(max(1, most - programs), most + 1) if tiles * cols % programs == 0}

    def steps(tiles: int, width: int, room: int) -> float:
        """Time of all rows, in chunks of so many row tiles."""
        full, rest = divmod(row_tiles, tiles)
        return full * chunk_steps(tiles, width, room) + (chunk_steps(rest, width, room) if rest else 0)

    def options(tiles: int, budget: int) -> Iterator[tuple[int, int, int]]:
        return ((tiles, width, room) for room in rooms(tiles) for width in widths(tiles, room, budget))

    # One chunk needs no float32 gradient of the head, to add up in and to convert; what that spares it may take.
    spared = vocabulary * (hidden_size - needs.first_column) * max(0, 4 - itemsize)
    found = list(options(row_tiles, budget + spared)) if needs.weight and alone else []
    if not found:
        most_tiles = row_tiles if whole else min(row_tiles, MOST_ROWS // ROW_TILE)
        found = [option for tiles in range(1, most_tiles + 1) for option in options(tiles, budget)]
    smallest = (1, col_tiles if whole else 1, rooms(1)[0])
    tiles, width, room = min(found, key=lambda option: steps(*option), default=smallest)
    return Plan(tiles * ROW_TILE, width, room)


def kept_plan(
    row_tiles: int, vocabulary: int, hidden_size: int, itemsize: int, machine: Machine, budget: int, needs: Needs
) -> tuple[Plan, int]:
    """How many rows may be kept, of which the whole vocabulary is stored, within ``budget`` bytes; and their chunks."""
    programs, _, configs = machine
    col_tiles = ceil_div(vocabulary, configs.vocab.cols)
    width = col_tiles * configs.vocab.cols + (hidden_size if needs.head else 0)
    kept = min(row_tiles, budget // (ROW_TILE * (width * itemsize + 64)))
    tiles = ceil_div(kept, max(1, ceil_div(kept, MOST_ROWS // ROW_TILE)))
    # Twice the room: sums that are cut fill the last round.
    room = 2 * least_partial_tiles(configs.hidden, tiles * ROW_TILE, hidden_size, programs)
    return Plan(tiles * ROW_TILE, col_tiles, room), kept * ROW_TILE
