"""Chat templates that behave as those of published models do, over one small tokenizer. Written for the tests."""

from transformers import PreTrainedTokenizerFast

from gspo_megatron.data.tokenizer import train_tokenizer

NEXT = "{% if add_generation_prompt %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    + NEXT
    + "<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (  # the answer of the last turn has a think block, which the prompt does not open
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}" + NEXT + "<|im_start|>assistant\n{% endif %}"
)
# The prompt opens a think block, the answer does not.
THINKING = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
GPT_OSS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|start|>user<|message|>{{ m['content'] }}<|end|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}<|return|>{% endif %}{% endfor %}"
    + NEXT
    + "<|start|>assistant{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}{% if m['role'] == 'user' %}<|user|>\n{{ m['content'] }}"
    "{% else %}<|assistant|>\n{{ m['content'] | trim }}{% endif %}{% endfor %}" + NEXT + "<|assistant|>{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + NEXT + "assistant: {% endif %}"
DEAF = "{% for m in messages if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% endfor %}" + NEXT + "{% endif %}"
DROPPED = (  # writes where an answer ends, and not the answer
    "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}{% else %}<|end|>{% endif %}"
    "{% endfor %}"
)
LOUD = PLAIN.replace("{{ m['content'] }}", "{{ m['content'] | upper if m['role'] == 'assistant' else m['content'] }}")
DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
STRICT = "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('users only') }}{% endif %}{% endfor %}"

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>",
           "[gMASK]", "<sop>", "<|observation|>")  # fmt: skip


def tokenizer(template: str, eos: str = "<|endoftext|>") -> PreTrainedTokenizerFast:
    """Return one of 256 bytes and special tokens."""
    made = train_tokenizer(["a"], 260)
    made.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", *SPECIAL]})
    made.eos_token, made.chat_template = eos, template
    return made
