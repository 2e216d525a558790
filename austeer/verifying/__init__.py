"""Does it do what was recorded? A replay of a plan, in any engine."""

from .record import record_replay
from .verdict import Verification
from .verify import VerifyError, verify

__all__ = ["Verification", "VerifyError", "record_replay", "verify"]
