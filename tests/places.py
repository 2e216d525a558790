"""Where the tests' files are."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
#: Real task data, beside the checkout; what needs it skips where it is absent.
SHARED_DATA = ROOT.parent / "shared" / "data"
