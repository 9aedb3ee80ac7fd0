"""How libraries name what says where the texts of a packed row are."""

import functools
import re
from typing import Any

BOUNDS = (
    *("cu_seq_lens_q", "cu_seq_lens_k", "cu_seq_lens"),
    *("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k"),
    *("cu_seq_q", "cu_seq_k"),
)
LENGTHS = ("seq_lens", "seqlens", "doc_lens")
IDS = ("seq_idx", "sequence_ids", "document_ids", "segment_ids")
POSITIONS = ("position_ids", "positions")
_LONGEST = re.compile(r"max_((length|seq_?len)s?(_[qk]|_kv)?|[qk])$")


@functools.lru_cache(1024)
def name_in(path: str) -> str:
    """The last name in the path of an input; the path where it has none."""
    found = re.findall(r"\[?'(\w+)'\]?|\.(\w+)", path)
    return next((a or b for a, b in reversed(found)), path)


def tells_texts(name: str) -> bool:
    """Whether an argument of this name says where texts are."""
    return name in (*BOUNDS, *LENGTHS, *IDS, *POSITIONS)


def says_longest(name: str) -> bool:
    """Whether an argument of this name bounds the lengths of texts: what is larger does, too."""
    return _LONGEST.match(name) is not None


def is_list_of_lengths(path: str, value: Any) -> bool:
    """Whether it is a list of whole numbers that tells texts by its name."""
    if not isinstance(value, (list, tuple)) or name_in(path) not in (*BOUNDS, *LENGTHS):
        return False
    return bool(value) and all(type(item) is int for item in value)
