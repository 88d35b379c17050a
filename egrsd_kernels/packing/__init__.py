"""Every shared prefix once: rows as a prefix tree.

:func:`pack_rows` finds the prefixes by the ids themselves and fills packs up to a budget of tokens.
"""

from .tree import Pack, Segment, pack_rows

__all__ = ["Pack", "Segment", "pack_rows"]
