"""Text that the learner has not read: sealed, so that a glance does not give it away.

This is a fence and no wall. Whoever wants to can call unseal() and read the text; then the score says nothing about
other text any more, and nobody else is deceived as thoroughly as the one who did it.
"""

import base64
import hashlib
import textwrap
import zlib
from itertools import count

from quantlab.arguments import check_choice, check_kind
from quantlab.files import write_whole
from quantlab.lm import DATA, SEPARATOR

FOLDER = DATA / "capstone"
TEXTS = ("stories", "general")  # what the bundled model is scored on, and what SmolLM2 is
_KEY = b"quantlab: a fence and no wall"


def seal(text: str) -> str:
    """The text compressed, mixed with a stream of bytes that a key gives, in letters and digits.

    >>> unseal(seal("The mole drank half of the moon."))
    'The mole drank half of the moon.'
    """
    packed = zlib.compress(check_kind(text, "text", str).encode(), 9)
    return "\n".join(textwrap.wrap(base64.b64encode(_mixed(packed)).decode(), 100)) + "\n"


def unseal(sealed: str) -> str:
    """What seal() was given. Raises ValueError if it is damaged."""
    try:
        return zlib.decompress(_mixed(base64.b64decode(check_kind(sealed, "sealed", str)))).decode()
    except (ValueError, zlib.error) as error:  # no letters of base64, another key, a byte that was lost
        raise ValueError(f"the sealed text is damaged: {error}") from error


def write_hidden(name: str, text: str) -> int:
    """Seal a text (documents separated as in data/text) under one of the names; returns the bytes of the file."""
    return write_whole(path_of(name), seal(text))


def hidden_text(name: str) -> list[str]:
    """The documents of a hidden text. score() reads it after a recipe has ended.

    Raises: FileNotFoundError if it is missing, ValueError if it is damaged.
    """
    path = path_of(name)
    if not path.is_file():
        raise FileNotFoundError(f"no hidden text {path}")
    return [document.strip() for document in unseal(path.read_text(encoding="ascii")).split(SEPARATOR)]


def path_of(name: str):
    """The file of a hidden text."""
    return FOLDER / f"{check_choice(name, 'name', TEXTS)}.sealed"


def _mixed(data: bytes) -> bytes:
    """data XOR a stream of bytes: SHA-256 of the key and 0, of the key and 1, ... Done twice it gives data back."""
    stream, number = b"", count()
    while len(stream) < len(data):
        stream += hashlib.sha256(_KEY + next(number).to_bytes(4, "big")).digest()
    return bytes(a ^ b for a, b in zip(data, stream, strict=False))
