"""Other methods as plans, to compare momentum with.

So all are steered, tuned and measured in one way.

Every method gives arms (:class:`austeer.baselines.arm.Arm`): plans that ``steer`` accepts, with a number of AUs each,
and no strength yet.
"""

from .chosen import random_plan
from .methods import HEADS, METHODS, Method, Wanted, arms, profiles_needed, sites_needed

__all__ = ["HEADS", "METHODS", "Method", "Wanted", "arms", "profiles_needed", "random_plan", "sites_needed"]
