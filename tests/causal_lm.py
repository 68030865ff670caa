"""A small causal language model with a tokenizer of its own, made where a test needs one: real, untrained, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = (
    "you rank passages by how relevant they are to query answer with identifiers only most first the following is "
    "which metal gas animal bird tree planet yes no true false passage document user assistant system"
)
SPECIAL = ["<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "<|begin|>{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(words: str = WORDS, template: str | None = TEMPLATE) -> Any:
    """Byte-level BPE that knows each word and each letter, with and without a space before it; one token a digit.

    The merges are written down, not trained: a trained vocabulary may differ from run to run.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space = "\u0120"  # what a space is in byte-level BPE
    vocabulary = dict.fromkeys([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    merges: dict[tuple[str, str], None] = {}
    letters = [chr(code) for start in "Aa" for code in range(ord(start), ord(start) + 26)]
    for word in [*letters, "[", ">", *words.split()]:
        for start in ("", space):
            left = start or word[0]
            for right in word if start else word[1:]:
                merges[(left, right)] = None
                left += right
                vocabulary.setdefault(left)
    table = {piece: number for number, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=table, merges=list(merges)))
    split = Regex(r" ?[A-Za-z]+|\d| ?[^A-Za-z\d\s]|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[3:],
        model_max_length=2048,
    )
    if template:
        fast.chat_template = template
    return fast


def make_causal_lm(folder: Path, seed: int = 0, *, tokenizer: Any = None, spread: float = 0.2, **settings: Any) -> Path:
    """A Llama of two layers of 64 (about 150,000 parameters) with 2,048 tokens of context, saved in `folder`.

    Args:
        seed: of its random weights.
        tokenizer: `make_tokenizer()` unless given.
        spread: standard deviation of the weights; large enough that logits differ and ties do not decide.
        settings: of LlamaConfig.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer() if tokenizer is None else tokenizer
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 2048,
        "initializer_range": spread,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**values, **settings})).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
