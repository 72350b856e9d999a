"""A table of tokens, one row each, written as it comes: tab-separated text, or parquet where pyarrow is there."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from hgkd_fairseq.errors import UserError


class TokenTable:
    """Columns by name, in the order of the first call of :meth:`write`; the suffix of `file` says which format.

    Raises:
        UserError: another suffix than .tsv and .parquet, or no pyarrow for the latter.
    """

    def __init__(self, file: str):
        self.file = file
        self.writer: Any = None  # made with the first rows, which know the columns
        self.stream: Any = None
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
        if self.parquet:
            import pyarrow
            import pyarrow.parquet

            table = pyarrow.table(columns)
            self.writer = self.writer or pyarrow.parquet.ParquetWriter(self.file, table.schema)
            self.writer.write_table(table)
            return
        if self.stream is None:
            self.stream = open(self.file, "w", encoding="utf-8", newline="")  # noqa: SIM115  closed in close()
            self.writer = csv.writer(self.stream, delimiter="\t", lineterminator="\n")
            self.writer.writerow(columns)
        self.writer.writerows(zip(*columns.values(), strict=True))

    def close(self) -> None:
        closing = self.writer if self.parquet else self.stream
        if closing is not None:
            closing.close()

    def __enter__(self) -> TokenTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
