"""Every shared prefix once: rows of token ids as a prefix tree, and a model's own forward over it.

:func:`pack_responses` and :func:`pack_rows` find the prefixes by the ids themselves and fill packs up to a budget of
tokens. :func:`packed` runs a model over a pack and a function at its head, :func:`read_packs` over all of them, after a
proof that each row is what it is alone.
"""

from .head import packed, read_packs
from .tree import Pack, Segment, pack_responses, pack_rows

__all__ = ["Pack", "Segment", "pack_responses", "pack_rows", "packed", "read_packs"]
