"""`mdpd recipes`: the papers' protocols that `--recipe` takes, all in a table or one of them whole."""

from __future__ import annotations

from typing import Annotated

import typer

from mdpd_deploy.commands.verb import Json, print_json


def command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show all of one.")] = None,
    json: Json = False,
) -> None:
    """List the papers' protocols for --recipe of train and compare, or show all that one sets."""
    from mdpd_deploy.config.recipes import read_recipe, recipe_names, recipe_text
    from mdpd_deploy.report.terminal import print_table

    recipes = [read_recipe(known) for known in ([name] if name else recipe_names())]
    if json:
        plain = [recipe.model_dump() for recipe in recipes]
        print_json(plain[0] if name else plain)
    elif name:
        typer.echo(recipe_text(name))
    else:
        rows = [(r.name, r.paper, r.table, r.line) for r in recipes]
        print_table(None, ("recipe", "paper", "table", "trains"), rows)
