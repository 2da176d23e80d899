"""Stop strings, wherever token boundaries fall."""

from __future__ import annotations


class StopMatcher:
    """Watches the text of one sequence. The stop string that ends first wins (of those the longest),
    so the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: tuple[str, ...], *, include_stop: bool = False) -> None:
        assert all(stops), "an empty stop string would match everywhere"
        self._stops = stops
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that may be shown now. What could be the start of a stop string is held back; after a
        match everything further is dropped."""
        if self.matched is not None:
            return ""
        window = self._held + text
        found = [(start + len(stop), -len(stop), stop) for stop in self._stops if (start := window.find(stop)) >= 0]
        if found:
            end, _, stop = min(found)
            self.matched = stop
            self._held = ""
            return window[: end if self._include_stop else end - len(stop)]
        held = self._length_held_back(window)
        self._held = window[len(window) - held :]
        return window[: len(window) - held]

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        rest, self._held = self._held, ""
        return rest

    def _length_held_back(self, window: str) -> int:
        """Length of the longest end of `window` that is the start of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(window)), 0, -1):
            end = window[len(window) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
