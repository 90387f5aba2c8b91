"""Studies: many trainings planned, run in child processes, and read side by side.

    plan.py      tasks × methods × learning rates × seeds, and the folder that holds them
    suites.py    groups of tasks (GLUE, VTAB-1K) and their means
    trial.py     one training in a child process
    schedule.py  the order of the trials: first the sweep of learning rates, then the seeds
    engines.py   where trials run: on this machine, or on a Ray cluster
    results.py   finished trials → one row per task and method
    table.py     rows as text: terminal and Markdown
    study_page.py  rows as a page with Pareto pictures

Nothing here trains: a trial is `mdpd train` on a config file.
"""
