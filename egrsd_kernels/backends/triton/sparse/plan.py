"""How large a chunk with sparse gradients is, and how many of its rows' entries wait."""

import functools
from dataclasses import dataclass

from egrsd_kernels.backends.protocol import Needs

from ..common import ROW_TILE, Machine, ceil_div
from ..plan import output_tiles

# The most entries that a row may keep, with a frozen and a trained head. Twice as many rows of the head to gather take
# almost as long as the row's product, and lists take memory from chunks; with a trained head each is sorted, too.
MOST_ENTRIES = {False: 256, True: 128}
# Entries that wait to be sorted and added to the head's gradient, which takes as long as reading and writing all of it;
# and the bytes that one takes then.
LISTED_ENTRIES = 9 << 19
SORT_BYTES = 48


@dataclass(frozen=True)
class SparsePlan:
    """A chunk with sparse gradients: its ``rows``; the most ``entries`` that one may keep; ``listed``, rows that these
    are listed of at a time; room for ``reserve`` dense rows that wait, and for ``partial_tiles`` of dhidden."""

    rows: int
    entries: int
    listed: int
    reserve: int
    partial_tiles: int


@functools.lru_cache(maxsize=1024)
def sparse_plan(
    row_tiles: int, vocabulary: int, hidden_size: int, itemsize: int, machine: Machine, budget: int, needs: Needs,
    sums: int = 1,
) -> SparsePlan:  # fmt: skip
    """The largest chunks within ``budget`` bytes (or the smallest), and the reserve that goes with them.

    The gradient of a head in float32, which chunks add up in, is beside that budget; and what it will take in a 16-bit
    dtype, once they are done, is theirs until then. needs: which gradients will be asked for. sums: how many a row and
    tile of the vocabulary leave.
    """
    entries, cols = MOST_ENTRIES[needs.head], machine.configs.vocab.cols
    col_tiles = ceil_div(vocabulary, cols)
    if needs.weight and itemsize < 4:
        budget += vocabulary * hidden_size * itemsize

    def plan(tiles: int) -> SparsePlan:
        rows = tiles * ROW_TILE
        # Whenever the reserve is made exactly, all of the head's gradient is read and written: the less often the
        # better. The sums of dhidden may then be cut, to fill the device however full the reserve is.
        reserve = min(2 * tiles, row_tiles) * ROW_TILE if needs.head else rows
        most_listed = min(LISTED_ENTRIES, budget // (4 * SORT_BYTES))
        listed = rows * max(1, most_listed // (rows * entries)) if needs.head else rows
        room = max(2 * machine.programs, 3 * output_tiles(machine.configs.hidden, rows, hidden_size))
        return SparsePlan(rows, entries, min(listed, ceil_div(row_tiles, tiles) * rows), reserve, room)

    def buffers(plan: SparsePlan) -> int:
        """Bytes: exponentials, hidden states and tile sums of the chunk and of the reserve; lists; tiles of dhidden."""
        stored = (col_tiles * cols + hidden_size) * itemsize + 4 * col_tiles
        kept = (SORT_BYTES if needs.head else 8) * plan.listed * entries
        partial = 4 * plan.partial_tiles * machine.configs.hidden.rows * machine.configs.hidden.cols
        tiles = 4 * plan.rows * col_tiles * sums  # one for where entries are looked for, and the chunk's further sums
        return (plan.rows + plan.reserve) * (stored + 64) + tiles + kept + partial

    most = min(row_tiles, budget // (2 * ROW_TILE * vocabulary * itemsize))
    return next((found for found in map(plan, range(most, 1, -1)) if buffers(found) <= budget), plan(1))
