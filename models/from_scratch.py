"""Small language models without any pretraining, for environments whose texts are few: made in a second, trained on a CPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models.causal_lm import ModelError, quiet

END = "<|end|>"
# Only letters grow together, so that a board keeps one token a cell and a number one a digit.
_PIECES = Regex(r" ?[A-Za-z]+|[\s\S]")


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a Llama: width of its states, layers, attention heads, tokens known, longest sequence."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    vocabulary: int = 512
    positions: int = 2048


def make_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Sennrich et al., arXiv 1508.07909) whose merges stay within words; any text round-trips.

    Args:
        texts: what it is to be short on.
        vocabulary: tokens at most; at least 257, for there are 256 bytes.

    Raises:
        ModelError: too small a vocabulary.
    """
    if vocabulary < 257:
        raise ModelError(f"A byte-level vocabulary needs at least 257 tokens, not {vocabulary}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=1 << 20,
    )


def make_policy(folder: Path, texts: Iterable[str], shape: Shape, seed: int) -> Path:
    """Write a random Llama (float32, tied embeddings) with a tokenizer for `texts` in the clean form; return `folder`.

    The same arguments give the same bytes.

    Raises:
        ModelError: the shape cannot be.
    """
    if shape.hidden % (2 * shape.heads):
        raise ModelError(
            f"A width of {shape.hidden} cannot be split into {shape.heads} heads of even width; choose a multiple of "
            f"{2 * shape.heads}."
        )
    tokenizer = make_tokenizer(texts, shape.vocabulary)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()  # type: ignore[no-untyped-call]
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder
