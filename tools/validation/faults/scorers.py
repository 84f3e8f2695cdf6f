"""The program of the scorers, with spell_backward's scorer broken as SCORER in the environment says."""

import os
import sys
import time

from reasoning_gym.algorithmic.spell_backward import SpellBackwardDataset

from gspo_megatron.tasks.scoring_process import main

score = SpellBackwardDataset.score_answer


def broken(self, answer, entry):
    if answer == entry["answer"] and os.environ["SCORER"] != "always raises":
        return score(self, answer, entry)
    if os.environ["SCORER"] == "hangs" and answer.startswith(tuple("abcdefgh")):
        time.sleep(1000)
    if os.environ["SCORER"] == "nan":
        return float("nan")
    if "raises" in os.environ["SCORER"]:
        raise KeyError("broken")
    return score(self, answer, entry)


if __name__ == "__main__":
    SpellBackwardDataset.score_answer = broken
    main(int(sys.argv[1]), float(sys.argv[2]))
