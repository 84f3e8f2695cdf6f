"""Environments for examples/recipes/retry.yaml: a question may be answered again, with what the grader says of the
last answer."""

import functools

import reasoning_gym

grader = functools.cache(reasoning_gym.get_score_answer_fn)  # makes a data set, which takes its time


class Retry:
    """Ends when the answer is right. Each further try costs a part of the reward, so that a right first answer is
    best, and a wrong one is still worth mending."""

    COST = 0.2

    def reset(self, answer: str, metadata: dict, **columns) -> None:
        self.entry = {"answer": answer, "metadata": metadata}
        self.score = grader(metadata["source_dataset"])
        self.tries, self.last = 0, 0.0

    def step(self, text: str) -> tuple[str, bool]:
        """Return what the grader says, and whether the episode is over."""
        self.tries += 1
        self.last = float(self.score(text, self.entry))
        if self.last >= 1:
            return "", True
        return f"wrong: {self.last:.2f}", False

    def get_reward(self) -> float:
        return self.last - self.COST * (self.tries - 1)
