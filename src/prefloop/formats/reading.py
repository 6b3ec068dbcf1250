"""Rows of JSON Lines, JSON lists and Parquet, plain or gzipped, one at a time and never more than a row in memory."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from prefloop.formats.limits import (
    DECODER,
    Limits,
    RawRow,
    RowProblemError,
    check_json,
    limit_error,
    parse_json,
    too_large,
)
from prefloop.records import PrefloopError

BLOCK = 1 << 16
READ_AHEAD = 1 << 22
"""Bytes that are read, and held against the limits, before the first row is: small bombs are refused unread."""

FILES = "JSON Lines, a JSON list or Parquet, plain or gzipped"
_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"


class _Metered(io.RawIOBase):
    """The decompressed bytes of a file, counted against the limits."""

    def __init__(self, file: io.BufferedReader, name: str, limits: Limits) -> None:
        self.file = file
        self.name = name
        self.limits = limits
        self.num_bytes = 0
        compressed = file.peek(2)[:2] == b"\x1f\x8b"
        self.data: Any = gzip.GzipFile(fileobj=file) if compressed else file

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        try:
            count = int(self.data.readinto(into))
        except (OSError, EOFError, zlib.error) as error:
            raise PrefloopError(f"{self.name} cannot be read: {error}") from None
        self.num_bytes += count
        self._check()
        return count

    def _check(self) -> None:
        limits = self.limits
        if self.num_bytes > limits.max_bytes:
            raise limit_error(self.name, f"holds more than {limits.max_bytes} bytes")
        if self.num_bytes > max(limits.max_ratio * self.file.tell(), BLOCK):
            raise limit_error(self.name, f"unpacks to more than {limits.max_ratio:.0f} times its size")

    def close(self) -> None:
        self.file.close()
        super().close()


_Stream: TypeAlias = "io.BufferedReader[_Metered]"


def read_rows(path: Path, limits: Limits) -> Iterator[RawRow]:
    """The rows of a file: Parquet, a JSON list of objects, or JSON Lines, whichever it is.

    Raises:
        PrefloopError: the file cannot be read or goes beyond a limit.
    """
    if not path.is_file():
        raise PrefloopError(f"there is no file {path}" if not path.exists() else f"{path} is not a file")
    for num_rows, row in enumerate(_rows(path, limits), 1):
        if num_rows > limits.max_rows:
            raise limit_error(str(path), f"holds more than {limits.max_rows} rows")
        yield row


def _rows(path: Path, limits: Limits) -> Iterator[RawRow]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise PrefloopError(f"{path} cannot be read: {error.strerror}") from None
    with file:
        if file.peek(4)[:4] == b"PAR1":
            from prefloop.formats.parquet import parquet_rows

            yield from parquet_rows(path, limits)
            return
        stream = io.BufferedReader(_Metered(file, str(path), limits), READ_AHEAD)
        start = stream.peek(1).removeprefix(_BOM).lstrip()
        yield from _ListReader(stream, limits).rows() if start[:1] == b"[" else _jsonl_rows(stream, str(path), limits)


def _jsonl_rows(stream: _Stream, name: str, limits: Limits) -> Iterator[RawRow]:
    line = 0
    while raw := stream.readline(limits.max_row_bytes + 1):
        line += 1
        if line > limits.max_rows:
            raise limit_error(name, f"holds more than {limits.max_rows} rows")
        if len(raw) > limits.max_row_bytes:
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(BLOCK)
            yield RawRow(line, 0, problem=too_large(limits))
        elif text := (raw.removeprefix(_BOM) if line == 1 else raw).strip():
            yield _parse_line(line, text, limits)


def _parse_line(line: int, raw: bytes, limits: Limits) -> RawRow:
    try:
        return RawRow(line, len(raw), parse_json(raw.decode(), limits))
    except UnicodeDecodeError as error:
        problem = RowProblemError("", f"not UTF-8 text: {error.reason} at byte {error.start}")
    except RowProblemError as found:
        problem = found
    if not raw.startswith(b"{"):
        problem = RowProblemError("", f"{problem}; what is read is {FILES}")
    return RawRow(line, len(raw), problem=problem)


class _BrokenListError(Exception):
    """The list cannot be read on: what comes after has no known beginning."""


class _ListReader:
    """Reads the objects of a JSON list one after another."""

    def __init__(self, stream: _Stream, limits: Limits) -> None:
        self.stream = stream
        self.limits = limits
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.position = 0
        self.line = 1
        self.at_end = False

    def rows(self) -> Iterator[RawRow]:
        """The rows; after text that is not JSON a last row says that the rest cannot be read."""
        try:
            yield from self._items()
        except _BrokenListError as broken:
            reason = f"{broken}; the rest of the list cannot be read"
            yield RawRow(self.line, 0, problem=RowProblemError("", reason))

    def _items(self) -> Iterator[RawRow]:
        self._expect("[")
        separator = self._peek()
        if separator == "]":
            self.position += 1
        while separator != "]":
            self._skip_space()
            yield self._item()
            separator = self._expect(",]")
        if self._peek():
            raise _BrokenListError("there is text after the list")

    def _fill(self, size: int) -> None:
        raw = self.stream.read(size)
        self.at_end = not raw
        try:
            new = self.decoder.decode(raw, final=self.at_end)
        except UnicodeDecodeError as error:
            raise _BrokenListError(f"not UTF-8 text: {error.reason}") from None
        self.text = self.text[self.position :] + new
        self.position = 0

    def _skip_space(self) -> None:
        while True:
            match = _SPACE.match(self.text, self.position)
            end = match.end() if match else self.position
            self.line += self.text.count("\n", self.position, end)
            self.position = end
            if end < len(self.text) or self.at_end:
                return
            self._fill(BLOCK)

    def _peek(self) -> str:
        self._skip_space()
        return self.text[self.position : self.position + 1]

    def _expect(self, characters: str) -> str:
        found = self._peek()
        if not found or found not in characters:
            wanted = " or ".join(repr(character) for character in characters)
            raise _BrokenListError(f"expected {wanted}, found {repr(found) if found else 'the end of the file'}")
        self.position += 1
        return found

    def _item(self) -> RawRow:
        """Decode the item at the position, reading on in growing steps while it is cut off."""
        step = BLOCK
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.position)
                return self._row(value, end)
            except json.JSONDecodeError as error:
                if self.at_end or not self._may_be_cut(error):
                    raise _BrokenListError(f"not valid JSON: {error.msg}") from None
            except RecursionError:
                raise _BrokenListError(f"nested deeper than {self.limits.max_depth} levels") from None
            except ValueError as error:
                raise _BrokenListError(f"not valid JSON: {error}") from None
            if len(self.text) - self.position > self.limits.max_row_bytes:
                raise _BrokenListError(str(too_large(self.limits)))
            self._fill(step)
            step *= 2

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the text may simply go on: the error lies at its end, or in a string that is still open."""
        return error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 16

    def _row(self, value: object, end: int) -> RawRow:
        text = self.text[self.position : end]
        line = self.line
        self.line += text.count("\n")
        self.position = end
        try:
            check_json(value, text, self.limits)
        except RowProblemError as problem:
            return RawRow(line, len(text), problem=problem)
        return RawRow(line, len(text), value)
