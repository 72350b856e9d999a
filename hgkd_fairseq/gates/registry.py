"""The registry of gates, from which ``--gate``, the gates' options and `hgkd gates` are generated."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from hgkd_fairseq.gates.contract import ASKED, Gate, GateError, Option, Parameter, TokenStatistics
from hgkd_fairseq.ranges import FINITE

GATES: dict[str, Gate] = {}

SCOPES = ("token", "sentence", "batch")
TYPES = (float, int, str)
NO = torch.zeros(0)
NO_TOKENS = TokenStatistics(NO, NO, NO.long(), 0, vocabulary=2, asked=dict.fromkeys(ASKED, NO))


def register_gate(
    name: str,
    *,
    equation: str,
    source: str,
    scope: str = "token",
    needs_teacher: bool = True,
    compares: bool = True,
    uniform: bool = False,
    timed: bool = False,
    constant: bool = False,
    asks: tuple[str, ...] = (),
    closes: bool = False,
) -> Callable[[Any], Any]:
    """Return a decorator that registers a gate under ``name``, the value of ``--gate``. `Gate` describes the arguments.

    The decorator takes a function ``TokenStatistics -> GateWeights`` whose keyword-only arguments are the gate's
    parameters, or a class that is instantiated with its parameters once per run and whose instances are called like
    that function. An instance may be an `Observer` and `Remembering`; if it is an nn.Module, its parameters are trained
    with the student's.

    A parameter is a float, an int or a str with a default, `Annotated` with an `Option` for its help, range and
    choices. It becomes an option of the criterion with the same name.

    Raises:
        ValueError: the name is registered already, the scope is not "token", "sentence" or "batch", `asks` has an
            unknown statistic or belongs to an nn.Module, or a parameter has no default, no `Option` or another type.
    """
    if scope not in SCOPES:
        raise ValueError(f'scope of gate "{name}" is "{scope}"; it must be one of "token", "sentence", "batch"')

    if unknown := set(asks) - set(ASKED):
        raise ValueError(f'gate "{name}" asks for {", ".join(sorted(unknown))}; there are {", ".join(ASKED)}')

    def register(made: Any) -> Any:
        if name in GATES:
            raise ValueError(f'a gate named "{name}" is registered already; choose another name')
        if asks and inspect.isclass(made) and issubclass(made, torch.nn.Module):
            raise ValueError(f'gate "{name}" learns, and such a gate may ask for nothing')
        declared = declared_parameters(name, made)
        GATES[name] = Gate(
            name,
            made,
            scope,
            needs_teacher,
            compares,
            uniform,
            timed,
            constant,
            asks,
            closes,
            equation,
            source,
            declared,
        )
        return made

    return register


def declared_parameters(gate: str, made: Any) -> dict[str, Parameter]:
    """Return the parameters of a gate by name: the keyword-only arguments of its function or class.

    Raises:
        ValueError: a parameter has no default, no `Option` or an unsupported type.
    """
    function = made.__init__ if inspect.isclass(made) else made
    hints = typing.get_type_hints(function, include_extras=True)
    found = {}
    for name, argument in inspect.signature(function).parameters.items():
        if argument.kind != argument.KEYWORD_ONLY:
            continue
        kind, option = (*typing.get_args(hints.get(name)), None, None)[:2]
        kind = next((one for one in typing.get_args(kind) if one is not type(None)), kind)  # the T of Optional[T]
        if kind not in TYPES or not isinstance(option, Option) or argument.default is argument.empty:
            raise ValueError(
                f'parameter {name} of gate "{gate}" must be Annotated[float, int or str, Option(help, ...)] = default'
            )
        if kind is not str and option.range is None:
            option = option._replace(range=FINITE)
        found[name] = Parameter(name, kind, argument.default, option)
    return found


def get_gate(gate: str | Gate, **values: Any) -> Gate:
    """Return the gate of that name with its parameters bound to `values`; return a bound `Gate` as it is.

    Parameters that are not given have their defaults. If any are given, the gate is called once, with no tokens.

    Raises:
        GateError: the name is unknown (the message lists the known ones), a parameter is not one of this gate's or has
            an invalid value, or a `Gate` is given that is unbound (a class) or together with parameters.
    """
    if isinstance(gate, Gate):
        if values or inspect.isclass(gate.weights):
            raise GateError(f'this is the gate "{gate.name}" itself; give its name, with parameters')
        return gate
    if gate not in GATES:
        raise GateError(f'unknown gate "{gate}"; known gates: {", ".join(sorted(GATES))}')
    kind = GATES[gate]
    for name, value in values.items():
        if name not in kind.parameters:
            takers = ", ".join(sorted(other.name for other in GATES.values() if name in other.parameters))
            raise GateError(f'gate "{gate}" does not take it; it belongs to {takers or "no gate"}', name)
        if problem := kind.parameters[name].problem(value, gate):
            raise GateError(problem, name)
    made: Any = kind.weights
    if inspect.isclass(made):
        made = made(**values)
    elif kind.parameters:
        made = functools.partial(made, **values)
    if values:
        made(NO_TOKENS)  # a gate that checks its values itself raises here, not in the first step
    return replace(kind, weights=made)


def all_parameters() -> Mapping[str, list[tuple[str, Parameter]]]:
    """Return all parameters by name: for each a list of (gate name, parameter), in the order of registration.

    Raises:
        ValueError: two gates have a parameter with the same name and different types.
    """
    found: dict[str, list[tuple[str, Parameter]]] = {}
    for gate in GATES.values():
        for parameter in gate.parameters.values():
            others = found.setdefault(parameter.name, [])
            if others and others[0][1].type is not parameter.type:
                raise ValueError(
                    f"parameter {parameter.name} of gates {others[0][0]} and {gate.name} has two types; rename one"
                )
            others.append((gate.name, parameter))
    return found
