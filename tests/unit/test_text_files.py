"""Files that people hand over as text."""

import gzip

import pytest

from megatron.errors import UserError
from megatron.text_files import decode_text, is_single_byte_text, read_text, what_instead_of_text

TEXT = "grüße, 世界\nsecond line\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_with_a_byte_order_mark_is_decoded_and_the_mark_is_no_text(encoding):
    assert decode_text(TEXT.encode(encoding), "it") == TEXT


@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("width", [16, 32])
def test_wide_text_with_a_mark_of_either_order_is_decoded(width, order):
    assert decode_text(f"\ufeff{TEXT}".encode(f"utf-{width}-{order}"), "it") == TEXT


@pytest.mark.parametrize("name", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_text_without_a_mark_is_refused_by_its_name(name):
    with pytest.raises(UserError, match=rf"it is {name.upper()} text.*iconv -f {name.upper()[:-3]}{name.upper()[-2:]}"):
        decode_text("plain words and more of them\n".encode(name), "it")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (gzip.compress(b"text", mtime=0), "gzip data"),
        (b"\x28\xb5\x2f\xfd more", "Zstandard data"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"PK\x03\x04", "a ZIP archive"),
        (bytes(range(32)) * 8 + bytes(64), "binary data"),
    ],
)
def test_what_is_no_text_is_refused_by_its_name(data, kind):
    with pytest.raises(UserError, match=f"it is {kind}"):
        decode_text(data, "it")


def test_latin_1_is_refused_with_the_byte_and_its_line():
    with pytest.raises(UserError, match=r"not UTF-8: byte 10 \(0xfc, line 2\) cannot be decoded.*WINDOWS-1252"):
        decode_text("first\nim Büro\n".encode("latin-1"), "it")


def test_plain_text_with_a_rare_zero_byte_is_text():
    assert what_instead_of_text(b"a line of text\n" * 20 + b"\0" + b"another\n" * 20) is None


def test_an_empty_file_is_an_empty_text():
    assert decode_text(b"", "it") == ""


def test_line_ends_of_windows_are_line_ends(tmp_path):
    (tmp_path / "a").write_bytes(b"one\r\ntwo\r\n")
    assert read_text(tmp_path / "a", "key") == "one\ntwo\n"


@pytest.mark.parametrize("name", ["nothing_here", "x" * 300, "zero\0byte"])
def test_a_file_that_cannot_be_read_is_a_line_with_its_key(tmp_path, name):
    with pytest.raises(UserError, match=r"^key"):
        read_text(tmp_path / name, "key")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("Grüße aus Köln".encode("latin-1"), True),
        (("Knoten im Büro, " * 40 + "É» ").encode("latin-1") * 5, True),
        ("Grüße aus Köln".encode(), False),
        (b"one broken byte \xff in ASCII", False),
        (b"a" * 4000 + b"\xfc\xe4", False),  # rare: damage
        ("größer \ufffd ".encode() + b"\xff\xfe", False),  # otherwise UTF-8
        (b"plain", False),
    ],
)
def test_latin_1_differs_from_utf_8_with_a_few_broken_bytes(data, expected):
    assert is_single_byte_text(data) is expected
