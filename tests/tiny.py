"""A real Llama that is made in a second: same classes, files and code path as the product's models, only
small.

`make_tiny_model(path)` writes a Hugging Face directory (config.json, model.safetensors, tokenizer.json, ...)
that `AutoModelForCausalLM` and `AutoTokenizer` load offline. The tokenizer is character-level: every
printable ASCII character is one token, so digits are single tokens, "\\n" is one token, and text round-trips
exactly. Ids do not depend on the seed; weights do, and the same seed gives the same bytes. pad = eos =
"<|im_end|>", as in SmolLM2.

`teach(path, lines)` then trains it on a few lines in seconds, so that a test can have a policy that is right
sometimes and wrong sometimes (groups with a signal).
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHARACTERS = "\n" + "".join(c for c in string.printable if c.isprintable())
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token a character; characters outside `characters` become "<|endoftext|>" (the unknown token)."""
    vocabulary = {token: i for i, token in enumerate((*SPECIALS, *dict.fromkeys(characters)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIALS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=SPECIALS[0],
        bos_token=SPECIALS[1],
        eos_token=SPECIALS[2],
        pad_token=SPECIALS[2],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def make_tiny_model(
    path: Path,
    *,
    seed: int = 0,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    characters: str = CHARACTERS,
) -> Path:
    """Write a random Llama (about 0.1 M parameters, tied embeddings, float32) with its tokenizer; returns
    `path`."""
    tokenizer = make_tiny_tokenizer(characters)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.float32)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def teach(
    path: Path, lines: Sequence[str], *, steps: int = 200, learning_rate: float = 3e-3, seed: int = 0
) -> Path:
    """Train the model in `path` on whole `lines` (each 16 of them a step, next-token loss), in place.

    A hidden size of 64 learns a fixed set of short lines in ~5 s of one core; fewer `steps` leave it unsure,
    which is what a reinforcement-learning test wants.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    rows = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = [rows[int(i)] for i in torch.randint(len(rows), (16,), generator=order)]
        width = max(map(len, batch))
        pad = [width - len(row) for row in batch]
        ids = torch.tensor([row + [tokenizer.pad_token_id] * n for row, n in zip(batch, pad, strict=True)])
        mask = torch.tensor([[1] * len(row) + [0] * n for row, n in zip(batch, pad, strict=True)])
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    return path
