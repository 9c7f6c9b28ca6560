"""What users of Kubernetes must see: Events about their objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

from svcdp.errors import ManifestError
from svcdp.kube.model import ObjectKey

__all__ = ["Event", "Recorder"]


@dataclass(frozen=True, slots=True)
class Event:
    """``reason`` is a word for machines, such as ``FailedToStartServiceHealthcheck``."""

    regarding: ObjectKey
    reason: str
    message: str
    type: Literal["Normal", "Warning"] = "Warning"

    @classmethod
    def of(cls, regarding: ObjectKey, reason: str, problem: ManifestError) -> Self:
        """That an object is wrong."""
        return cls(regarding, reason, f"{problem.field}: {problem.message}")


Recorder = Callable[[Event], None]
"""Takes events. Must return at once, and must not raise."""
