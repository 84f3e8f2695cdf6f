"""Finds the answer in a response, so that a scorer judges the answer alone and not the thought before it.

A task names an extractor in the recipe (`answer_extractor`); a response without an answer gets no reward. Left out:
what tells the model to write its answer so. That is the question's or the system prompt's part.
"""

import re
from collections import deque
from dataclasses import dataclass

import regex

from gspo_megatron.config import TaskConfig
from gspo_megatron.config.constraints import require

PATIENCE = 1.0  # seconds for a regular expression on one response: some patterns take for ever on some texts
OPEN_TAG, CLOSE_TAG = "<answer>", "</answer>"
BOX = "\\boxed{"


@dataclass(frozen=True)
class AnswerExtractor:
    """An extractor by its name in the recipe: where the answer of a response is, and how one is written there."""

    name: str = "none"
    pattern: str | None = None  # of "regex"

    @classmethod
    def of(cls, task: TaskConfig) -> "AnswerExtractor":
        """Return what a task of the recipe names."""
        return cls(task.answer_extractor, task.answer_pattern)

    def find(self, response: str) -> str | None:
        """Return the answer without the white space around it, None where there is none; the whole response for none.

        The last one counts: the last line that is not empty, the last closed `<answer>`, the last `\\boxed{}`, the last
        match, of which its group where it has one. A regular expression that takes longer than PATIENCE finds nothing.
        """
        if self.name == "none":
            return response
        finders = {"last_line": _last_line, "answer_tag": _in_tag, "boxed": _in_box, "regex": self._matched}
        found = finders[self.name](response)
        return None if found is None else found.strip()

    def write(self, answer: str, task: str) -> str:
        """Return a response with nothing but this answer, in the place where `find` looks.

        Args:
            task: the recipe's section, for the message.

        Raises:
            ConfigError: it would not be found there: an answer of several lines, a pattern that wants words around it.
        """
        forms = {"answer_tag": f"{OPEN_TAG}{answer}{CLOSE_TAG}", "boxed": f"{BOX}{answer}}}"}
        response = forms.get(self.name, answer)
        found = self.find(response)
        require(
            (found or "").strip() == answer.strip(),
            f"{task}.answer_extractor",
            self.name,
            f"finds {found!r} where the gold answer {answer!r} is written for it",
            "Choose another one; with a regex that wants words around the answer, give warm_start.steps 0.",
        )
        return response

    def _matched(self, response: str) -> str | None:
        try:
            last = deque(regex.finditer(self.pattern or "", response, timeout=PATIENCE), maxlen=1)
        except TimeoutError:
            return None
        return last[0].group(last[0].re.groups) if last else None  # group 0 is the whole match


def _last_line(response: str) -> str | None:
    lines = response.strip().splitlines()
    return lines[-1] if lines else None


def _in_tag(response: str) -> str | None:
    end = response.rfind(CLOSE_TAG)
    start = response.rfind(OPEN_TAG, 0, max(end, 0))
    return None if start < 0 else response[start + len(OPEN_TAG) : end]


def _in_box(response: str) -> str | None:
    """Up to the brace that closes the last box; escaped braces (\\{) open and close nothing."""
    start = response.rfind(BOX)
    if start < 0:
        return None
    start, depth = start + len(BOX), 1
    for token in re.finditer(r"\\.|[{}]", response[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return response[start : start + token.start()]
    return None
