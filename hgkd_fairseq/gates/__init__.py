"""WHEN to distil: per-token statistics in, per-token weights out. No fairseq here.

A gate reads how probable a token is under the student and under the teacher and returns the weights of the terms of

    loss = sum_t  data_t * CE(y_t, P_student)  +  teacher_t * KL(P_teacher^tau || P_student)
                  +  uniform_t * CE(1/V, P_student).

The statistics come detached: no gradient passes from a gate into the student. Most gates are pure functions; one that
remembers something (a queue) or learns something is a class, made once for a run. README.md says how to add one.
"""

from hgkd_fairseq.gates import hard, learned, pairs, published  # noqa: F401  they register their gates
from hgkd_fairseq.gates.contract import (
    Gate,
    GateError,
    GateWeights,
    Observer,
    Option,
    Parameter,
    Remembering,
    TokenStatistics,
)
from hgkd_fairseq.gates.registry import GATES, all_parameters, get_gate, register_gate
from hgkd_fairseq.ranges import Range

__all__ = [
    "GATES", "Gate", "GateError", "GateWeights", "Observer", "Option", "Parameter", "Range", "Remembering",
    "TokenStatistics", "all_parameters", "get_gate", "register_gate",
]  # fmt: skip
