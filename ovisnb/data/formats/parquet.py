"""Parquet as a container: rows of any format, with the pictures in the table or beside it.

    for line, entry, problem in parquet_rows("train.parquet"): ...
    write_parquet([{"image": {"bytes": png, "path": None}, "caption": "A cat."}], "captions.parquet")

Columns are keys, and a row is what the line of a JSON-lines file would be; nested columns
(`list<struct<from, value>>`) are lists and objects. An empty cell is a key that the row does not have, because a
table has every column in every row. Bytes in a column `image`, `images` or `video` are an encoded picture.

Reading goes through the row groups a few rows at a time. Memory is that of the rows that arrow decodes ahead, at
most about a thousand and never more than a row group, whatever the file's size. A row's "line" is its number, from 1.

Writing keeps to the same bound. What type a column has is known only after the last row, so the rows wait in a
temporary file until then. A column of whole pictures carries the mark by which `datasets` knows an `Image`.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from ovisnb.data.files import written
from ovisnb.data.formats.parts import present
from ovisnb.data.formats.rows import Row
from ovisnb.data.media import reason
from ovisnb.data.record import RecordError

PICTURES = ("image", "images", "video", "videos")
"""Columns in which bytes are an encoded picture."""
_HELD = 4 << 20  # bytes of rows in memory at a time, roughly
_MOST_ROWS = 1024
_GROUP_ROWS, _GROUP_BYTES = 256, 32 << 20  # of a row group that is written
_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet_rows(path: str | os.PathLike[str]) -> Iterator[Row]:
    """The rows of a parquet file, in order; RecordError, one sentence, if it is not one.

    A row that cannot be read is a `Row` with a problem. Where the file is damaged further in, the rows before
    the damage are given, then one `Row` with the problem.
    """
    path = Path(path)
    try:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16)
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RecordError(f"{path} is no parquet file that can be read ({reason(error)}): write it anew") from None
    with file:
        line = 0
        for number, group in enumerate(groups):
            try:
                for batch in file.iter_batches(rows_at_once(group), row_groups=[number], use_threads=False):
                    for entry, problem in batch_rows(batch):
                        line += 1
                        yield Row(line, entry, problem)
            except (pa.ArrowException, OSError, ValueError) as error:
                said = f"the table is damaged from here on ({reason(error)}): write the file anew"
                yield Row(line + 1, None, RecordError(said))
                return


def rows_at_once(group: pq.RowGroupMetaData) -> int:
    """How many rows of a row group are decoded at a time."""
    size = group.total_byte_size // max(group.num_rows, 1)
    return min(max(_HELD // max(size, 1), 1), _MOST_ROWS)


def write_parquet(rows: Iterable[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write rows as a parquet file, a column for each key; PIL images are written as PNG.

    Pictures (under the names of `PICTURES`) may be paths, `{"bytes", "path"}` or PIL images. The file appears whole
    or not at all. Raises RecordError for values that no table column can hold: text beside numbers, say.
    """
    with written(path) as out, tempfile.TemporaryFile(dir=Path(path).parent) as spool:
        try:
            _write(rows, spool, out)
        except RecordError:
            raise
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise RecordError(
                f"these rows are no table ({reason(error)}): give each key values of one type, or write JSON lines"
            ) from None


def batch_rows(batch: pa.RecordBatch) -> Iterator[tuple[Any, RecordError | None]]:
    """(entry, None) or (None, what is wrong) for each row of a batch."""
    try:
        rows = batch.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError):  # text that is not UTF-8, a date out of range
        rows = None
    for number in range(batch.num_rows):
        if rows is not None:
            yield _entry(rows[number]), None
            continue
        try:
            yield _entry(batch.slice(number, 1).to_pylist()[0]), None
        except (pa.ArrowException, ValueError, OverflowError) as error:
            yield None, RecordError(f"a cell that cannot be read ({reason(error)}): repair or drop this row")


def _entry(row: dict[str, Any]) -> dict[str, Any]:
    entry = present(row)
    for name in PICTURES:
        if name in entry:
            entry[name] = _with_pictures(entry[name])
    return entry


def _with_pictures(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": value}
    return [_with_pictures(item) for item in value] if isinstance(value, list) else value


def _write(rows: Iterable[dict[str, Any]], spool: BinaryIO, out: BinaryIO) -> None:
    """Rows -> `spool`, as tables that each have the schema they happen to have -> `out`, with the schema of all."""
    schema, places = pa.schema([]), []
    lists: set[str] = set()  # columns of pictures in which any cell is a list; until then the cells of all of them are
    for group in _groups(_cells(row, lists) for row in rows):
        names = dict.fromkeys(name for row in group for name in row)
        table = pa.table({name: [row.get(name) for row in group] for name in names})
        schema = pa.unify_schemas([schema, table.schema], promote_options="permissive")
        places.append(spool.tell())
        with pa.ipc.new_stream(pa.PythonFile(spool, "w"), table.schema) as stream:
            stream.write_table(table)
    schema = pa.schema([_picture_field(field) if field.name in PICTURES else field for field in schema])
    alone = {field.name for field in schema if field.name in PICTURES and field.name not in lists}
    written = pa.schema([field.with_type(field.type.value_type) if field.name in alone else field for field in schema])
    written = written.with_metadata(_features(written))
    with pq.ParquetWriter(out, written) as writer:
        for start in places:
            spool.seek(start)
            table = pa.ipc.open_stream(pa.PythonFile(spool, "r")).read_all()
            table = pa.concat_tables([schema.empty_table(), table], promote_options="permissive")
            columns = [pc.list_element(table[name], 0) if name in alone else table[name] for name in schema.names]
            writer.write_table(pa.table(columns, schema=written))


def _cells(row: dict[str, Any], lists: set[str]) -> dict[str, Any]:
    """The row with its pictures as cells, in a list; `lists` learns the columns where they came in one."""
    pictures = {name: row[name] for name in PICTURES if row.get(name) is not None}
    lists.update(name for name, value in pictures.items() if isinstance(value, list))
    listed = {name: value if isinstance(value, list) else [value] for name, value in pictures.items()}
    return {**row, **{name: _picture_cells(value) for name, value in listed.items()}}


def _groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The rows of a row group each: few, and fewer where they hold large pictures."""
    group, size = [], 0
    for row in rows:
        group.append(row)
        cells = [cell for name in PICTURES for cell in row.get(name) or () if isinstance(cell, dict)]
        size += sum(len(cell.get("bytes") or b"") for cell in cells)
        if len(group) == _GROUP_ROWS or size > _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _picture_cells(value: Any) -> Any:
    if isinstance(value, list):
        return [_picture_cells(item) for item in value]
    if isinstance(value, str):
        return {"bytes": None, "path": value}
    if isinstance(value, dict) and "data" in value:
        return {"bytes": value["data"], "path": None, **{k: v for k, v in value.items() if k != "data"}}
    image = value.get("image") if isinstance(value, dict) else value
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, "PNG")
        rest = {k: v for k, v in value.items() if k != "image"} if isinstance(value, dict) else {}
        return {"bytes": file.getvalue(), "path": None, **rest}
    return value


def _picture_field(seen: pa.Field) -> pa.Field:
    """A column of pictures, complete where only paths or only bytes were seen."""
    return seen.with_type(_picture_type(seen.type))


def _picture_type(seen: pa.DataType) -> pa.DataType:
    if pa.types.is_null(seen):
        return pa.list_(_PICTURE)
    if pa.types.is_list(seen):
        return pa.list_(_PICTURE if pa.types.is_null(seen.value_type) else _picture_type(seen.value_type))
    if not pa.types.is_struct(seen):
        return seen
    known = {part.name: part for part in (*seen, *_PICTURE)}  # ours wins
    first = [known.pop("bytes"), known.pop("path")]
    return pa.struct([*first, *known.values()])


def _features(fields: Iterable[pa.Field]) -> dict[str, str]:
    """The note in which `datasets` keeps what arrow has no type for; columns without one are read as they are."""
    features = {}
    for field in fields:
        if field.name in PICTURES and field.type == _PICTURE:
            features[field.name] = {"_type": "Image"}
        elif field.name in PICTURES and field.type == pa.list_(_PICTURE):
            features[field.name] = {"feature": {"_type": "Image"}, "_type": "List"}
    return {"huggingface": json.dumps({"info": {"features": features}})} if features else {}
