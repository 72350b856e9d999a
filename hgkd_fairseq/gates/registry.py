"""All gates by name, with their parameters: ``--gate``, its options and `hgkd gates` are made of it."""

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
    """Decorator: register a gate under ``name``, the value that ``--gate`` takes.

    On a function ``TokenStatistics -> GateWeights``, whose keyword-only arguments are the gate's parameters; or on a
    class that is made from its parameters once for a run and is called like that function. Such an object may be an
    `Observer` and `Remembering`; where it is an nn.Module its parameters are trained with the student's.

    A parameter is a float, an int or a str with a default, and `Annotated` with an `Option`, its help, range and
    choices. It becomes an option of the criterion, of that name.

    Raises:
        ValueError: the name is taken, the scope is none of "token", "sentence" and "batch", it asks for statistics that
            there are not or learns beside them, or a parameter has no default, no `Option`, or another type.
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
    """The keyword-only arguments of a gate's function or class, by name."""
    function = made.__init__ if inspect.isclass(made) else made
    hints = typing.get_type_hints(function, include_extras=True)
    found = {}
    for name, argument in inspect.signature(function).parameters.items():
        if argument.kind != argument.KEYWORD_ONLY:
            continue
        kind, option = (*typing.get_args(hints.get(name)), None, None)[:2]
        kind = next((one for one in typing.get_args(kind) if one is not type(None)), kind)  # of Optional[...]
        if kind not in TYPES or not isinstance(option, Option) or argument.default is argument.empty:
            raise ValueError(
                f'parameter {name} of gate "{gate}" must be Annotated[float, int or str, Option(help, ...)] = default'
            )
        if kind is not str and option.range is None:
            option = option._replace(range=FINITE)
        found[name] = Parameter(name, kind, argument.default, option)
    return found


def get_gate(gate: str | Gate, **values: Any) -> Gate:
    """The gate of that name with these parameters; a `Gate` of bound ones passes through.

    Raises:
        GateError: an unknown name (the known ones are listed), a parameter that this gate does not have or refuses, a
            `Gate` with parameters beside it, or one whose class is not made yet.
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
        made(NO_TOKENS)  # where a gate refuses a value itself it is here, not in the first step
    return replace(kind, weights=made)


def all_parameters() -> Mapping[str, list[tuple[str, Parameter]]]:
    """Of each parameter that some gate has: (gate's name, its parameter of that name), in the order of registration.

    Raises:
        ValueError: two gates have a parameter of one name and different types.
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
