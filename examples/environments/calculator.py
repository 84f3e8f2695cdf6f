"""An environment with tools, and a reward function, for examples/recipes/calculator.yaml."""


class Calculator:
    """The model calls one operation at a time. A response without a call is its answer."""

    def reset(self, **columns) -> None:
        """Nothing is kept between calls."""

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        return a + b

    def multiply(self, a: int, b: int) -> int:
        """Multiply two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        return a * b


def right_answer(completions, answer, **columns) -> list[float]:
    """Return 1 for each episode whose last message is the answer. A completion is the messages of an episode."""
    return [float(messages[-1]["content"].strip() == gold) for messages, gold in zip(completions, answer, strict=True)]
