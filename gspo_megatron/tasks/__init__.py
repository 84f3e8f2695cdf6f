"""Questions with a checkable answer, and the reward of a response."""
