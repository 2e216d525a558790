"""Lines of text files, compressed and not: every line comes back, and nothing that is cut off or damaged slips by."""

import gzip
import random
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from austeer import PairsError
from austeer.pairs.text_file import CHUNK, TextFile

zstandard = pytest.importorskip("zstandard")

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
# What str.splitlines, but no text file, ends a line at.
NO_LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\ufeff"
texts = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(NO_LINE_ENDS)), max_size=40)


def read(path, compression, **options):
    with TextFile(path, compression) as file:
        return list(file.lines(**options))


def noise(lines, seed=0):
    """Lines that do not compress well, so that a place in the stored file is a place in the text."""
    chance = random.Random(seed)
    return [f"{i} {chance.getrandbits(256):064x}\n" for i in range(lines)]


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESS)
@settings(max_examples=80, deadline=None)
@given(lines=st.lists(texts), newline=st.sampled_from(["\n", "\r\n", "\r"]), last=st.booleans(), mark=st.booleans())
def test_any_lines_come_back(tmp_path_factory, compression, lines, newline, last, mark):
    lines = [line.replace("\r", "").replace("\n", "") for line in lines]
    text = newline.join(lines) + newline * last
    path = tmp_path_factory.mktemp("lines") / "text"
    path.write_bytes(COMPRESS[compression](("\ufeff" * mark + text).encode()))
    if not mark and text.startswith("\ufeff"):
        text = text[1:]
    assert "".join(read(path, compression, newline="")) == text
    assert [line.removesuffix("\n") for line in read(path, compression)] == [
        line.removesuffix("\n") for line in re.findall(".*\n|.+", text.replace(newline, "\n"))
    ]
    with TextFile(path, compression) as file:
        assert file.text() == text.replace(newline, "\n")


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("cut", [1, 5000, 69_998])
def test_files_put_one_behind_another_are_read_to_the_end(tmp_path, compression, cut):
    content = "".join(noise(1000)).encode()
    parts = [content[:cut], b"", content[cut:]]
    blob = b"".join(COMPRESS[compression](part) for part in parts)
    if compression == ".zst":  # a frame to be skipped, as parallel compressors write them
        blob = b"\x50\x2a\x4d\x18\x05\x00\x00\x00index" + blob
    (tmp_path / "text").write_bytes(blob)
    assert read(tmp_path / "text", compression) == noise(1000)


def test_a_file_that_expands_much_comes_in_pieces(tmp_path):
    (tmp_path / "text").write_bytes(COMPRESS[".zst"](b"the same\n" * 500_000))
    with TextFile(tmp_path / "text", ".zst") as file:
        assert sum(line == "the same\n" for line in file.lines()) == 500_000


@pytest.mark.parametrize("compression", COMPRESS)
def test_the_fraction_is_where_the_reader_is(tmp_path, compression):
    lines = noise(5000)
    (tmp_path / "text").write_bytes(COMPRESS[compression]("".join(lines).encode()))
    size = (tmp_path / "text").stat().st_size
    ahead = 2**14 / len("".join(lines)) + CHUNK / size  # what buffers hold
    with TextFile(tmp_path / "text", compression) as file:
        seen = [file.fraction for _ in file.lines()]
        assert file.fraction == 1.0
    assert seen == sorted(seen)
    assert all(-0.02 <= fraction - (i + 1) / 5000 <= ahead for i, fraction in enumerate(seen))


def test_the_fraction_of_an_empty_file(tmp_path):
    (tmp_path / "text").touch()
    with TextFile(tmp_path / "text", "") as file:
        assert list(file.lines()) == [] and file.fraction == 1.0


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
@example(share=0)
def test_a_cut_is_never_silent(tmp_path_factory, compression, share):
    path = tmp_path_factory.mktemp("cut") / "text"
    blob = COMPRESS[compression]("".join(noise(300)).encode())
    path.write_bytes(blob[: int(len(blob) * share)])
    lines = []
    with TextFile(path, compression) as file, pytest.raises(PairsError, match=r"text.*damaged") as caught:
        lines.extend(file.lines())
    assert str(caught.value).startswith(f"{path}, after line {len(lines)}: " if lines else f"{path}: ")
    assert lines == noise(300)[: len(lines)]


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_changed_bit_is_never_silent(tmp_path_factory, compression, share, bit):
    path = tmp_path_factory.mktemp("bit") / "text"
    blob = bytearray(COMPRESS[compression]("".join(noise(300)).encode()))
    blob[int(len(blob) * share)] ^= 1 << bit
    path.write_bytes(blob)
    try:
        lines = read(path, compression)  # a bit of gzip's header may tell the time of day
    except PairsError as error:
        assert str(path) in str(error)
    else:
        assert lines == noise(300)


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("content", [b"", b"plain text\n", b"\x00" * 40])
def test_what_is_not_compressed_as_its_name_says(tmp_path, compression, content):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(PairsError, match=r"text: .*damaged \(.+\)"):
        read(tmp_path / "text", compression)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("line", [1, 2, 900])
def test_bytes_that_are_not_utf8_tell_their_line(tmp_path, compression, line):
    lines = [text.encode() for text in noise(1000)]
    lines[line - 1] = "caf\xe9\n".encode("latin-1")
    (tmp_path / "text").write_bytes(COMPRESS[compression](b"".join(lines)))
    with pytest.raises(PairsError, match=rf"text, line {line}: .*UTF-8"):
        read(tmp_path / "text", compression)


def test_a_line_without_an_end(tmp_path):
    (tmp_path / "text").write_text("short\n" + "x" * 100 + "\n")
    assert len(read(tmp_path / "text", "", longest=101)) == 2
    with pytest.raises(PairsError, match=r"text, line 2: .*99"):
        read(tmp_path / "text", "", longest=99)
