"""What verification found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One check and its outcome."""

    name: str
    passed: bool
    detail: str

    def to_json(self) -> dict[str, Any]:
        """The check as plain JSON."""
        return asdict(self)
