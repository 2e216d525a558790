"""Does it do what was recorded? A replay of a plan, in any engine."""

from .record import record_replay
from .server import VerifyError
from .verification import Verification
from .verify import verify

__all__ = ["Verification", "VerifyError", "record_replay", "verify"]
