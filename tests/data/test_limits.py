"""Chat templates without an end, and tokenizers that cannot be read: one message, soon."""

import functools
import json
import resource
import signal
import subprocess
import sys
import time

import pytest
from transformers import PreTrainedTokenizerFast

from gspo_megatron.data import chat
from gspo_megatron.data.chat import question_tokens
from gspo_megatron.data.limits import limited
from gspo_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from gspo_megatron.errors import ConfigError, RolloutError
from tools.validation.launching import ROOT

LOOPS = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}"
ENDS = "{% endfor %}" * 3
DOUBLING = "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
TEMPLATES = {
    "endless loops": (LOOPS + ENDS, "TimeoutError"),
    "endless loops that keep": ("{% set n = namespace(x=[]) %}" + LOOPS + "{% set n.x = [n.x, a] %}" + ENDS, "Error"),
    "a text of terabytes": ("{{ 'x' * 10 ** 13 }}", "(Memory|Timeout)Error"),
    "doubled sixty times": (DOUBLING, "(Memory|Timeout)Error"),
    "a power of a power": ("{{ 10 ** (10 ** 9) }}", "Error"),
    "nested": ("{% if x %}" * 100_000, "Error"),
    "a large text": ("{{ 'x' * (2 * 10 ** 7) }}", "makes it write 20000000 characters"),
    "itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
}


def small() -> PreTrainedTokenizerFast:
    return train_tokenizer(["a question", "an answer"], 300)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return small()


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_without_an_end(name):
    """In a process of its own: the limit on memory holds for all threads of a process, those of a test runner too."""
    call = f"from tests.data.test_limits import render; render({name!r})"
    done = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]


def render(name: str) -> None:
    """Within its seconds (3 outside of tests) and a gigabyte; the limits are gone afterwards."""
    template, said = TEMPLATES[name]
    tokenizer = small()
    tokenizer.chat_template = template
    chat.limited = functools.partial(limited, seconds=1.5)
    before, hearer = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    kept, began = signal.setitimer(signal.ITIMER_REAL, 100.0), time.monotonic()
    with pytest.raises(RolloutError, match=f"chat_template: a conversation of user .*{said}") as caught:
        question_tokens(tokenizer, "why?")
    took, (left, _) = time.monotonic() - began, signal.setitimer(signal.ITIMER_REAL, *kept)
    assert took < 8 and len(str(caught.value)) < 600
    assert resource.getrlimit(resource.RLIMIT_AS) == before and signal.getsignal(signal.SIGALRM) is hearer
    assert abs(left + took - 100.0) < 0.5  # a timer that ran before goes on


def test_the_usual_one_is_not_disturbed(tokenizer):
    assert tokenizer.decode(question_tokens(tokenizer, "why?")) == "<|user|>why?<|assistant|>"
    with limited(0.05):
        pass
    time.sleep(0.1)


def test_a_tokenizer_that_cannot_be_read(tokenizer, tmp_path):
    """Damaged, nested without end, and one of the folder's own code, which is not run (and not asked for)."""
    for name, content in (
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}})),
    ):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        tokenizer.save_pretrained(folder)
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'harmed')!r}, 'w')\nclass Evil: ...\n")
        (folder / "config.json").write_text("{}")
        (folder / name).write_text(content)
        if "auto_map" in content:
            (folder / "tokenizer.json").unlink()
        with pytest.raises(ConfigError, match="tokenizer of .*: cannot be read"):
            load_tokenizer(folder)
    assert not (tmp_path / "harmed").exists()
