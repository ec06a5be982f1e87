"""How often a client may ask."""

import time
from collections.abc import Callable


class TokenBucket:
    """`burst` at once, then `rate` a second."""

    def __init__(self, burst: float, rate: float, clock: Callable[[], float] = time.monotonic):
        self.burst, self.rate, self._clock = burst, rate, clock
        self._left, self._at = burst, clock()

    def take(self, cost: float = 1.0) -> bool:
        """False when there are not as many left; then none are taken."""
        now = self._clock()
        self._left = min(self.burst, self._left + (now - self._at) * self.rate)
        self._at = now
        if self._left < cost:
            return False
        self._left -= cost
        return True
