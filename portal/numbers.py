"""Numbers that clients send, as far as a database can hold them."""


def whole_number(value) -> int | None:
    """The number that `value` is, or spells in plain digits, from 0 to 2^63 - 1; None for anything
    else, however long.

    `str.isdigit` also takes "²", which `int` refuses; `int` refuses 5,000 digits, and SQLite and
    PostgreSQL refuse 20.
    """
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
        value = int(value)
    return value if type(value) is int and 0 <= value < 2**63 else None
