"""An option is written once, in the signature of the Python function that does the work.

    def measure(run: Path, *, batch: Annotated[Sequence[int], typer.Option(help="Sizes.")] = (1, 8)):

    @takes(measure)
    def command(json: Json = False, **asked: Any) -> None:
        found = measure(**asked)

`command` has the options of `measure` that carry a `typer.Option` or `typer.Argument`, then its
own; what a user gave of the first comes as `asked`, in the types that `measure` takes. Words that
several functions share stand in a `TypedDict`, taken as `**words: Unpack[...]`. The help is the text
of `measure` up to its first titled section.
"""

import builtins
import copy
import functools
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import typer
from typer.models import ArgumentInfo, OptionInfo

from mdpd_deploy.errors import UserError, unknown

REPEATED = "repeated"  # marks a sequence that is given word by word: --set A --set B
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")]
Overwrite = Annotated[bool, typer.Option(help="Replace --out.")]
_SECTIONS = re.compile(r"^ *(Args|Returns|Raises|Example):$", re.MULTILINE)
_BY_KEYWORD = inspect.Parameter.KEYWORD_ONLY
Command = Callable[..., None]


def takes(work: Callable[..., Any], *, words_last: bool = False) -> Callable[[Command], Command]:
    """Give a command the options of the function that does its work.

    The command gets those that differ from their defaults, by keyword. Shared words stand first in
    the help, or with `words_last` behind the function's own.
    """

    def decorate(command: Command) -> Command:
        own = _parameters(command)
        shared = _parameters(work, words_last).items()
        typed = {name: _for_typer(p) for name, p in shared if _info(p) and name not in own}

        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {name: values[name] for name in own}
            for name, (parameter, read) in typed.items():
                if values[name] is not None and values[name] != parameter.default:
                    given[name] = read(values[name])
            command(**given)

        together = [*own.values(), *(parameter for parameter, _ in typed.values())]
        together.sort(key=lambda p: (_is_option(p), p.name in own))
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(kind=_BY_KEYWORD) for p in together]
        )
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in together}
        run.__doc__ = command.__doc__ or _SECTIONS.split(work.__doc__ or "")[0].rstrip()
        return run

    return decorate


class _Names(dict[str, Any]):
    """The names of a module; one that is imported for type checkers only is `Any`."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, Any)


def _parameters(
    function: Callable[..., Any], words_last: bool = False
) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function with annotations that are no longer text."""
    names = _Names(vars(sys.modules[function.__module__]))
    hints = get_type_hints(function, localns=names, include_extras=True)
    plain: dict[str, inspect.Parameter] = {}
    words: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            plain[name] = parameter.replace(annotation=hints.get(name, Any))
        elif (shared := get_args(hints.get(name))) and is_typeddict(shared[0]):
            words = {
                word: inspect.Parameter(word, _BY_KEYWORD, default=None, annotation=hint)
                for word, hint in get_type_hints(shared[0], include_extras=True).items()
            }
    return {**plain, **words} if words_last else {**words, **plain}


def _info(parameter: inspect.Parameter) -> OptionInfo | ArgumentInfo | None:
    marks = getattr(parameter.annotation, "__metadata__", ())
    return next((mark for mark in marks if isinstance(mark, OptionInfo | ArgumentInfo)), None)


def _is_option(parameter: inspect.Parameter) -> bool:
    return not isinstance(_info(parameter), ArgumentInfo)


def _for_typer(parameter: inspect.Parameter) -> tuple[inspect.Parameter, Callable[[Any], Any]]:
    """Return a parameter in the types that typer reads, and what turns its value back."""
    hint, *marks = get_args(parameter.annotation)
    info, default = copy.copy(_info(parameter)), parameter.default
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [kind for kind in members if kind is not type(None)]
    many = next((kind for kind in kinds if get_origin(kind) is Sequence), None)
    kind: Any = kinds[0]
    read: Callable[[Any], Any] = _same
    if many is not None and (REPEATED in marks or isinstance(info, ArgumentInfo)):
        kind, default = list[get_args(many)[0]], None  # type: ignore[misc]
    elif many is not None:
        kind, read = str, functools.partial(_split, get_args(many)[0], parameter.name)
        default = ",".join(map(str, default)) if isinstance(default, Sequence) else default
    elif get_origin(kind) is Literal:
        kind = str
    elif kind is bool and default is False and isinstance(info, OptionInfo):
        info.default = f"--{_dashed(parameter.name)}"  # without a --no-
    kind = kind if default is not None else kind | None
    return parameter.replace(annotation=Annotated[kind, info], default=default), read


def _same(value: Any) -> Any:
    return value


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _split(kind: type, name: str, text: str) -> list[Any]:
    """Split an option's value at its commas."""
    if kind is str:
        return split_words(text)
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        numbers = "whole numbers with commas, as in 1,8,32" if kind is int else (
            "numbers with commas, as in 0.3,1,3"
        )  # fmt: skip
        raise UserError(f"--{_dashed(name)} {text}: give {numbers}.") from None


def split_words(text: str) -> list[str]:
    """Split at commas outside brackets; empty words are left out."""
    return [word.strip() for word in re.split(r",(?![^\[]*\])", text) if word.strip()]


def fields_of(words: type, given: Mapping[str, Any], caller: str) -> dict[str, Any]:
    """Return the words of a `TypedDict` by the fields that their annotations name, or by their own.

    Raises:
        UserError: For a word that is none of them.
    """
    hints = get_type_hints(words, include_extras=True)
    for name in given:
        if name not in hints:
            raise unknown(caller, name, hints)
    named = {name: [m for m in hints[name].__metadata__ if isinstance(m, str)] for name in given}
    return {(named[name] or [name])[0]: value for name, value in given.items()}


def check_word(option: str, given: object, choices: Any) -> None:
    """Raise `UserError` for a word that is neither None nor one of a `Literal`'s."""
    if given is not None and given not in get_args(choices):
        raise unknown(option, given, get_args(choices))


def print_json(plain: Any) -> None:
    """Print a result as JSON, and nothing else."""
    import json

    typer.echo(json.dumps(plain, indent=2, allow_nan=False))
