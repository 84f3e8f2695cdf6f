"""What stands between two responses of an episode: tokens that the chat template writes, and the environment's text.

Tokens are never encoded again: the next prompt is the tokens so far, the sampled ones as they were sampled, and behind
them the encoding of what the template writes after an assistant's message, up to where the next response begins. So the
log-probs that are trained are of the very tokens that were sampled. A template that writes earlier turns otherwise than
the model did would, where it is used, show the model another history than it was trained on; it is refused, unless the
recipe says so (tasks.*.rewritten_history).

Left out: forks of an episode into several training sequences where a template rewrites.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from gspo_megatron.batch import Message
from gspo_megatron.config import TrainConfig
from gspo_megatron.config.constraints import require
from gspo_megatron.data.chat import ANSWER, PROBE, encode, example_tokens, render
from gspo_megatron.errors import RolloutError
from gspo_megatron.tasks.mixture import TaskMixture
from gspo_megatron.tasks.tool_calls import calls_in

OBSERVATION = "gspoobservation"
THOUGHT = f"<think>\ngspothought\n</think>\n\n{ANSWER}"


def between(
    tokenizer: PreTrainedTokenizerBase, last: int, observed: Sequence[Message], options: dict[str, Any]
) -> list[int]:
    """Return the tokens between a response and the next one.

    Args:
        last: token of the response; where the template writes it as the end of a turn, it is there already.
        observed: what the environment says.
        options: further arguments of the template.

    Raises:
        RolloutError: the template refuses such messages.
    """
    written = _behind_answer(tokenizer, observed, options)
    tokens = encode(tokenizer, written)
    if last in tokens:
        end = tokens.index(last)
        if not str(tokenizer.decode(tokens[:end])).strip():  # nothing but white space before it
            return tokens[end + 1 :]
    return tokens


def episode_tokens(
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: tuple[int, ...],
    question: Sequence[Message],
    episode: Sequence[Message],
    where: str,
    options: dict[str, Any],
) -> tuple[list[int], list[int], list[int]]:
    """Return token ids of a question up to where the response begins, of a whole gold episode behind it, and its mask:
    1 at what the model is to write, 0 at what stands between. They are the tokens that a rollout of it would have,
    where reset() of its environment says nothing.

    Args:
        stop_token_ids, where, options: as in data/chat.example_tokens, which says what each turn is.
        episode: messages of the assistant, first and last, and others between them.

    Raises:
        ConfigError, RolloutError: as example_tokens.
    """
    prompt: list[int] = []
    tokens: list[int] = []
    mask: list[int] = []
    history, observed = list(question), list[Message]()
    for message in episode:
        if message["role"] != "assistant":
            observed.append(message)
            continue
        words = between(tokenizer, tokens[-1], observed, options) if observed else []
        history += observed
        begin, turn = example_tokens(tokenizer, stop_token_ids, history, message["content"], where, options)
        prompt = prompt or begin
        tokens += words + turn
        mask += [0] * len(words) + [1] * len(turn)
        history.append(message)
        observed = []
    return prompt, tokens, mask


def check_histories(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, mixture: TaskMixture) -> None:
    """Refuse a template with which episodes of some task cannot be held. Raises ConfigError."""
    for name, task in config.tasks.items():
        if task.environment is None:
            continue
        schemas, options = mixture.schemas.get(name, ()), mixture.template_kwargs(name)
        if schemas:
            check_tools(tokenizer, name, [str(schema["function"]["name"]) for schema in schemas], options)
        role = "tool" if schemas else "user"
        check_history(tokenizer, name, role, options, task.rewritten_history == "keep")


def check_tools(tokenizer: PreTrainedTokenizerBase, task: str, names: Sequence[str], options: dict[str, Any]) -> None:
    """Refuse a template that does not tell of the tools, or writes calls otherwise than they are read. Raises
    ConfigError."""
    field = f"tasks.{task}.environment"
    asked = [{"role": "user", "content": PROBE}]
    prompt = render(tokenizer, asked, **options, add_generation_prompt=True)
    untold = [name for name in names if name not in prompt]
    require(not untold, field, untold, "the chat template does not tell the model of these tools",
            "Use a template that writes `tools`.")  # fmt: skip
    call = {"type": "function", "function": {"name": names[0], "arguments": {}}}
    called: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        written = render(tokenizer, [*asked, called], **options).partition(PROBE)[2]
    except RolloutError:  # it knows none; the model learns the form from the prompt
        return
    is_read = names[0] not in written or any(call.name == names[0] for call in calls_in(written))
    form = '<tool_call>{"name": ..., "arguments": {...}}</tool_call>'
    require(is_read, field, written[:200], "the chat template writes calls in another form than is read here",
            f"Use a template that writes {form}, as Qwen's and Hermes' do.")  # fmt: skip


def check_history(
    tokenizer: PreTrainedTokenizerBase, task: str, role: str, options: dict[str, Any], may_rewrite: bool
) -> None:
    """Render episodes of three turns, and refuse a template that cannot write them, or rewrites earlier turns.

    Args:
        task: key of the recipe's table, for the message.
        role: of what the environment says.
        may_rewrite: the recipe takes that (tasks.*.rewritten_history keep).

    Raises:
        ConfigError: it is refused.
    """
    field = f"tasks.{task}.environment"
    said = [{"role": role, "name": "tool", "content": OBSERVATION}]
    try:
        written = _behind_answer(tokenizer, said, options)
    except RolloutError as error:
        require(False, field, role, f"the chat template cannot write such a message ({error})",
                "Use a template that knows the role.")  # fmt: skip
    require(OBSERVATION in written, field, role, "the chat template does not write what such a message says",
            "Use a template that does.")  # fmt: skip
    for answer in () if may_rewrite else (ANSWER, THOUGHT):
        changed = _rewritten(tokenizer, answer, role, options)
        require(
            changed is None,
            f"tasks.{task}.rewritten_history",
            "error",
            f"the chat template writes an earlier turn {answer!r} as {changed!r}, so the model would see another "
            "history than the one that it wrote",
            "Use a template that keeps it, or give keep: episodes go on from the tokens as they were sampled.",
        )


def _behind_answer(tokenizer: PreTrainedTokenizerBase, observed: Sequence[Message], options: dict[str, Any]) -> str:
    """What the template writes behind an assistant's message, these messages, and the beginning of the next."""
    turns = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": ANSWER}, *observed]
    whole = render(tokenizer, turns, **options, add_generation_prompt=True)
    return whole.partition(PROBE)[2].partition(ANSWER)[2]


def _rewritten(tokenizer: PreTrainedTokenizerBase, answer: str, role: str, options: dict[str, Any]) -> str | None:
    """What stands in place of an answer once two turns have followed it; None where it stands as it was, white space
    around it aside (GLM begins an answer with a line break)."""
    observed = {"role": role, "name": "tool", "content": OBSERVATION}
    turns = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": answer}]
    history = render(tokenizer, turns[:1], **options, add_generation_prompt=True)
    behind = render(tokenizer, turns, **options).removeprefix(history)
    said = behind[: behind.find(answer) + len(answer)]
    if said.strip() != answer:
        return behind[: len(answer)]
    for _ in range(2):
        turns.append(observed)
        whole, begins = render(tokenizer, turns, **options, add_generation_prompt=True), len(history)
        if not whole.startswith(history + said):
            return whole[begins : begins + len(said)]
        history = whole
        turns.append({"role": "assistant", "content": answer})
    return None
