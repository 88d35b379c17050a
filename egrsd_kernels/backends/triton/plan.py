"""How many rows a chunk has, and how much of the vocabulary is stored at a time: by a model of the products' shapes.

A persistent kernel takes as long as its fullest multiprocessor: a product of 80 tiles on 132 multiprocessors takes as
long as one of 132. The model counts these rounds, in steps of the inner loop, and adds what tiles and launches cost
besides. The factors are an H100's; only their ratios matter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..protocol import Needs
from .common import ROW_TILE, Config, Machine, ceil_div

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


def output_tiles(config: Config, rows: int, hidden_size: int) -> int:
    """Tiles of dhidden for so many rows."""
    return ceil_div(rows, config.rows) * ceil_div(hidden_size, config.cols)


def least_partial_tiles(config: Config, rows: int, hidden_size: int, programs: int) -> int:
    """Room for the tiles of dhidden, or for parts of their sums where they are too few to fill the device."""
    tiles = output_tiles(config, rows, hidden_size)
    return tiles if tiles >= programs else 2 * programs


def _product_steps(tiles: int, steps: int, most: int, programs: int) -> int:
    """Steps of the hidden gradient's product, its sum cut as ``split_count`` of the kernel cuts it."""
    return min(
        ceil_div(tiles * splits, programs) * ceil_div(steps, splits) + tiles * splits * PARTIAL_STEPS // programs
        for splits in range(1, max(1, min(MAX_SPLITS, most // tiles)) + 1)
    )


class _Chunks:
    """What chunks of each size cost by the model, and the best way to cut one; what it says is kept.

    budget: bytes that the buffers of a chunk may take. The rest is of :func:`chunk_plan`.
    """

    def __init__(
        self, vocabulary: int, hidden_size: int, itemsize: int, machine: Machine, budget: int, needs: Needs, sums: int
    ):  # fmt: skip
        self.vocabulary, self.hidden_size, self.itemsize, self.needs = vocabulary, hidden_size, itemsize, needs
        self.programs, self.tma, self.configs = machine
        self.col_tiles = ceil_div(vocabulary, self.configs.vocab.cols)
        self.budget, self.sums, self.whole = budget, sums, needs.head
        c, h = self.configs.vocab, self.configs.hidden
        products = self.col_tiles * (ceil_div(hidden_size, c.depth) + STORE_STEPS)
        if needs.hidden:
            products += output_tiles(h, ROW_TILE, hidden_size) * vocabulary // h.depth
        self.least_steps = products / self.programs  # of a tile of rows, in whatever chunk
        self._steps: dict[tuple[int, int, int], float] = {}
        self._ways: dict[int, list[tuple[int, int, int]]] = {}

    def rooms(self, tiles: int) -> tuple[int, ...]:
        """Numbers of partial tiles worth a look. The rows of a whole chunk are few: cut sums fill its rounds."""
        least = least_partial_tiles(self.configs.hidden, tiles * ROW_TILE, self.hidden_size, self.programs)
        return (least, 2 * least) if self.whole and self.needs.hidden else (least,)

    def _buffers(self, tiles: int, room: int) -> int:
        """Bytes beside the exponentials: gathered rows, row sums of the vocabulary pass, and tiles of dhidden."""
        rows, h = tiles * ROW_TILE, self.configs.hidden
        by_row = self.hidden_size * self.itemsize + 4 * self.sums * self.col_tiles + 32
        return rows * by_row + 4 * room * h.rows * h.cols * self.needs.hidden

    def _widths(self, tiles: int, room: int) -> set[int]:
        """Slice widths worth a look: equal slices, and ones that end with a full round of the vocabulary pass."""
        tile_bytes = tiles * ROW_TILE * self.configs.vocab.cols * self.itemsize
        left, col_tiles = self.budget - self._buffers(tiles, room), self.col_tiles
        if left < 12 * col_tiles * tiles * ROW_TILE:  # maxima and sums of tiles, which share the exponentials' memory
            return set()
        most = min(col_tiles, left // tile_bytes)
        if self.whole:
            return {col_tiles} if most == col_tiles else set()
        if most < 1:
            return set()
        fewest = ceil_div(col_tiles, most)
        equal = {ceil_div(col_tiles, slices) for slices in range(fewest, min(fewest + 3, col_tiles) + 1)}
        round_ = self.programs // math.gcd(tiles, self.programs)  # columns that fill the grid
        full = range(most // round_ * round_, max(1, most - self.programs) - 1, -round_)
        return equal | {cols for cols in full if cols}

    def steps(self, tiles: int, width: int, room: int) -> float:
        """Time of a chunk of so many row tiles, over slices of so many column tiles."""
        key = tiles, width, room
        if key not in self._steps:
            self._steps[key] = self._count(tiles, width, room)
        return self._steps[key]

    def _count(self, tiles: int, width: int, room: int) -> float:
        programs, c, h, needs = self.programs, self.configs.vocab, self.configs.hidden, self.needs
        total: float = LAUNCHES["chunk"] * LAUNCH_STEPS
        depth = ceil_div(self.hidden_size, c.depth) + STORE_STEPS
        outputs = output_tiles(h, tiles * ROW_TILE, self.hidden_size)
        full, rest = divmod(self.col_tiles, width)
        for count, cols in ((full, width), (1, rest)):
            if cols and count:
                read = self.vocabulary * self.hidden_size * self.itemsize / STEP_BYTES * cols / self.col_tiles
                steps = max(ceil_div(tiles * cols, programs) * depth, read) + LAUNCHES["slice"] * LAUNCH_STEPS
                if needs.hidden:
                    # Steps of the two products are alike in time: a tile has as many elements in both.
                    product = _product_steps(outputs, ceil_div(cols * c.cols, h.depth), room, programs)
                    steps += max(product, read)
                total += count * steps
        if needs.weight:
            o = self.configs.head
            outputs = ceil_div(self.vocabulary, o.rows) * ceil_div(self.hidden_size - needs.first_column, o.cols)
            depth = ceil_div(tiles * ROW_TILE, o.depth)
            steps = max(depth + REDUCE_STEPS, PARTIAL_STEPS) if self.tma else depth + PARTIAL_STEPS
            total += ceil_div(outputs, programs) * steps
        return total

    def ways(self, tiles: int) -> list[tuple[int, int, int]]:
        """(tiles, width of a slice, partial tiles) of chunks of so many row tiles that fit and are worth a look."""
        if tiles not in self._ways:
            self._ways[tiles] = [
                (tiles, width, room) for room in self.rooms(tiles) for width in self._widths(tiles, room)
            ]
        return self._ways[tiles]

    def fastest(self, row_tiles: int, sizes: Iterable[int]) -> tuple[int, int, int] | None:
        """Of all ways to cut so many rows into chunks of one of these sizes; None where none fits."""
        ways = [way for tiles in sizes for way in self.ways(tiles)]
        bounds = []
        for index, way in enumerate(ways):
            full, rest = divmod(row_tiles, way[0])
            bounds.append((full * self.steps(*way) + rest * self.least_steps, index, full, rest))
        least = math.inf, len(ways)
        for bound, index, full, rest in sorted(bounds):
            if bound > least[0]:  # most are ruled out so: a plan takes less than a millisecond
                break
            way = ways[index]
            total = full * self.steps(*way) + (self.steps(rest, *way[1:]) if rest else 0)
            least = min(least, (total, index))
        return ways[least[1]] if ways else None


_chunks = functools.lru_cache(maxsize=64)(_Chunks)


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
    shape, whole = (vocabulary, hidden_size, itemsize, machine), needs.head
    found = None
    if needs.weight and alone:
        # One chunk needs no float32 gradient of the head, to add up in and to convert; what that spares it may take.
        spared = vocabulary * (hidden_size - needs.first_column) * max(0, 4 - itemsize)
        found = _chunks(*shape, budget + spared, needs, sums).fastest(row_tiles, [row_tiles])
    if found is None:
        chunks = _chunks(*shape, budget if whole else min(budget, FROZEN_BYTES), needs, sums)
        most = budget // (ROW_TILE * vocabulary * itemsize) if whole else MOST_ROWS // ROW_TILE
        smallest = 1, chunks.col_tiles if whole else 1, chunks.rooms(1)[0]
        found = chunks.fastest(row_tiles, range(1, min(row_tiles, most) + 1)) or smallest
    tiles, width, room = found
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
