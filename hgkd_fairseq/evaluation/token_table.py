"""A table of tokens, one row each: tab-separated text, or parquet where pyarrow is there."""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path
from typing import Any

from hgkd_fairseq import files
from hgkd_fairseq.errors import UserError


class TokenTable:
    """Columns by name, in the order of the first call of :meth:`write`; the suffix of `file` says which format. The
    file is there, whole, once a `with` block has ended without an error.

    Raises:
        UserError: another suffix than .tsv and .parquet, or no pyarrow for the latter.
    """

    def __init__(self, file: str):
        self.file = file
        self.writer: Any = None  # made with the first rows, which know the columns
        self.stream: Any = None
        self.opened = contextlib.ExitStack()
        self.parquet = Path(file).suffix == ".parquet"
        if self.parquet:
            try:
                import pyarrow.parquet  # noqa: F401
            except ImportError:
                raise UserError(f"--tokens {file} needs pyarrow: pip install pyarrow, or name a .tsv file") from None
        elif Path(file).suffix != ".tsv":
            raise UserError(f"--tokens {file}: name a file that ends in .tsv or .parquet")

    def write(self, columns: dict[str, list]) -> None:
        """Add rows; all columns are of one length."""
        if self.stream is None:
            self.stream = self.opened.enter_context(files.writing(self.file, "wb" if self.parquet else "w"))
        if self.parquet:
            import pyarrow
            import pyarrow.parquet

            table = pyarrow.table(columns)
            if self.writer is None:
                self.writer = self.opened.enter_context(pyarrow.parquet.ParquetWriter(self.stream, table.schema))
            self.writer.write_table(table)
            return
        if self.writer is None:
            self.writer = csv.writer(self.stream, delimiter="\t", lineterminator="\n")
            self.writer.writerow(columns)
        self.writer.writerows(zip(*columns.values(), strict=True))

    def __enter__(self) -> TokenTable:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self.opened.__exit__(*error)


def opened(file: str | None) -> contextlib.AbstractContextManager[TokenTable | None]:
    """The table for a `with` statement, which closes it; None for no file."""
    return TokenTable(file) if file else contextlib.nullcontext()
