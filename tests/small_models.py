"""Small real models of other architectures than BERT, untrained, over the words w0 ... w29."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

WORDS = [f"w{number}" for number in range(30)]
LONG = " ".join(WORDS * 20)
TEXTS = [
    "Iron is a metal that rusts when it meets water and oxygen.",
    "gold",
    "",
    "Bats are mammals that fly at night and find insects by echo. " * 20,  # longer than the tiny encoder's 64 positions
    "... !!! ,,,",
]
Kind = Literal["roberta", "t5", "gpt2"]


def word_tokenizer(kind: Kind, **settings: Any) -> Any:
    """Words as tokens, framed as the architecture has them: `<s> … </s>` for RoBERTa, `… </s>` for T5, bare for GPT-2.

    It states no longest text, as many published tokenizers do not.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    frames = {"roberta": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"), "t5": ("$A </s>", "$A </s> $B </s>")}
    if kind in frames:
        single, pair = frames[kind]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    names = {"eos_token": "</s>", "unk_token": "<unk>"}
    if kind != "gpt2":
        names |= {"pad_token": "<pad>", "bos_token": "<s>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(names | settings))


def make_model(folder: Path, kind: Kind, head: str = "", **tokenizer: Any) -> Path:
    """A transformers folder: RoBERTa (64 positions in a table of 66), a T5 encoder (no positions), GPT-2 (40).

    Args:
        head: `ForSequenceClassification`, `ForMaskedLM` or none.
        tokenizer: settings of the tokenizer.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    size = {"vocab_size": 35, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "roberta":
        config: Any = transformers.RobertaConfig(
            **size, intermediate_size=64, max_position_embeddings=66, num_labels=1, type_vocab_size=1
        )
        model = getattr(transformers, f"Roberta{head or 'Model'}")(config)
    elif kind == "t5":
        config = transformers.T5Config(
            vocab_size=35,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            num_labels=1,
            pad_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
        model = getattr(transformers, f"T5{head or 'EncoderModel'}")(config)
    else:
        config = transformers.GPT2Config(vocab_size=35, n_positions=40, n_embd=32, n_layer=2, n_head=2, num_labels=1)
        model = getattr(transformers, f"GPT2{head or 'Model'}")(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.3)  # so that texts differ
    model.save_pretrained(folder)
    word_tokenizer(kind, **tokenizer).save_pretrained(folder)
    return folder
