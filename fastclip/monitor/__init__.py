"""Gradients seen while they are clipped: norms, coefficients, layers and counts, with alarms, for no extra read."""

from .alarms import GradientWarning
from .monitor import GradMonitor
from .watch import watched, watched_process

__all__ = ["GradMonitor", "GradientWarning", "watched", "watched_process"]
