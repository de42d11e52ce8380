"""Parquet, by pyarrow: the rows of the text column are documents."""

from collections.abc import Iterable, Iterator
from typing import BinaryIO

from mori.cli import guarded
from mori.data.formats.archives import seekable
from mori.data.formats.rows import text_column
from mori.data.formats.text import ReadOptions, in_chunks

_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20


def read_parquet(file: BinaryIO, name: str, options: ReadOptions) -> Iterator[Iterable[str]]:
    """A document for each row. Raises UserError for a damaged file, and for one without a column of text."""
    import pyarrow
    from pyarrow import parquet

    def kind_of(data_type) -> str:
        types = pyarrow.types
        if types.is_dictionary(data_type):
            data_type = data_type.value_type
        if types.is_string(data_type) or types.is_large_string(data_type) or types.is_string_view(data_type):
            return "text"
        return "empty" if types.is_null(data_type) else f"{data_type}"[:60]

    with seekable(file) as source:
        damaged = f"{name} is damaged, cut off or no Parquet file"
        table = guarded(
            damaged,
            lambda: parquet.ParquetFile(
                source, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
            ),
        )
        schema = guarded(damaged, lambda: table.schema_arrow)
        column = text_column({field.name: kind_of(field.type) for field in schema}, name, options)
        number, batches = 0, table.iter_batches(_BATCH_ROWS, columns=[column])
        while True:
            place = f"{name} is damaged near row {number + 1}"
            batch = guarded(place, lambda: next(batches, None))
            if batch is None:
                return
            for text in guarded(place, lambda batch=batch: batch.column(0).to_pylist()):
                yield () if text is None else in_chunks(text)
            number += batch.num_rows
