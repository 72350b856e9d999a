"""Gates decide WHEN to distil: they map per-token statistics to per-token loss weights. Independent of fairseq.

A gate reads the log-probability of a token under the student and under the teacher. It returns the weights of the terms
of the loss

    loss = sum_t  data_t * CE(y_t, P_student)  +  teacher_t * KL(P_teacher^tau || P_student)
                  +  uniform_t * CE(1/V, P_student).

The statistics are detached: no gradient passes from a gate into the student. Most gates are pure functions; a gate with
state (such as a queue) or with learned parameters is a class, instantiated once per run. README.md explains how to add
a gate.
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
