"""Builds the starter model: `python -m chat.starter.build [--steps 1600] [--folder
chat/starter/model]`.

The result is committed, so that nobody has to build it; the same seed, machine and library versions
give the same files. It is an ordinary Hugging Face folder: Qwen2 shape, byte-level BPE, chat
template, fp16 safetensors, 2.2 million parameters.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from chat.starter.corpus import conversations, digest, finishing

FOLDER = Path(__file__).parent / "model"
# the first is what Qwen2's tokenizer class adds when it is missing
PADDING, END = "<|endoftext|>", "<|end|>"
SPECIAL_TOKENS = (PADDING, END, "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + "
    "'<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
IGNORED = -100


@dataclass(frozen=True)
class BuildRecipe:
    seed: int = 20240607
    conversations: int = 100_000
    vocabulary: int = 2048
    hidden: int = 192
    layers: int = 4
    heads: int = 4
    feed_forward: int = 512
    context: int = 1024
    steps: int = 1600
    tokens_per_step: int = 4096  # padded
    learning_rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warm_up_steps: int = 30
    constant_until: float = 0.6  # of the steps; from there linearly down to 0
    finishing_conversations: int = 1500
    finishing_steps: int = 200
    finishing_tokens_per_step: int = 1024
    finishing_rate: float = 1e-3  # linearly down to 0
    clip: float = 1.0
    bf16: bool = True  # the body's matrix products; weights and optimizer stay fp32


def train_tokenizer(texts: list[str], size: int, context: int) -> Qwen2Tokenizer:
    """Byte-level BPE in which a Chinese character never joins its neighbours, so that copying a
    value stays easy.

    Every merge lies within the pieces that Qwen2's own splitting makes, hence its tokenizer class
    gives the same tokens.
    """
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.NFC()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"\p{Han}|\p{N}| ?[A-Za-z]+|[^\p{Han}\p{N}A-Za-z]"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    learnt = json.loads(trained.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        unk_token=PADDING,
        pad_token=PADDING,
        eos_token=END,
        extra_special_tokens=list(SPECIAL_TOKENS[2:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        padding_side="left",
    )


def encode(
    tokenizer: Qwen2Tokenizer, corpus: list[list[dict[str, str]]]
) -> list[tuple[list[int], list[bool]]]:
    """Each conversation as (token ids, whether the token belongs to an answer and is learnt)."""
    bodies = iter(
        tokenizer([m["content"] for c in corpus for m in c], add_special_tokens=False)["input_ids"]
    )
    role_ids = {
        role: tokenizer.convert_tokens_to_ids(f"<|{role}|>")
        for role in ("system", "user", "assistant")
    }
    rows = []
    for conversation in corpus:
        ids: list[int] = []
        learnt: list[bool] = []
        for message in conversation:
            body = [*next(bodies), tokenizer.eos_token_id]
            ids += [role_ids[message["role"]], *body]
            learnt += [False] + [message["role"] == "assistant" and "given" not in message] * len(
                body
            )
        rows.append((ids, learnt))
    return rows


def batches(
    rows: list[tuple[list[int], list[bool]]], tokens: int, padding: int, chance: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, labels), both [rows, length], right-padded, of like lengths, about `tokens`
    tokens each.
    """
    while True:
        order = list(range(len(rows)))
        chance.shuffle(order)
        # stable: like lengths stay in random order
        order.sort(key=lambda index: (len(rows[index][0]) + 3) // 4)
        groups: list[list[int]] = [[]]
        for index in order:
            # up to 3 tokens longer ones come before the shorter ones of the same length class
            if groups[-1] and (len(groups[-1]) + 1) * (len(rows[index][0]) + 3) > tokens:
                groups.append([])
            groups[-1].append(index)
        chance.shuffle(groups)
        for group in groups:
            length = max(len(rows[index][0]) for index in group)
            ids = torch.full((len(group), length), padding)
            labels = torch.full((len(group), length), IGNORED)
            for row, index in enumerate(group):
                tokens_of, learnt = map(torch.tensor, rows[index])
                ids[row, : len(tokens_of)] = tokens_of
                labels[row, : len(tokens_of)][learnt] = tokens_of[learnt]
            yield ids, labels


def answer_loss(model: Qwen2ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the learnt tokens. Right padding needs no mask: the causal one hides
    it.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    wanted = labels[:, 1:] != IGNORED
    logits = model.lm_head(hidden[:, :-1][wanted])
    return functional.cross_entropy(logits.float(), labels[:, 1:][wanted])


def learning_rate_factor(step: int, recipe: BuildRecipe) -> float:
    if step < recipe.warm_up_steps:
        return (step + 1) / recipe.warm_up_steps
    constant = recipe.constant_until * recipe.steps
    return 1.0 if step < constant else max(0.0, (recipe.steps - step) / (recipe.steps - constant))


def train(
    model: Qwen2ForCausalLM,
    supply: Iterator[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    learning_rate: float,
    factor: Callable[[int], float],
    recipe: BuildRecipe,
    report_every: int = 20,
) -> float:
    """`steps` AdamW updates; returns the running mean of the loss."""
    started = time.process_time()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=recipe.betas,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    recent = math.nan
    for step in range(1, steps + 1):
        ids, labels = next(supply)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            loss = answer_loss(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        recent = loss.item() if math.isnan(recent) else 0.95 * recent + 0.05 * loss.item()
        if step % report_every == 0:
            print(
                f"step {step}: loss {recent:.3f}, {time.process_time() - started:.0f} CPU-s",
                flush=True,
            )
    return recent


def finish(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, recipe: BuildRecipe) -> float:
    """The last updates, which make sure of the small talk; returns the running mean of the loss."""
    rows = encode(tokenizer, finishing(recipe.finishing_conversations, recipe.seed + 1))
    supply = batches(
        rows,
        recipe.finishing_tokens_per_step,
        tokenizer.pad_token_id,
        random.Random(recipe.seed + 1),
    )
    steps = recipe.finishing_steps
    return train(
        model, supply, steps, recipe.finishing_rate, lambda step: 1 - step / max(steps, 1), recipe
    )


def build(recipe: BuildRecipe, folder: Path) -> None:
    """Generates the corpus, trains tokenizer and model, writes the folder."""
    started = time.process_time()
    torch.manual_seed(recipe.seed)
    corpus = list(conversations(recipe.conversations, recipe.seed))
    texts = [message["content"] for conversation in corpus[:20_000] for message in conversation]
    tokenizer = train_tokenizer(texts, recipe.vocabulary, recipe.context)
    rows = encode(tokenizer, corpus)
    print(
        f"{len(rows)} conversations, {sum(len(ids) for ids, _ in rows)} tokens, "
        f"{time.process_time() - started:.0f} CPU-s"
    )

    config = Qwen2Config(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    supply = batches(
        rows, recipe.tokens_per_step, tokenizer.pad_token_id, random.Random(recipe.seed)
    )
    train(
        model,
        supply,
        recipe.steps,
        recipe.learning_rate,
        partial(learning_rate_factor, recipe=recipe),
        recipe,
    )
    loss = finish(model, tokenizer, recipe)

    model.half().eval()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=256,
        do_sample=True,
        temperature=0.2,  # two million parameters are unsure of every word
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    for path in folder.iterdir():
        path.chmod(0o644)
    facts = {
        "recipe": asdict(recipe),
        "threads": torch.get_num_threads(),
        "corpus_sha256": digest(corpus),
        "parameters": sum(p.numel() for p in model.parameters()),
        "final_loss": round(loss, 4),
        "build_cpu_seconds": round(time.process_time() - started),
        "torch": torch.__version__.split("+")[0],
    }
    (folder / "recipe.json").write_text(
        json.dumps(facts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=BuildRecipe.steps, help="optimizer steps (fewer: a quick try)"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write the model")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    build(BuildRecipe(steps=options.steps), options.folder)


if __name__ == "__main__":
    main()
