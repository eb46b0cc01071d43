"""Text files that people hand over: decoded by their byte order mark, or refused with what they are.

Editors of Windows write UTF-8 with a byte order mark, or UTF-16; downloads end in .txt although they are compressed.
Read as UTF-8 without a look, such files become wrong text without an error.
"""

import codecs
import re
from pathlib import Path

from megatron.errors import UserError

# The mark of UTF-32-LE begins with that of UTF-16-LE, so the longer ones come first.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
SIGNATURES = (
    (b"\x1f\x8b", "gzip data"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data"),
    (b"BZh", "bzip2 data"),
    (b"\xfd7zXZ\x00", "xz data"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"PK\x03\x04", "a ZIP archive (or a .docx, .xlsx or .epub file)"),
    (b"%PDF-", "a PDF document"),
    (b"PAR1", "a Parquet table"),
    (b"ARROW1", "an Arrow file"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Microsoft Office document"),
    (b"{\\rtf", "an RTF document"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x7fELF", "a program"),
)
_SEQUENCES = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
SIGNATURE_BYTES = 4096  # how much of the beginning of a file decides what it is


def encoding_of(head: bytes) -> tuple[str, int]:
    """The encoding that a file's byte order mark names, and the length of the mark; without one ("utf-8", 0)."""
    return next(((name, len(mark)) for mark, name in BYTE_ORDER_MARKS if head.startswith(mark)), ("utf-8", 0))


def what_instead_of_text(head: bytes) -> str | None:
    """What a file is that begins with `head` and is no text in an encoding that its mark names; None for text.

    head: the first SIGNATURE_BYTES, or the whole of a shorter file.
    """
    if encoding_of(head)[1]:
        return None
    for signature, kind in SIGNATURES:
        if head.startswith(signature):
            return kind
    return _wide_text(head)


def _wide_text(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark, recognized by the positions of zero bytes; or data with many zero bytes."""
    if b"\0" not in head:
        return None
    quarter = len(head) // 4 or 1
    zeros = [head[offset::4].count(0) / quarter for offset in range(4)]
    many, few = 0.4, 0.1
    pattern = "".join("0" if share > many else "x" if share < few else "?" for share in zeros)
    named = {"x000": "UTF-32-LE", "000x": "UTF-32-BE", "x0x0": "UTF-16-LE", "0x0x": "UTF-16-BE"}.get(pattern)
    if named is not None:
        return f"{named} text without a byte order mark"
    return "binary data" if sum(zeros) / 4 > few else None


def is_single_byte_text(data: bytes) -> bool:
    """Whether text is in an encoding such as Latin-1 or Windows-1252, rather than UTF-8 with a few broken bytes.

    It has invalid bytes in plenty (at least 2, and 1 in 1,000 bytes), and hardly any valid sequence of several bytes.
    """
    text = data.decode("utf-8", "replace")
    valid = len(_SEQUENCES.findall(data))
    invalid = text.count("\ufffd") - data.count("\ufffd".encode())
    return invalid >= 2 and invalid * 1000 >= len(data) and invalid > 20 * valid


def decode_text(data: bytes, source: str) -> str:
    """The text of a whole file: UTF-8, or what its byte order mark names. The mark is no part of the text.

    source: names the file in messages. Raises UserError for what is not text, or not text in that encoding.
    """
    kind = what_instead_of_text(data[:SIGNATURE_BYTES])
    if kind is not None:
        raise UserError(f"{source} is {kind}, not UTF-8 text; {way_out(kind)}")
    encoding, mark = encoding_of(data)
    try:
        return data[mark:].decode(encoding)
    except UnicodeDecodeError as error:
        line = data[mark : mark + error.start].count(b"\n") + 1
        name = encoding.upper()
        guess = f"; if it is Latin-1 or Windows-1252, {converted('WINDOWS-1252')}" if encoding == "utf-8" else ""
        raise UserError(
            f"{source} is not {name}: byte {mark + error.start} (0x{data[mark + error.start]:02x}, line {line}) "
            f"cannot be decoded{guess}"
        ) from error


def read_text(path: Path, name: str) -> str:
    r"""The text of a file, as `decode_text` reads it, with \n at the end of each line whatever the system.

    name: the key or flag that names the file, for messages. Raises UserError for a file that cannot be read.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{name} ({path}) cannot be read: {reason}") from error
    return decode_text(data, f"{name} ({path})").replace("\r\n", "\n")


def way_out(kind: str) -> str:
    """How to turn a file of a kind that `what_instead_of_text` names into UTF-8 text, for messages."""
    if "text" in kind:
        return converted(kind.partition(" ")[0].replace("-LE", "LE").replace("-BE", "BE"))  # iconv's names
    if kind.endswith("data") and kind != "binary data":
        return "decompress it first"
    return "convert it to UTF-8 text first"


def converted(encoding: str) -> str:
    """How to convert a file from `encoding`, for messages."""
    return f"`iconv -f {encoding} -t UTF-8 FILE` converts it"
