"""Episodes: responses to which an environment answers, turn by turn, until it or a limit ends them.

The first responses come from `Generator.generate` like any others. Then, turn after turn, the first rank of a replica
hands each new response to its environment (tasks/environments.py), what it says is put behind the tokens as the chat
template writes it (data/turns.py), and the sampler goes on from there. rollout.max_response_length holds for all tokens
behind the prompt together. The model's tokens are trained, the environment's are not (loss_mask 0). A further turn is a
request whose seed comes from the response's and from how many tokens there are (random_numbers.py), so an episode
depends on nothing of the layout.

Left out: going on with the key/value cache of the turn before (each turn computes its prompt anew), and episodes that
wait for nobody: all go from turn to turn together.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from gspo_megatron.backend.parallel.collective_errors import together
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.batch import Completion, Message, Outcome, Prompt, RolloutGroup, Turns
from gspo_megatron.data.chat import question_tokens
from gspo_megatron.data.turns import between
from gspo_megatron.errors import RolloutError
from gspo_megatron.process import progress
from gspo_megatron.rollout import random_numbers
from gspo_megatron.rollout.first_rank import on_first_rank
from gspo_megatron.rollout.sampler import Sampler, SampleRequest
from gspo_megatron.rollout.sampling import SamplingParams
from gspo_megatron.tasks.environments import EnvironmentRunner, Environments, Observed

Body = TypeVar("Body")
FILLER = SampleRequest([0], (0,), 1)  # where other replicas have more episodes


@dataclass
class Episode:
    """One response with all its turns."""

    number: int  # of the response in this replica's share
    prompt: Prompt
    seed: int = 0  # of the response; its first turn was sampled with it
    max_tokens: int = 0  # behind the prompt
    tokens: list[int] = field(default_factory=list)  # behind the prompt
    logprobs: list[float] = field(default_factory=list)  # 0 at the environment's tokens
    mask: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # the place in `tokens` of each turn of the model
    rewards: list[float | None] = field(default_factory=list)  # that step() gave, one a turn that it has heard
    last: Completion | None = None  # of the newest turn
    versions: tuple[int, ...] = ()  # of the weights that sampled the turns, in their order
    is_over: bool = False
    is_cut: bool = False  # by the limit of tokens
    error: str | None = None
    gained: float | None = None  # get_reward()

    def add(self, completion: Completion, text: str) -> None:
        """Put a turn of the model behind the others."""
        count = len(completion.token_ids)
        self.starts.append(len(self.tokens))
        self.tokens += completion.token_ids
        self.logprobs += completion.logprobs or [0.0] * count
        self.mask += [1] * count
        self.messages.append({"role": "assistant", "content": text})
        self.last, self.is_cut = completion, completion.truncated
        self.versions += tuple(version for version in completion.versions if version not in self.versions)
        self.is_over |= completion.truncated

    def hear(self, observed: Observed, most_turns: int) -> None:
        """Take what the environment answered to the newest turn."""
        self.rewards.append(observed.reward)
        self.error = self.error or observed.error
        self.is_over |= observed.done or observed.error is not None or self.turns >= most_turns

    def go_on(self, messages: Iterable[Message], tokens: list[int]) -> None:
        """Put the environment's words behind the tokens, if a token of a response fits behind them."""
        if len(self.tokens) + len(tokens) >= self.max_tokens:
            self.is_over = self.is_cut = True
            return
        self.messages += messages
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens)
        self.mask += [0] * len(tokens)

    @property
    def turns(self) -> int:
        """Return how many the model has had."""
        return len(self.starts)

    @property
    def completion(self) -> Completion:
        """Return the whole of it."""
        given = [reward for reward in (*self.rewards, self.gained) if reward is not None]
        outcome = Outcome(self.turns, tuple(self.messages), sum(given) if given else None, self.error)
        of_turns = [reward or 0.0 for reward in self.rewards] + [0.0] * (self.turns - len(self.rewards))
        mask = None if all(self.mask) else self.mask
        routes = self.last.routes if self.last else None
        turns = Turns(tuple(self.starts), tuple(of_turns))
        return Completion(self.tokens, self.logprobs, self.is_cut, routes, mask, outcome, self.versions, turns)

    @property
    def request(self) -> SampleRequest:
        """Return the request for its next turn."""
        seed = random_numbers.turn_seed(self.seed, len(self.tokens))
        return SampleRequest(self.prompt.token_ids + self.tokens, (seed,), self.max_tokens - len(self.tokens))


class Stage:
    """Where the episodes of a step play: this replica's share of them, and what all replicas need of each other.

    `text_of`: returns a turn's tokens as its environment sees them.
    """

    def __init__(
        self,
        sampler: Sampler,
        topology: Topology,
        device: torch.device,
        environments: Environments,
        tokenizer: PreTrainedTokenizerBase,
        text_of: Callable[[list[int]], str],
    ):
        self.sampler, self.topology, self.device = sampler, topology, device
        self.runners, self.max_prompt = environments.runners, environments.max_prompt_length
        self.tokenizer, self.text_of = tokenizer, text_of

    def opened(self, prompts: list[Prompt], group_size: int) -> tuple[list[Prompt], list[Episode]]:
        """Begin an episode for each response to a prompt of a task that has an environment. A collective.

        Returns:
            The prompts, with what reset() said behind their last message.

        Raises:
            RolloutError: reset() said different things to responses of one group, or too much. On every rank.
        """
        numbered = enumerate(prompt for prompt in prompts for _ in range(group_size))
        rows = {number: prompt for number, prompt in numbered if prompt.item.task in self.runners}
        entries = {number: prompt.item.entry for number, prompt in rows.items()}
        said = self._ask(entries, rows, EnvironmentRunner.open)
        every = range(len(prompts) * group_size)
        heard = [[said[n] for n in every[row : row + group_size] if n in said] for row in every[::group_size]]
        with together():
            prompts = [self._with_words(prompt, words) for prompt, words in zip(prompts, heard, strict=True)]
        return prompts, [Episode(number, prompts[number // group_size], error=said[number].error) for number in rows]

    def play(
        self,
        groups: list[RolloutGroup],
        episodes: list[Episode],
        requests: list[SampleRequest],
        params: SamplingParams,
    ) -> None:
        """Go on from first responses until all episodes are over, ask for their rewards, and put them in the places of
        the first responses. A collective over all ranks.

        Args:
            groups: of this replica, with the first responses.
            requests: that they answer, one a group.

        Raises:
            RolloutError: the chat template refuses what an environment says. On every rank.
        """
        places = {one.number: divmod(one.number, len(groups[0].completions)) for one in episodes}
        for one in episodes:
            row, index = places[one.number]
            one.seed, one.max_tokens = requests[row].seeds[index], requests[row].max_tokens
            one.add(groups[row].completions[index], groups[row].texts[index])
        heard = [one for one in episodes if one.error is None]
        while self._most(len(heard)):
            texts = {one.number: one.messages[-1]["content"] for one in heard}
            answers = self._ask(texts, _prompts(heard), EnvironmentRunner.turn)
            for one in heard:
                one.hear(answers[one.number], self.runners[one.prompt.item.task].config.max_turns)
            with together():
                for one in [one for one in heard if not one.is_over]:
                    messages, options = answers[one.number].messages, one.prompt.item.template_kwargs
                    words = between(self.tokenizer, one.tokens[-1], messages, options)
                    one.go_on(messages, words)
            heard = [one for one in heard if not one.is_over]
            if self._most(len(heard)):
                self._sample(heard, params)
        self._reward([one for one in episodes if one.error is None])
        for one in episodes:
            row, index = places[one.number]
            groups[row].completions[index] = one.completion
            groups[row].texts[index] = cast(str, self.tokenizer.decode(one.tokens, skip_special_tokens=True))

    def _sample(self, episodes: list[Episode], params: SamplingParams) -> None:
        """One more turn of each. Every replica gives as many requests."""
        requests = [one.request for one in episodes]
        requests += [FILLER] * (self._most(len(episodes)) - len(episodes))
        progress.detail(f"turn {1 + max((one.turns for one in episodes), default=0)}")
        for one, (completion,) in zip(episodes, self.sampler.sample(requests, params), strict=False):
            one.add(completion, self.text_of(completion.token_ids))

    def _reward(self, episodes: list[Episode]) -> None:
        numbers = dict.fromkeys(one.number for one in episodes)
        found = self._ask(numbers, _prompts(episodes), EnvironmentRunner.rewards)
        for one in episodes:
            one.gained, one.error = found[one.number].reward, found[one.number].error

    def _ask(
        self,
        bodies: dict[int, Body],
        prompts: dict[int, Prompt],
        ask: Callable[[EnvironmentRunner, dict[int, Body], Callable[[], None]], dict[int, Observed]],
    ) -> dict[int, Observed]:
        """What the environments answer, by episode, on every rank of the replica. A collective over all ranks."""

        def work(keep: Callable[[], None]) -> dict[int, Observed]:
            found: dict[int, Observed] = {}
            for name, runner in self.runners.items():
                part = {number: body for number, body in bodies.items() if prompts[number].item.task == name}
                found |= ask(runner, part, keep) if part else {}
            return found

        return on_first_rank(self.topology, self.device, work)

    def _with_words(self, prompt: Prompt, said: list[Observed]) -> Prompt:
        """What reset() said to the responses of a group is part of the prompt that they have in common."""
        words = {one.observation or "" for one in said if one.error is None}
        if words <= {""}:
            return prompt
        where = f"prompt {prompt.uid} ({prompt.item.task})"
        if len(words) > 1:
            raise RolloutError(
                f"{where}: reset() said different things to responses that are compared, {sorted(words)[:2]}. Let it "
                "depend on the columns alone, for example by a seed from them."
            )
        *earlier, asked = prompt.item.conversation
        messages = [*earlier, asked | {"content": asked["content"] + words.pop()}]
        token_ids = question_tokens(self.tokenizer, messages, prompt.item.template_kwargs)
        if len(token_ids) > self.max_prompt:
            raise RolloutError(
                f"data.max_prompt_length = {self.max_prompt}: {where} has {len(token_ids)} tokens with what reset() "
                f"says. Give at least {len(token_ids)}, or let it say less."
            )
        return replace(prompt, item=replace(prompt.item, messages=tuple(messages)), token_ids=token_ids)

    def _most(self, number: int) -> int:
        """Return the most over replicas."""
        most = torch.tensor([number], device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)


def _prompts(episodes: list[Episode]) -> dict[int, Prompt]:
    return {one.number: one.prompt for one in episodes}
