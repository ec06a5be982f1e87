"""Which texts can be kept and sent on."""


def is_storable(text: str) -> bool:
    """JSON can spell a NUL and half a character (a lone surrogate); PostgreSQL takes no NUL, and
    UTF-8 no half character.
    """
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def shown(value, most: int = 120) -> str:
    """Whatever a client sent, fit to be repeated in a message to it."""
    return str(value)[:most].encode(errors="replace").decode()
