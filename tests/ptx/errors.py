"""The one exception of the package."""

from __future__ import annotations


class PTXError(Exception):
    """What a kernel did wrong, or what this interpreter does not know.

    `lane` is the first offending position in the arrays of the failing instruction; the machine
    turns it into the coordinates of a thread.
    """

    def __init__(self, message: str, lane: int | None = None) -> None:
        super().__init__(message)
        self.lane = lane
