"""Measurements of what steering costs, and the pages made of them.

Imports austeer and austeer_kernels; nothing but tests/ imports it.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("austeer_kernels") is None:  # in a checkout that is not installed
    sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))
