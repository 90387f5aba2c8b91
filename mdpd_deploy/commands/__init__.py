"""One file per verb: each parses, composes the areas inside its functions, and prints.

A file holds the typer function of its verb and, where the verb is also Python API, the function
beside it that does the work. Module level imports stay light (typer and the standard library), so
that help is quick.

Shared by verbs: `options` (what they all take), `study_plan` and `study_facts` (the parts of
`compare`).
"""
