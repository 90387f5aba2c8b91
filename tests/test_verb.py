"""An option that stands once, in a Python function's signature, reaches the function from a command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, Unpack

import pytest
import typer
from typer.testing import CliRunner

from mdpd_deploy import build_engine, fit
from mdpd_deploy.commands.verb import REPEATED, check_word, fields_of, takes
from mdpd_deploy.errors import UserError

if TYPE_CHECKING:
    from mdpd_deploy.config import Config


class Words(TypedDict, total=False):
    rate: Annotated[float | None, typer.Option(help="A rate."), "optim.lr"]
    text: Annotated[str | Sequence[str] | None, typer.Option()]


Form = Literal["round", "square"]


def draw(
    places: Annotated[Sequence[Path], typer.Argument(metavar="PLACE...")],
    out: Annotated[Path | str | Config | None, typer.Option(help="Where.")] = None,
    *,
    sizes: Annotated[Sequence[int], typer.Option(help="Sizes.")] = (1, 8),
    names: Annotated[Sequence[str] | None, typer.Option()] = None,
    set: Annotated[Sequence[str], typer.Option(), REPEATED] = (),
    form: Annotated[Form, typer.Option()] = "round",
    two_sided: Annotated[bool, typer.Option()] = False,
    filled: Annotated[bool | None, typer.Option()] = None,
    secret: str = "",
    **words: Unpack[Words],
) -> None:
    """Draw figures.

    Args:
        secret: Nobody's business on a command line.
    """


def run(*arguments: str) -> tuple[dict[str, Any], str]:
    """Return what a command over `draw` is handed, and what it printed."""
    got: dict[str, Any] = {}

    @takes(draw)
    def command(own: Annotated[int, typer.Option(help="Its own.")] = 3, **asked: Any) -> None:
        got.update(asked, own=own)

    app = typer.Typer(rich_markup_mode=None)
    app.command()(command)
    done = CliRunner().invoke(app, list(arguments))
    if isinstance(done.exception, UserError):
        raise done.exception
    return got, done.output


def test_only_what_differs_from_the_defaults_is_handed_over_in_the_functions_types():
    assert run("a")[0] == {"places": [Path("a")], "own": 3}
    assert run("a", "--sizes", "1,8", "--form", "round")[0] == {"places": [Path("a")], "own": 3}
    words = "a b --out o --sizes 2,4 --names x,y[1,2] --set p=1 --set q=2 --form square"
    got, _ = run(*words.split(), "--two-sided", "--no-filled", "--rate", "0.5", "--text", "A,B")
    assert got == {
        "places": [Path("a"), Path("b")],
        "out": Path("o"),
        "sizes": [2, 4],
        "names": ["x", "y[1,2]"],
        "set": ["p=1", "q=2"],
        "form": "square",
        "two_sided": True,
        "filled": False,
        "rate": 0.5,
        "text": ["A", "B"],
        "own": 3,
    }


def test_the_help_is_the_functions_own_without_what_carries_no_mark():
    _, printed = run("--help")
    assert "Draw figures." in printed and "Nobody's business" not in printed
    assert "--secret" not in printed and "--no-two-sided" not in printed
    assert "[default: 1,8]" in printed and printed.index("--rate") < printed.index("--sizes")
    assert printed.index("--filled") < printed.index("--own")


def test_numbers_that_are_none_are_named_with_their_option():
    with pytest.raises(UserError, match="--sizes 1,two: give whole numbers with commas"):
        run("a", "--sizes", "1,two")


def test_words_are_named_by_the_fields_they_stand_for():
    assert fields_of(Words, {"rate": 1.0, "text": "A"}, "f") == {"optim.lr": 1.0, "text": "A"}
    with pytest.raises(UserError, match=r"f: unknown 'rat'\. Did you mean 'rate'"):
        fields_of(Words, {"rat": 1.0}, "f")
    with pytest.raises(UserError, match=r"fit: unknown 'bach'\. Did you mean 'batch'"):
        fit(bach=3)  # type: ignore[call-arg]
    with pytest.raises(UserError, match="build_engine: unknown 'tf33'"):
        build_engine("nowhere", tf33=True)  # type: ignore[call-arg]


def test_a_word_that_is_no_choice_is_answered_with_the_nearest():
    check_word("--form", None, Form)
    with pytest.raises(UserError, match=r"--form: unknown 'sqare'\. Did you mean 'square'"):
        check_word("--form", "sqare", Form)
