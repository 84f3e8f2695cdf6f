"""This makes a small tokenizer for the tasks at hand: boilerplate is cheap, everything else is spelled.

A model that starts from random weights cannot spell, count digits or sort if "nus" is one token here and two there.
So the vocabulary has the 256 bytes, and no token that joins parts of an answer; but task prompts repeat long
sentences, and spelled out these would be most of the sequence. `train_tokenizer` therefore finds the wording that
comes back unchanged around the variable parts and gives each such segment one token:

1. A text is cut into pieces: a run of letters, a run of digits, or one other character.
2. A piece is FIXED if its context tells it: the 6 pieces before it (5, 4, 3 where those were hardly seen) are followed
   by it in at least 90 % of all their occurrences in different texts, or the 6 after it are preceded by it so. Where
   questions of one task differ, neither holds. For a number, its sign and a single letter both sides must hold.
3. A run of fixed pieces with 8 or more characters, in at least 0.25 % of the texts, becomes a token. So does, from 1 %
   on, a word of 4 or more letters that is one of few in its place ("ascending" or "descending"), but only as a whole
   word, and a separator between two words or numbers (", " or " + "), which holds no letter, digit or sign.

Digits of a variable number are thus always single tokens; only a number that never varies can be part of a segment.
Left out: merges as in ordinary BPE. The file is a byte-level BPE model with an empty merge table, segments being
split off before it, so any Hugging Face reader gives the same ids. Not for natural text: use a pretrained one there.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gspo_megatron.batch import TaskItem
from gspo_megatron.config import TrainConfig
from gspo_megatron.config.constraints import require
from gspo_megatron.errors import ConfigError
from gspo_megatron.tasks.mixture import TaskMixture

EXAMPLES_PER_TASK = 400
# The padding token has id 0 because packed batches are padded with 0.
PAD, END_OF_TEXT, USER, ASSISTANT = SPECIAL_TOKENS = ("<|pad|>", "<|endoftext|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool['function']['name'] }} {% endfor %}"
    "{% for message in messages %}"
    "{% if message['role'] in ('user', 'tool') %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|endoftext|>"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}"
    "{% else %}{{ raise_exception('this chat template knows the roles system, user, tool and assistant only') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

PIECE = re.compile(r"[^\W\d_]+|\d+|\W|_")
# Brackets are missing on purpose: in tasks about nesting they are the content.
SEPARATOR = re.compile(r"(?<=\w)[\s,;:=+*/|'\"-]{2,}(?=\w)")
CONTEXT_LENGTHS = (6, 5, 4, 3)  # pieces; the longer ones tell apart the tasks that share a phrase
FIXED = 0.9
CHOICE = 0.2
MIN_SHARE, MIN_SEEN = 0.0025, 8  # of the texts, and at least so many
MIN_CHOICE_SHARE = 0.01
MIN_SEGMENT = 8  # characters; shorter phrases (" of the ") also occur in texts that are to be spelled
MIN_CHOICE = 4

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
START, STOP = "<start>", "<stop>"  # never equal to a piece, which is all letters or one character


def build_tokenizer(config: TrainConfig, mixture: TaskMixture) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the folder to start from; else train one on warm-start questions and answers, in every
    rank alike: that is cheaper than to wait for one."""
    if config.model.load_hf is not None:
        return load_tokenizer(config.model.load_hf)
    count = EXAMPLES_PER_TASK * len(mixture.names)
    has_answers = all(task.size("warm_start") != 0 for task in mixture.tasks.values())
    items = [mixture.item("warm_start" if has_answers else "train", index) for index in range(count)]
    return train_tokenizer([text for item in items for text in _texts(item)], config.data.vocab_size)


def _texts(item: TaskItem) -> list[str]:
    """What of a question and its gold answer is written apart from the rest."""
    said = [message["content"] for message in item.episode] or [item.answer]
    return [item.question, *dict.fromkeys(said)]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token for each phrase that the texts repeat, bytes for the rest.

    `texts`: questions, and answers as texts of their own, of the training split; 250 or more of each task, for with
    less a phrase is not seen often enough to count.
    `vocab_size`: the most entries, at least 260 (256 bytes and 4 special tokens); the phrases that save most tokens
    win. Deterministic in the set of texts. decode(encode(x)) == x for every x. Raises ConfigError for a
    vocab_size below 260.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [*SPECIAL_TOKENS, *alphabet]
    require(
        vocab_size >= len(base),
        "data.vocab_size",
        vocab_size,
        f"must be at least {len(base)}, the 256 bytes and the special tokens",
        "Give 320 or more.",
    )
    patterns = _phrases(sorted(set(texts)), vocab_size - len(base))
    vocab = {token: index for index, token in enumerate(base)}
    for phrase in patterns:
        vocab[BYTES.pre_tokenize_str(phrase)[0][0]] = len(vocab)

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    if patterns:
        alternatives = "|".join(patterns[phrase] for phrase in _longest_first(patterns))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(alternatives), behavior="isolated"), BYTES]
        )
    else:
        tokenizer.pre_tokenizer = BYTES
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END_OF_TEXT,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _phrases(texts: list[str], room: int) -> dict[str, str]:
    """At most `room` phrases, phrase -> its regular expression, the ones that save most tokens first."""
    enough = max(MIN_SEEN, MIN_SHARE * len(texts))
    often = max(MIN_SEEN, MIN_CHOICE_SHARE * len(texts))
    segments, choices = _repeated(texts, enough)
    patterns = {word: rf"\b{word}\b" for word, seen in choices.items() if seen >= often}
    patterns |= {run: _escape(run) for run, seen in segments.items() if seen >= enough and len(run) >= MIN_SEGMENT}
    found = Counter({phrase: (segments[phrase] + choices[phrase]) * (len(phrase) - 1) for phrase in patterns})

    # Separators inside of segments cost nothing, so they are counted in what the segments leave over.
    covered = re.compile("|".join(map(_escape, _longest_first(patterns))) or "$^")
    rest = [part for text in texts for part in covered.split(text)]
    marks = Counter(mark for part in rest for mark in _separators(part))
    for mark, seen in marks.items():
        if seen >= often:
            patterns[mark] = _escape(mark)
            found[mark] = seen * (len(mark) - 1)
    best = sorted(patterns, key=lambda phrase: (-found[phrase], phrase))[:room]
    return {phrase: patterns[phrase] for phrase in best}


def _repeated(texts: list[str], enough: float) -> tuple[Counter, Counter]:
    """Runs of fixed pieces, and words that are one of a few choices, each with the number of texts it is in."""
    cut = [(START, *PIECE.findall(text), STOP) for text in texts]
    counts: Counter = Counter()
    for pieces in cut:
        for length in range(min(CONTEXT_LENGTHS), max(CONTEXT_LENGTHS) + 2):
            counts.update(pieces[i : i + length] for i in range(len(pieces) - length + 1))

    segments: Counter[str] = Counter()
    choices: Counter[str] = Counter()
    for pieces in cut:
        runs: set[str] = set()
        words: set[str] = set()
        run = ""
        for i in range(1, len(pieces)):
            sides = _certainty(counts, pieces, i, enough) if pieces[i] != STOP else [0.0]
            if (min(sides) if _is_short(pieces[i]) else max(sides)) >= FIXED:
                run += pieces[i]
                continue
            runs.add(run)
            run = ""
            if min(sides) >= CHOICE and pieces[i].isalpha() and pieces[i].isascii() and len(pieces[i]) >= MIN_CHOICE:
                words.add(pieces[i])
        segments.update(runs - {""})
        choices.update(words)
    return segments, choices


def _certainty(counts: Counter, pieces: tuple[str, ...], i: int, enough: float) -> list[float]:
    """How surely the context before, and the one after, tells piece i: shares of the occurrences; [0] for unknown."""
    sides = []
    for size in CONTEXT_LENGTHS:
        if i >= size and counts[pieces[i - size : i]] >= enough:
            sides.append(counts[pieces[i - size : i + 1]] / counts[pieces[i - size : i]])
            break
    for size in CONTEXT_LENGTHS:
        after = pieces[i + 1 : i + 1 + size]
        if len(after) == size and counts[after] >= enough:
            sides.append(counts[pieces[i : i + 1 + size]] / counts[after])
            break
    return sides or [0.0]


def _is_short(piece: str) -> bool:
    """A number, its sign or a single letter: variable parts of a question, even where one side happens to tell them."""
    return piece.isdigit() or piece in "+-" or (len(piece) == 1 and piece.isalpha())


def _separators(text: str) -> set[str]:
    """Separators between two words or numbers of a text; a minus right before a digit is the number's sign."""
    marks = set()
    for match in SEPARATOR.finditer(text):
        mark = match.group()
        if text[match.end()].isdigit():
            mark = mark.removesuffix("-")
        if len(mark) >= 2 and re.search(r"\s", mark):
            marks.add(mark)
    return marks


def _longest_first(phrases: Iterable[str]) -> list[str]:
    return sorted(phrases, key=lambda phrase: (-len(phrase), phrase))


def _escape(text: str) -> str:
    """Literal in Python's and in Oniguruma's regular expressions (re.escape also escapes what Oniguruma reads anew)."""
    return re.sub(r"([\\.^$*+?{}\[\]|()])", r"\\\1", text)


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what tells a vocabulary from others: its tokens and their ids, whatever wrote the tokenizer's files."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary, separators=(",", ":")).encode()).hexdigest()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model's folder. Code that the folder may have is not run.

    Raises:
        ConfigError: it cannot be read, or is of a class of the folder's own code.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever transformers and tokenizers say of a damaged file
        raise ConfigError(
            f"tokenizer of {str(folder)!r}: cannot be read ({type(error).__name__}: {error!s:.300}). Put the model's "
            "own files into the folder."
        ) from None


def size_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the rows that an embedding must have: ids may have gaps, so that there are fewer entries."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1
