"""Processes that begin where a test module is imported already: starting one takes a fork, and not seconds."""

import multiprocessing
import os
import sys

import pytest

FORKS = multiprocessing.get_context("forkserver")
MODULES: list[str] = []


def may_start_from(module: str) -> None:
    """Makes the server of all forks import a module; called by the module itself, before any process is started."""
    MODULES.append(module)
    FORKS.set_forkserver_preload(MODULES)


def start(target, *args):
    """Starts ``target(*args)``, a function of a test module, in a process of its own."""
    process = FORKS.Process(target=target, args=args)
    with pytest.MonkeyPatch.context() as patch:  # for the server, at the first call
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        process.start()
    return process


def errors_to(path) -> None:
    """In a process: what it says of errors goes to a file."""
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
