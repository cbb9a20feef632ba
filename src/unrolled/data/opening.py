"""Whatever is given as data, as a table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unrolled.data.tables import Table, open_parallel, open_table, table_of

if TYPE_CHECKING:
    from unrolled.config import Config

__all__ = ["open_data"]


def open_data(
    data: Any,
    config: Config,
    *,
    directory: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Table:
    """A table of files, or of rows in Python.

    Args:
        data: a path; a list of paths, of tables of the same columns, or where text goes in and text comes out, two
            text files whose lines belong together; a `Table`; an iterable of dictionaries; a Hugging Face dataset.
        directory: where its rows are kept meanwhile, see `open_table`.

    Raises:
        DataError: see `open_table`.
    """
    if isinstance(data, Table):
        return data
    if isinstance(data, str | Path):
        data = [data]
    if not isinstance(data, list | tuple) or not data or not all(isinstance(item, str | Path) for item in data):
        return table_of(data, directory=directory)
    settings: dict[str, Any] = {"errors": config.data.errors, "directory": directory, "progress": progress}
    both = config.input.kind == "text" and config.output.kind == "text"
    if len(data) == 2 and both and not config.input.columns and not config.output.columns:
        return open_parallel(data[0], data[1], **settings)
    settings |= {"format": config.data.format, "columns": config.data.names or None}
    wanted = [*config.input.columns, *config.output.columns, *([config.data.group] if config.data.group else [])]
    return open_table(data, wanted=wanted, **settings)
