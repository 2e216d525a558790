"""``python -m bench`` is ``austeer bench``, from a checkout that is not installed."""

from austeer.cli import run

from .cli import app

run(app)
