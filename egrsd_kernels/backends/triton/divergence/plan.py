"""How many rows of student and teacher are worked on at a time."""

from __future__ import annotations

import functools

from egrsd_kernels.backends.protocol import Needs

from ..common import ROW_TILE, Config, Machine, ceil_div
from ..plan import LAUNCH_STEPS, MOST_ROWS, Plan, least_partial_tiles, output_tiles, product_steps

LAUNCHES = 20  # of a chunk, half of them for rows that may have to be done again


@functools.lru_cache(maxsize=1024)
def pair_plan(
    row_tiles: int, vocabulary: int, hidden_sizes: tuple[int, int], itemsizes: tuple[int, int], student: Machine,
    pair: Config, budget: int, needs: Needs, planes: int, stores: bool,
) -> Plan:  # fmt: skip
    """The fastest chunk by a model like plan.py's, among those within ``budget`` bytes (or the smallest).

    hidden_sizes, itemsizes: the student's, and the teacher's. planes: sums of a row and tile. stores: whether M and r'
    are, all of the vocabulary: sums over a row come before its entries.
    """
    col_tiles, width = ceil_div(vocabulary, pair.cols), ceil_div(vocabulary, pair.cols) * pair.cols
    c = student.configs.hidden

    def room(tiles: int) -> int:
        # Twice the least where that pays: sums that are cut fill the last round.
        return 2 * least_partial_tiles(c, tiles * ROW_TILE, hidden_sizes[0], student.programs) if needs.hidden else 0

    def bytes_of(tiles: int) -> int:
        row = sum(size * item for size, item in zip(hidden_sizes, itemsizes, strict=True)) + 4 * planes * col_tiles
        row += width * 2 * itemsizes[0] if stores else 0
        return tiles * ROW_TILE * row + 4 * room(tiles) * c.rows * c.cols

    def chunk_steps(tiles: int) -> float:
        # A tile of the pair has two products, each half as wide as the hidden gradient's tile.
        depth = sum(ceil_div(size, pair.depth) for size in hidden_sizes) * pair.cols * pair.depth / (c.cols * c.depth)
        steps = ceil_div(tiles * col_tiles, student.programs) * depth + LAUNCHES * LAUNCH_STEPS
        if needs.hidden:
            outputs = output_tiles(c, tiles * ROW_TILE, hidden_sizes[0])
            steps += product_steps(outputs, ceil_div(width, c.depth), room(tiles), student.programs)
        return steps

    def steps(tiles: int) -> float:
        full, rest = divmod(row_tiles, tiles)
        return full * chunk_steps(tiles) + (chunk_steps(rest) if rest else 0)

    most = min(row_tiles, MOST_ROWS // ROW_TILE)
    fitting = [tiles for tiles in range(1, most + 1) if bytes_of(tiles) <= budget]
    tiles = min(fitting, key=steps, default=1)
    return Plan(tiles * ROW_TILE, col_tiles, room(tiles))
