"""The study behind docs/study.md: AUs by effect per side effect beside every other method, on real tasks.

``python -m bench.study --data FOLDER`` runs it all, and goes on where it was when it is started again. Everything is
chosen on one part of a task and reported on another, at one limit on the side effect; a trial is one task with one
seed of its split.

    subjects.py   the tasks and the models          rows.py    the methods, each with the settings that it chooses among
    trial.py      one trial                         extras.py  how many pairs, whose text; what else a study asks
    summary.py    trials together, and the goals    __main__   the command
"""
