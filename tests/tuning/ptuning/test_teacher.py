"""The base's own answers as a second goal: what is learnt of them, and that it is dependable."""

from dataclasses import replace

import pytest
import torch

from tests.support import tiny_training as tiny
from tuning.ptuning.recipe import Recipe
from tuning.ptuning.teacher import divergence, lessons
from tuning.ptuning.trainer import Stopped, Trainer, TrainingFailed

PROMPTS = ["你好", "hello", "what is it?", "再见", "谁？"]
LENGTHS = {"max_source_length": 40, "max_target_length": 12}
RECIPE = Recipe(
    pre_seq_len=6,
    learning_rate=5e-2,
    max_steps=6,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    **LENGTHS,
    logging_steps=2,
    save_steps=2,
    seed=7,
    kl_weight=1.0,
    kl_share=0.5,
)


def test_the_divergence_is_the_kullback_leibler_divergence_when_every_word_is_kept():
    torch.manual_seed(0)
    base, mine = torch.randn(2, 5, 30)
    logprobs, words = base.log_softmax(-1).topk(30)
    exact = torch.nn.functional.kl_div(
        mine.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(divergence(mine, words, logprobs), exact, rtol=1e-3, atol=1e-4)
    few = divergence(mine, words[:, :4], logprobs[:, :4])  # the rest as one word: never more
    assert (few <= exact + 1e-5).all() and (few > 0).all()
    assert divergence(base, words[:, :4], logprobs[:, :4]).abs().max() < 1e-5


def test_lessons_are_the_bases_greedy_answers_with_its_own_probabilities(tmp_path):
    loaded = tiny.loaded()
    found = lessons(loaded, PROMPTS, **LENGTHS, folder=tmp_path)
    assert found
    for lesson in found:
        start = next(at for at, label in enumerate(lesson.labels) if label >= 0)
        logits = loaded.model(input_ids=torch.tensor([lesson.ids])).logits[0]
        assert lesson.labels[start:] == lesson.ids[start:]
        greedy = logits[start - 1 : -1].argmax(-1).tolist()
        assert greedy == lesson.ids[start:] == lesson.top_ids[:, 0].tolist()
        expected = logits[start - 1 : -1].log_softmax(-1).gather(-1, lesson.top_ids)
        torch.testing.assert_close(lesson.top_logprobs, expected, rtol=1e-4, atol=1e-5)


def test_answers_are_asked_for_once_and_a_damaged_file_is_written_anew(tmp_path):
    loaded = tiny.loaded()
    first = lessons(loaded, PROMPTS, **LENGTHS, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    written = file.read_bytes()
    loaded.model.forward = None  # nobody asks the model again
    again = lessons(loaded, PROMPTS, **LENGTHS, folder=tmp_path)
    assert [lesson.ids for lesson in again] == [lesson.ids for lesson in first]
    assert all(
        torch.equal(one.top_logprobs, other.top_logprobs)
        for one, other in zip(first, again, strict=True)
    )
    del loaded.model.forward
    file.write_bytes(written[: len(written) // 2])
    lessons(loaded, PROMPTS, **LENGTHS, folder=tmp_path)
    assert len(file.read_bytes()) == len(written)
    lessons(loaded, PROMPTS[:2], **LENGTHS, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_prefix_stays_closer_to_the_base_and_learns_the_task_all_the_same():
    def run(weight):
        seen = []
        trainer = Trainer(
            tiny.loaded(),
            replace(RECIPE, max_steps=60, kl_weight=weight, init="zero"),
            tiny.examples(8),
            report=seen.append,
            general_prompts=PROMPTS,
        )
        trainer.train()
        return seen

    held, loose = run(10.0), run(1e-6)  # a weight of nearly nothing measures, and does not hold
    assert held[-1].divergence < 0.5 * loose[-1].divergence
    assert held[-1].loss < 0.9 * held[0].loss
    plain = []
    Trainer(
        tiny.loaded(), replace(RECIPE, kl_weight=0.0), tiny.examples(8), report=plain.append
    ).train()
    assert plain[-1].divergence is None


def test_micro_batches_change_nothing_and_a_resume_is_bit_for_bit(tmp_path):
    def trainer(folder=None, report=None, **options):
        return Trainer(
            tiny.loaded(),
            RECIPE,
            tiny.examples(8),
            folder,
            report,
            general_prompts=PROMPTS,
            **options,
        )

    straight = trainer().train().tensor
    small = trainer(micro_batch_tokens=1).train().tensor
    torch.testing.assert_close(small, straight, rtol=1e-4, atol=1e-5)
    with pytest.raises(Stopped):
        trainer(tmp_path, lambda progress: progress.step == 3).train()
    assert torch.equal(trainer(tmp_path).train().tensor, straight)


def test_a_base_that_answers_nothing_cannot_be_held_to_its_answers():
    loaded = tiny.loaded()

    def ends_at_once(module, arguments, logits):
        logits[..., 256] += 1e4

    loaded.model.get_output_embeddings().register_forward_hook(ends_at_once)
    with pytest.raises(TrainingFailed) as failed:
        Trainer(loaded, RECIPE, tiny.examples(8), general_prompts=PROMPTS)
    assert failed.value.code == "no_general_answers"
