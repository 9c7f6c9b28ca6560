"""What users of Kubernetes must see: Events about their objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from svcdp.kube.model import ObjectKey

__all__ = ["Event", "Recorder"]


@dataclass(frozen=True, slots=True)
class Event:
    """``reason`` is a word for machines, such as ``FailedToStartServiceHealthcheck``."""

    regarding: ObjectKey
    reason: str
    message: str
    type: Literal["Normal", "Warning"] = "Warning"


Recorder = Callable[[Event], None]
"""Takes events. Must return at once, and must not raise."""
