"""The record of one group of rollouts, as a line of a file: what an engine outside of this process delivers, and what
`rollout.save` writes.

A record is read strictly: every field has one meaning and one type, a field of another name is refused, and numbers
come back to the bit (JSON has floats as Python's repr writes them). Whether a record fits the recipe that reads it is
record_limits.py. Left out: the experts that the rollout chose (`routes` has their place in the record, nothing more).
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from gspo_megatron.batch import Completion, FinishReason, Message, Prompt, RolloutGroup, Score, TaskItem, Turns
from gspo_megatron.recipe.rollout_files import GROUP_FIELDS
from gspo_megatron.rollout.record_fields import Fields
from gspo_megatron.tasks.data_files import BadRow
from gspo_megatron.tasks.rows import prompt_of

REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Sampling:
    """How the responses of a group were sampled."""

    temperature: float
    top_k: int  # 0: all
    top_p: float
    max_response_length: int

    @classmethod
    def read(cls, value: Any) -> "Sampling":
        """Return the sampling that a JSON object says. Raises BadRow."""
        fields = Fields(value, "sampling", tuple(one.name for one in dataclasses.fields(cls)))
        return cls(
            temperature=fields.number("temperature"),
            top_k=fields.integer("top_k"),
            top_p=fields.number("top_p"),
            max_response_length=fields.integer("max_response_length"),
        )


@dataclass(frozen=True)
class ResponseRecord:
    """One response, and what is known of it. None: not known, or for all tokens the same."""

    token_ids: list[int]
    finish_reason: FinishReason  # length: cut at max_response_length
    logprobs: list[float] | None = None  # one a token, as Completion has them
    loss_mask: list[int] | None = None  # 0 or 1 a token
    reward: float | None = None  # None: the task scores it, unless `error` says that it has none
    parts: dict[str, float] = field(default_factory=dict)  # of the reward, by names of functions
    error: str | None = None  # what went wrong when it was scored
    versions: list[int] | None = None  # of the weights that wrote it, in their order; None: the group's
    turns: Turns | None = None  # of an episode

    @property
    def is_scored(self) -> bool:
        """Tell whether nothing is left for the task's scorer to do."""
        return self.reward is not None or self.error is not None

    @classmethod
    def read(cls, value: Any, where: str) -> "ResponseRecord":
        """Return the response that a JSON object says.

        Args:
            where: its place in the group, for messages.

        Raises:
            BadRow: it is none.
        """
        fields = Fields(value, where, ("token_ids", "finish_reason"), RESPONSE_FIELDS)
        token_ids = fields.token_ids("token_ids")
        return cls(
            token_ids=token_ids,
            finish_reason=_reason(fields.text("finish_reason"), where),
            logprobs=fields.logprobs("logprobs", len(token_ids)),
            loss_mask=fields.mask("loss_mask", len(token_ids)),
            reward=fields.number_or_none("reward"),
            parts=fields.numbers("parts"),
            error=fields.text_or_none("error"),
            versions=fields.integers_or_none("versions"),
            turns=_turns(fields.value("turns"), where, len(token_ids)),
        )


RESPONSE_FIELDS = tuple(one.name for one in dataclasses.fields(ResponseRecord))


@dataclass(frozen=True)
class GroupRecord:
    """The responses to one prompt, and all that is needed to score them and to train on them."""

    uid: int  # minibatches are dealt by it; unique in the files of a run
    task: str  # key of the recipe's `tasks`
    prompt: str | list[Message]  # what was asked, for scorers and for people
    prompt_ids: list[int]  # what the model saw
    version: int  # RL steps that the weights had taken which sampled it, the oldest ones where there were several
    tokenizer: str  # data/tokenizer.py: vocabulary_hash
    sampling: Sampling
    responses: list[ResponseRecord]
    answer: str | None = None  # gold; None: there is none
    columns: dict[str, Any] = field(default_factory=dict)  # of the row, for scorers
    routes: dict[str, str] | None = None  # file and key; not read yet

    @classmethod
    def read(cls, columns: dict[str, Any]) -> "GroupRecord":
        """Return the group that a row of a file says.

        Raises:
            BadRow: with the field and what is wrong with it.
        """
        fields = Fields(columns, "", GROUP_FIELDS, tuple(one.name for one in dataclasses.fields(cls)))
        question, messages = prompt_of(fields.value("prompt"), "prompt")
        group = cls(
            uid=fields.integer("uid"),
            task=fields.text("task"),
            prompt=list(messages) or question,
            prompt_ids=fields.token_ids("prompt_ids"),
            version=fields.integer("version"),
            tokenizer=fields.text("tokenizer"),
            sampling=Sampling.read(fields.value("sampling")),
            responses=_responses(fields.value("responses")),
            answer=fields.text_or_none("answer"),
            columns=fields.table("columns"),
            routes=_routes(fields.value("routes")),
        )
        scored = [one.is_scored for one in group.responses]
        if any(scored) and not all(scored):
            number = scored.index(False)
            raise BadRow(
                f"responses[{number}] has no reward, and others of its group have one",
                "Give all rewards of a group, or none and the task scores them.",
            )
        return group

    def line(self) -> bytes:
        """Return the record as a line of JSON."""
        plain = vars(self) | {
            "sampling": vars(self.sampling),
            "responses": [vars(one) | {"turns": one.turns and vars(one.turns)} for one in self.responses],
            "columns": json_value(self.columns),
        }
        text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
        # Half of a surrogate pair, which a byte-level tokenizer may leave in a text, becomes JSON's own escape.
        return text.encode("utf-8", errors="backslashreplace") + b"\n"

    def group(self, texts: Sequence[str]) -> RolloutGroup:
        """Return what training takes; its scores are empty where the task's scorer has to give them.

        Args:
            texts: the responses in words.
        """
        question, messages = prompt_of(self.prompt, "prompt")
        item = TaskItem(self.task, question, self.answer or "", self.columns, self.answer is not None, messages)
        answers = [
            Completion(
                one.token_ids,
                one.logprobs,
                one.finish_reason == "length",
                loss_mask=one.loss_mask,
                versions=tuple(one.versions or [self.version]),
                turns=one.turns,
            )
            for one in self.responses
        ]
        is_scored = self.responses[0].is_scored
        scores = [Score(one.reward, one.parts, one.error) for one in self.responses] if is_scored else []
        return RolloutGroup(Prompt(self.uid, item, self.prompt_ids), answers, scores, list(texts))


def record_of(group: RolloutGroup, tokenizer: str, sampling: Sampling) -> GroupRecord:
    """Return the record of a scored group, whose completions have `versions`.

    Args:
        tokenizer, sampling: as in GroupRecord.
    """
    item = group.prompt.item
    version = min(version for one in group.completions for version in one.versions)
    return GroupRecord(
        uid=group.prompt.uid,
        task=item.task,
        prompt=list(item.messages) or item.question,
        prompt_ids=group.prompt.token_ids,
        version=version,
        tokenizer=tokenizer,
        sampling=sampling,
        responses=[
            ResponseRecord(
                token_ids=one.token_ids,
                finish_reason=one.finish_reason,
                logprobs=one.logprobs,
                loss_mask=one.loss_mask,
                reward=score.reward,
                parts=score.parts,
                error=score.error,
                versions=None if one.versions == (version,) else list(one.versions),
                turns=one.turns,
            )
            for one, score in zip(group.completions, group.scores, strict=True)
        ],
        answer=item.answer if item.has_answer else None,
        columns=item.entry,
    )


def json_value(value: Any) -> Any:
    """Return a task's own record in JSON's types: what JSON has no word for becomes text, and a NaN null."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, dict):
        return {str(name): json_value(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_value(inner) for inner in value]
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _responses(value: Any) -> list[ResponseRecord]:
    if not isinstance(value, list) or not value:
        raise BadRow("responses must be a list with one response or more", "Leave the group out, or give them.")
    return [ResponseRecord.read(one, f"responses[{number}]") for number, one in enumerate(value)]


def _reason(text: str, where: str) -> FinishReason:
    if text not in REASONS:
        raise BadRow(f"{where}.finish_reason = {text!r} must be stop or length", "Give length where the limit cut it.")
    return REASONS[text]


def _turns(value: Any, where: str, length: int) -> Turns | None:
    if value is None:
        return None
    fields = Fields(value, f"{where}.turns", ("starts", "rewards"))
    turns = Turns(tuple(fields.integers("starts")), tuple(fields.finite_numbers("rewards")))
    if fault := turns.fault(length):
        raise BadRow(
            f"{where}.turns: {fault}", "Give each turn of the model the place of its first token, and its reward."
        )
    return turns


def _routes(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    fields = Fields(value, "routes", ("file", "key"))
    return {name: fields.text(name) for name in ("file", "key")}
