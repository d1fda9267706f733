"""A tiny Llama and a byte-level tokenizer for the tests of models of transformers."""

from pathlib import Path
from typing import Any

import torch

SIZES = {"vocab_size": 290, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def tiny_tokenizer(lowercases: bool = False, **specials: str) -> Any:
    """A tokenizer of 256 bytes, a few merges and <|endoftext|>, whose special tokens are `specials`."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if lowercases:
        tokenizer.normalizer = normalizers.Lowercase()
    about = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=SIZES["vocab_size"], show_progress=False, **about)
    tokenizer.train_from_iterator(["the fox jumps over the lazy dog "], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def tiny_llama(kind: str = "Llama", **more: Any) -> torch.nn.Module:
    """A model with random weights, the same at every call; `kind` names a family of Llama's settings."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | HEADS | more)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def saved(folder: Path) -> Path:
    """The folder, with a tiny model and its tokenizer in it."""
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
    tiny_tokenizer(eos_token="<|endoftext|>").save_pretrained(folder)
    return folder
