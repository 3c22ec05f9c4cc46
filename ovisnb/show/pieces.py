"""The readable text of single tokens.

    piece("Ġcat")  # Piece("·cat", " cat", 0): with white space visible, as it stands, line breaks

Whatever cannot be seen is named: a right-to-left mark is ⟨U+202E⟩, bytes that are no whole character are ⟨e2 80⟩.
Nothing is escaped here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

VISIBLE = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
PLAIN = {" ": " ", "\n": "", "\t": "\t", "\r": ""}  # a line break is drawn, not written


class Piece(NamedTuple):
    """One token's text: with `visible` white space, `plain`, and the number of line breaks in it."""

    visible: str
    plain: str
    breaks: int


def pieces(ids: Iterable[int], tokenizer) -> dict[int, Piece]:
    """id -> Piece, for each different id. Added tokens are shown as they are written."""
    unique = sorted(set(ids))
    added = set(tokenizer.get_added_vocab().values())
    found = {}
    for token_id, token in zip(unique, tokenizer.convert_ids_to_tokens(unique)):
        if token is None:
            text = f"[id {token_id}: not in the tokenizer]"
            found[token_id] = Piece(text, text, 0)
        else:
            found[token_id] = piece(token, byte_level=token_id not in added)
    return found


def piece(token: str, byte_level: bool = True) -> Piece:
    """The Piece of a token as the vocabulary writes it; one that is not byte-level is its own text."""
    table = _byte_table()
    if not byte_level or any(character not in table for character in token):
        return _read(token)
    raw = bytes(table[character] for character in token)
    try:
        return _read(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return Piece(f"⟨{raw.hex(' ')}⟩", f"⟨{raw.hex(' ')}⟩", 0)


def readable(character: str, white_space: dict[str, str]) -> str:
    """A character as it is, its stand-in if it is white space, or its code point if it cannot be seen."""
    if (stand_in := white_space.get(character)) is not None:
        return stand_in
    return character if character.isprintable() else f"⟨U+{ord(character):04X}⟩"


def one_line(text: str, limit: int = 200) -> str:
    """Text of the data for a heading: nothing invisible in it, and cut at `limit` characters."""
    shown = "".join(readable(character, {" ": " "}) for character in text[:limit])
    return shown + "…" * (len(text) > limit)


def _read(text: str) -> Piece:
    visible, plain = ("".join(readable(character, table) for character in text) for table in (VISIBLE, PLAIN))
    return Piece(visible, plain, text.count("\n"))


@cache
def _byte_table() -> dict[str, int]:
    """Byte-level BPE's printable character -> byte (Radford et al. 2019, GPT-2's published encoder):
    printable Latin-1 bytes stand for themselves, the other 68 are numbered on from U+0100."""
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {chr(byte): byte for byte in themselves} | {chr(256 + n): byte for n, byte in enumerate(others)}
