"""Text from outside (file names, exception messages) made fit for one line or one cell."""

import re
import unicodedata

# Spreadsheets evaluate a cell that begins with one of these (OWASP, "CSV Injection"), also in
# the full-width forms that some locales accept.
_FORMULA_START = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
_NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|inf|nan)", re.ASCII)


def one_line(text: str, *, limit: int = 500) -> str:
    r"""Bring any text onto one printable line.

    Runs of white space become one space. Control and format characters (terminal escapes, zero
    bytes, bidirectional overrides, zero-width characters) are dropped; surrogates, private and
    unassigned code points become U+FFFD, so that the result can always be encoded as UTF-8.

    Args:
        text: any string, for example a file name as the operating system gave it.
        limit: longest result in characters, at least 1; what is longer ends in an ellipsis.

    Returns:
        At most ``limit`` printable characters.

    >>> one_line("two\nlines\x00 and \u202ea trick")
    'two lines and a trick'
    """
    # White space and dropped characters shorten the text; four times the limit is enough to
    # look at, and bounds the work for a name of many megabytes.
    head = text[: 4 * limit]
    kept = "".join(_printable(character) for character in head)
    line = " ".join(kept.split())
    if len(line) > limit or len(text) > len(head):
        line = line[: limit - 1].rstrip() + "\u2026"
    return line


def _printable(character: str) -> str:
    if character.isspace():
        return " "
    match unicodedata.category(character):
        case "Cc" | "Cf":
            return ""
        case "Cs" | "Co" | "Cn":
            return "\ufffd"
    return character


def neutralize_csv_cell(text: str) -> str:
    """Keep a spreadsheet from reading a text cell as a formula.

    A cell that begins with ``=``, ``+``, ``-``, ``@``, a tab or a line break gets a leading
    apostrophe, which spreadsheets show as "this is text". Numbers stay as they are.

    Args:
        text: the cell, before any quoting by a CSV writer.

    Returns:
        The cell to write.

    >>> neutralize_csv_cell("=HYPERLINK(...)"), neutralize_csv_cell("-1.5e-3")
    ("'=HYPERLINK(...)", '-1.5e-3')

    References:
        OWASP Foundation, "CSV Injection".
    """
    if text.startswith(_FORMULA_START) and not _NUMBER.fullmatch(text):
        return "'" + text
    return text
