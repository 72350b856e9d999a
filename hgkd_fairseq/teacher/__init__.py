"""Sources of the teacher's output for a batch, which is what the student distils: one module per source."""

from hgkd_fairseq.teacher import live, loras, past, stored, unigram  # noqa: F401  they register their sources
from hgkd_fairseq.teacher.signals import Dense, Gold, Signal, Sparse
from hgkd_fairseq.teacher.source import SOURCES, Request, TeacherSource, given, make, register_source

__all__ = [
    "SOURCES", "Dense", "Gold", "Request", "Signal", "Sparse", "TeacherSource", "given", "make", "register_source",
]  # fmt: skip
