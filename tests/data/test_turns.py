"""What stands between two turns, as text written out by hand, and which templates are refused."""

from itertools import groupby

import pytest

from gspo_megatron.data.chat import question_tokens
from gspo_megatron.data.turns import between, check_history, check_tools, episode_tokens
from gspo_megatron.errors import ConfigError
from tests.data.templates import CHATML, DEAF, GLM, GPT_OSS, LOUD, PLAIN, QWEN3, STRICT, tokenizer

OBSERVED = [{"role": "user", "content": "No, try again."}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}]
# As Qwen and Hermes write tools and calls, and as some other does.
TOLD = "{% for t in tools %}{{ t.function | tojson }}\n{% endfor %}" + CHATML
CALLING = TOLD.replace(
    "{{ m['content'] }}",
    "{{ m['content'] }}{% for c in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}',
)
OTHERWISE = TOLD.replace("{{ m['content'] }}", "{{ m['content'] }}{% for c in m.tool_calls %}[{{ c.function.name }}()]"
                         "{% endfor %}")  # fmt: skip


def written(template: str, eos: str, last: str, observed=OBSERVED, **options) -> str:
    made = tokenizer(template, eos)
    return made.decode(between(made, made.convert_tokens_to_ids(last), observed, options))


@pytest.mark.parametrize(
    ("template", "last", "text"),
    [
        # The response's own <|im_end|> is not written a second time.
        (CHATML, "<|im_end|>", "\n<|im_start|>user\nNo, try again.<|im_end|>\n<|im_start|>assistant\n"),
        # Ended by another stop token, or by a text: the turn's end is the template's.
        (CHATML, "<|endoftext|>", "<|im_end|>\n<|im_start|>user\nNo, try again.<|im_end|>\n<|im_start|>assistant\n"),
        # GLM ends no turn: the token that begins the next one was sampled.
        (GLM, "<|user|>", "\nNo, try again.<|assistant|>"),
        (PLAIN, "<|endoftext|>", "\nuser: No, try again.\nassistant: "),
        (QWEN3, "<|im_end|>", "\n<|im_start|>user\nNo, try again.<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_what_stands_between_two_turns(template, last, text):
    assert written(template, "<|endoftext|>", last) == text


def test_two_results_of_tools_are_two_messages():
    results = [{"role": "tool", "name": "add", "content": "4"}, {"role": "tool", "name": "add", "content": "7"}]
    assert written(CHATML, "<|im_end|>", "<|im_end|>", results) == (
        "\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_observation_may_hold_the_texts_that_are_looked_for():
    """The place is found in front of what an environment says, whatever that is."""
    said = [{"role": "user", "content": "gspoanswer gspoprobe"}]
    assert written(CHATML, "<|im_end|>", "<|im_end|>", said).startswith("\n<|im_start|>user\ngspoanswer gspoprobe")


EPISODE = (
    {"role": "assistant", "content": "Lyon"},
    *OBSERVED,
    {"role": "assistant", "content": "Nice"},
    {"role": "user", "content": "Once more."},
    {"role": "assistant", "content": "Paris"},
)


@pytest.mark.parametrize(
    ("template", "end", "text"),
    [
        (CHATML, "<|im_end|>", "[Lyon<|im_end|>]\n<|im_start|>user\nNo, try again.<|im_end|>\n<|im_start|>assistant\n"
         "[Nice<|im_end|>]\n<|im_start|>user\nOnce more.<|im_end|>\n<|im_start|>assistant\n[Paris<|im_end|>]"),
        # GLM ends no turn: the token that begins the user's is the last one that the model writes.
        (GLM, "<|user|>", "[\nLyon<|user|>]\nNo, try again.<|assistant|>[\nNice<|user|>]\nOnce more.<|assistant|>"
         "[\nParis<|user|>]"),
    ],
    ids=["chatml", "glm"],
)  # fmt: skip
def test_a_gold_episode_is_the_tokens_that_a_rollout_of_it_has(template, end, text):
    """The model's tokens stand in brackets: they have the mask 1, and each turn's last one is what ends a response."""
    made = tokenizer(template, "<|im_end|>")
    stops, asked = (made.convert_tokens_to_ids(end),), [{"role": "user", "content": "Capital?"}]
    prompt, tokens, mask = episode_tokens(made, stops, asked, EPISODE, "line 1", {})
    assert prompt == question_tokens(made, asked) and len(tokens) == len(mask)
    runs = [
        (bit, [token for token, _ in run]) for bit, run in groupby(zip(tokens, mask, strict=True), lambda one: one[1])
    ]
    written = "".join(f"[{made.decode(ids)}]" if bit else made.decode(ids) for bit, ids in runs)
    assert written == text
    # An episode's next prompt is its tokens so far, and between() of what was observed.
    first = runs[0][1]
    assert runs[1][1] == between(made, first[-1], OBSERVED, {})


@pytest.mark.parametrize("template", [CHATML, GLM, PLAIN])
def test_a_template_that_keeps_what_was_said_is_taken(template):
    check_history(tokenizer(template), "words", "user", {}, may_rewrite=False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        # Its earlier answers lose the think block that its last one has; so does a thought that a model wrote.
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] | trim }}"),
         r"tasks.words.rewritten_history = 'error': the chat template writes an earlier turn '<think>\\ngspothought"),
        (GPT_OSS, "rewritten_history = 'error': .*would see another history than the one that it wrote. Use a template "
         "that keeps it, or give keep"),
    ],
    ids=["thoughts are dropped", "gpt-oss"],
)  # fmt: skip
def test_a_template_that_rewrites_what_was_said_is_refused(template, message):
    with pytest.raises(ConfigError, match=message):
        check_history(tokenizer(template), "words", "user", {}, may_rewrite=False)
    check_history(tokenizer(template), "words", "user", {}, may_rewrite=True)


@pytest.mark.parametrize(
    ("template", "role", "message"),
    [
        (STRICT, "tool", "cannot write such a message .*users only"),
        (DEAF, "tool", "the chat template does not write what such a message says"),
        (LOUD, "user", "the chat template does not write what such a message says"),  # nor any answer as it is
    ],
)
def test_a_template_that_cannot_write_observations_is_refused(template, role, message):
    with pytest.raises(ConfigError, match=f"tasks.words.environment = '{role}': .*{message}"):
        check_history(tokenizer(template), "words", role, {}, may_rewrite=True)


def test_a_template_tells_of_the_tools_and_writes_calls_as_they_are_read():
    options = {"tools": TOOLS}
    check_tools(tokenizer(CALLING), "words", ["add"], options)
    check_tools(tokenizer(TOLD), "words", ["add"], options)  # it writes no calls, and so contradicts none
    with pytest.raises(ConfigError, match=r"= \['add'\]: the chat template does not tell the model of these tools"):
        check_tools(tokenizer(CHATML), "words", ["add"], options)
    with pytest.raises(ConfigError, match=r"add\(\).*writes calls in another form than is read here"):
        check_tools(tokenizer(OTHERWISE), "words", ["add"], options)
