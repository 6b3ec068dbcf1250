"""Parquet in and out, through pyarrow (extra `parquet`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from prefloop.formats.limits import MIB, Limits, RawRow, RowProblemError, check_value, limit_error, too_large
from prefloop.records import JSONObject, PrefloopError

BATCH_ROWS = 256
CHUNK_ROWS = 1000
FREE_ROWS, FREE_VALUES, FREE_BYTES = 50_000, 500_000, 16 * MIB  # what a file of any size may unpack to
MESSAGE_FIELDS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")


def pyarrow_parquet() -> tuple[Any, Any]:
    """The modules `pyarrow` and `pyarrow.parquet`.

    Raises:
        PrefloopError: they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise PrefloopError("Parquet needs an extra: pip install 'prefloop[parquet]'") from None
    return pyarrow, pyarrow.parquet


def parquet_rows(path: Path, limits: Limits) -> Iterator[RawRow]:
    """The rows of a Parquet file; the line of a row is its number.

    Texts are read as dictionaries, so that a page which repeats one large text a million times stays small, and
    become objects one row at a time.

    Raises:
        PrefloopError: the file is damaged or goes beyond a limit.
    """
    arrow, parquet = pyarrow_parquet()
    try:
        texts = _text_columns(parquet.ParquetFile(path))
        file = parquet.ParquetFile(path, read_dictionary=texts)
        _check_declared(path, file.metadata, limits)
        first, num_bytes = 1, 0
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            num_bytes += sum(_num_bytes(column) for column in batch.columns)
            _check_unpacked(path, num_bytes, limits)
            yield from _batch_rows(batch, first, limits)
            first += batch.num_rows
    except (arrow.ArrowException, OSError) as error:
        raise PrefloopError(f"{path} is not a Parquet file that can be read: {str(error).splitlines()[0]}") from None


def _text_columns(file: Any) -> list[str]:
    columns = (file.schema.column(i) for i in range(len(file.schema)))
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def _check_declared(path: Path, metadata: Any, limits: Limits) -> None:
    """Hold what the file says of itself against the limits, before anything is decoded."""
    if metadata.num_rows > limits.max_rows:
        raise limit_error(str(path), f"holds more than {limits.max_rows} rows")
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    num_bytes = sum(column.total_uncompressed_size for column in columns)
    num_values = sum(column.num_values for column in columns)
    size = path.stat().st_size
    _check_unpacked(path, num_bytes, limits)
    if metadata.num_rows > max(size, FREE_ROWS) or num_values > max(10 * size, FREE_VALUES):
        raise limit_error(str(path), f"claims {metadata.num_rows} rows and {num_values} values in {size} bytes")


def _check_unpacked(path: Path, num_bytes: int, limits: Limits) -> None:
    if num_bytes > min(limits.max_bytes, max(10 * limits.max_ratio * path.stat().st_size, FREE_BYTES)):
        raise limit_error(str(path), f"unpacks to {num_bytes} bytes or more")


def _batch_rows(batch: Any, first: int, limits: Limits) -> Iterator[RawRow]:
    """The rows of a batch, halved until what becomes objects at once is no larger than a row may be."""
    num_bytes = sum(_num_bytes(column) for column in batch.columns)
    if num_bytes <= limits.max_row_bytes:
        yield from _objects(batch, first, num_bytes, limits)
    elif batch.num_rows == 1:
        yield RawRow(first, 0, problem=too_large(limits))
    else:
        half = batch.num_rows // 2
        yield from _batch_rows(batch.slice(0, half), first, limits)
        yield from _batch_rows(batch.slice(half), first + half, limits)


def _num_bytes(array: Any) -> int:
    """About how many bytes the values of an array take when written out, its dictionaries expanded."""
    arrow, _ = pyarrow_parquet()
    kind = array.type
    if arrow.types.is_struct(kind):
        return sum(_num_bytes(child) for child in array.flatten())
    if arrow.types.is_list(kind) or arrow.types.is_large_list(kind) or arrow.types.is_map(kind):
        return 8 * len(array) + _num_bytes(array.flatten() if not arrow.types.is_map(kind) else array.items)
    if arrow.types.is_dictionary(kind):
        import pyarrow.compute as compute

        lengths = compute.binary_length(array.dictionary).take(array.indices)
        return 8 * len(array) + (compute.sum(lengths).as_py() or 0)
    return 8 * len(array) + int(array.nbytes)


def _objects(batch: Any, first: int, num_bytes: int, limits: Limits) -> Iterator[RawRow]:
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            yield RawRow(first, num_bytes, problem=RowProblemError("", f"not UTF-8 text: {error.reason}"))
            return
        for index in range(batch.num_rows):
            yield from _objects(batch.slice(index, 1), first + index, num_bytes, limits)
        return
    for index, value in enumerate(values):
        yield _checked(value, first + index, num_bytes // batch.num_rows, limits)


def _checked(value: object, line: int, num_bytes: int, limits: Limits) -> RawRow:
    try:
        check_value(value, limits)
    except RowProblemError as problem:
        return RawRow(line, num_bytes, problem=problem)
    return RawRow(line, num_bytes, value)


def write_parquet(rows: Callable[[], Iterator[JSONObject]], path: Path) -> int:
    """Write rows of messages, texts and flags as Parquet under one schema; returns how many.

    `rows` is called twice: first to learn which columns and message fields occur, so that the file has no others
    (chat templates ask whether a field is defined).
    """
    arrow, parquet = pyarrow_parquet()
    columns, fields = _seen(rows())
    if not columns:
        return 0
    schema = _schema(columns, fields)
    num_rows = 0
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for chunk in _chunks(rows(), CHUNK_ROWS):
            writer.write_table(arrow.Table.from_pylist(chunk, schema=schema))
            num_rows += len(chunk)
    return num_rows


def _seen(rows: Iterable[JSONObject]) -> tuple[dict[str, type], set[str]]:
    columns: dict[str, type] = {}
    fields = {"role", "content"}
    for row in rows:
        for key, value in row.items():
            columns[key] = type(value)
            if isinstance(value, list):
                fields.update(field for message in value for field in message)
                fields.update("tool_calls.id" for m in value for call in m.get("tool_calls", ()) if "id" in call)
    return columns, fields


def _schema(columns: dict[str, type], fields: set[str]) -> Any:
    arrow, _ = pyarrow_parquet()
    text = arrow.string()
    function = arrow.struct([("name", text), ("arguments", text)])
    identity = [("id", text)] if "tool_calls.id" in fields else []
    calls = arrow.list_(arrow.struct([*identity, ("type", text), ("function", function)]))
    kinds = {name: calls if name == "tool_calls" else text for name in MESSAGE_FIELDS if name in fields}
    kind = {list: arrow.list_(arrow.struct(list(kinds.items()))), str: text, bool: arrow.bool_()}
    return arrow.schema([(name, kind[column]) for name, column in columns.items()])


def _chunks(rows: Iterable[JSONObject], size: int) -> Iterator[list[JSONObject]]:
    rows = iter(rows)
    while chunk := list(islice(rows, size)):
        yield chunk
