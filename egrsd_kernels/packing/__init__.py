"""Every shared prefix once: rows of token ids as a prefix tree, and a model's own forward over it.

:func:`pack_rows` finds the prefixes by the ids themselves and fills packs up to a budget of tokens. :func:`packed` runs
a model over a pack and a function at its head, after a proof that each row is what it is alone.
"""

from .head import packed
from .tree import Pack, Segment, pack_rows

__all__ = ["Pack", "Segment", "pack_rows", "packed"]
