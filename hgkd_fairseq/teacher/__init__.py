"""WHAT is distilled: where the teacher's view of a batch comes from. One file a source."""

from hgkd_fairseq.teacher import live, loras, past, stored, unigram  # noqa: F401  they register their sources
from hgkd_fairseq.teacher.signals import Dense, Gold, Signal, Sparse
from hgkd_fairseq.teacher.source import SOURCES, Request, TeacherSource, make, register_source

__all__ = [
    "SOURCES", "Dense", "Gold", "Request", "Signal", "Sparse", "TeacherSource", "make", "register_source",
]  # fmt: skip
