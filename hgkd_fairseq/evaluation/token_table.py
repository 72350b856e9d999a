"""Tables with a row per token, as tab-separated text or, if pyarrow is installed, Parquet."""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path
from typing import Any

from hgkd_fairseq import files
from hgkd_fairseq.errors import UserError


class TokenTable:
    """Writer of a table, used in a `with` statement.

    The columns are in the order of the first call of :meth:`write`. The file is created, complete, when the `with`
    block ends without an error.

    Args:
        file: file to write; its suffix, .tsv or .parquet, determines the format.

    Raises:
        UserError: the suffix is another one, or pyarrow is not installed and the suffix is .parquet.
    """

    def __init__(self, file: str):
        self.file = file
        self.writer: Any = None  # created by the first call of `write`, which gives the columns
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
        """Add rows.

        Args:
            columns: values by column name; all columns have the same length.

        Raises:
            UserError: the file cannot be written.
        """
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
    """Return a context manager that opens a :class:`TokenTable`; without a file its value is None."""
    return TokenTable(file) if file else contextlib.nullcontext()
