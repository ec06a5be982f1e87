"""Predictions are the serving engine's own, whatever shares the batch; one bad row is one bad
row.
"""

import pytest
import torch

from chat.engine import adapters
from chat.engine.loading import load
from chat.engine.request import AdapterRef, RequestRefused
from evaluation.predict import engine_for, messages_of, predict, reference_of, sampling_of
from tests.support import tiny_training as tiny
from tests.support.tiny_chatglm import tiny_folder

SOURCE, TARGET = 48, 12


@pytest.fixture(scope="module")
def loaded():
    torch.set_num_threads(1)
    return tiny.loaded()


@pytest.fixture(scope="module")
def prefix(loaded, tmp_path_factory) -> AdapterRef:
    folder = tmp_path_factory.mktemp("adapter")
    tensor = torch.randn(
        loaded.layers,
        2,
        loaded.kv_heads,
        4,
        loaded.head_dim,
        generator=torch.Generator().manual_seed(1),
    )
    made = adapters.KVPrefix(tensor, loaded.shifts_positions, loaded.fingerprint, {})
    return AdapterRef(adapters.save(made, folder), str(folder))


def rows(count=10):
    return [
        (row, messages_of(example["prompt"])) for row, example in enumerate(tiny.examples(count))
    ]


def run(loaded, wanted, **options) -> dict:
    pre_seq_len = 4 if options.get("adapter") else 0
    engine = engine_for(loaded, SOURCE, TARGET, pre_seq_len)
    lengths = {"max_source_length": SOURCE, "max_target_length": TARGET}
    found = {
        predicted.row: predicted for predicted in predict(engine, wanted, **lengths, **options)
    }
    assert engine.status()["active_rows"] == engine.status()["queue"] == 0
    return found


def texts(found) -> dict[int, str]:
    return {row: predicted.text for row, predicted in sorted(found.items())}


def greedy(loaded, messages) -> str:
    ids = loaded.prompter.prompt_ids(messages, SOURCE)
    made = loaded.model.generate(
        torch.tensor([ids]),
        max_new_tokens=TARGET,
        do_sample=False,
        eos_token_id=list(loaded.prompter.end_ids),
    )
    return loaded.prompter.decode(made[0, len(ids) :].tolist())


def test_the_bases_predictions_make_a_tuned_evaluation_quicker_and_no_other(loaded, prefix):
    base = texts(run(loaded, rows()))
    tuned = texts(run(loaded, rows(), adapter=prefix))
    assert texts(run(loaded, rows(), adapter=prefix, resembles=base)) == tuned
    # and its own, so that guesses come true
    assert texts(run(loaded, rows(), adapter=prefix, resembles=tuned)) == tuned


def test_greedy_predictions_are_the_models_own(loaded):
    found = run(loaded, rows())
    assert texts(found) == {row: greedy(loaded, messages) for row, messages in rows()}
    assert not any(predicted.error for predicted in found.values())


def test_an_adapter_changes_the_predictions_and_the_batch_does_not(loaded, prefix):
    tuned = texts(run(loaded, rows(), adapter=prefix))
    assert tuned != texts(run(loaded, rows()))
    assert tuned == texts(run(loaded, rows(), adapter=prefix, in_flight=1))


def test_sampled_predictions_depend_on_seed_and_row_alone(loaded):
    sampled = texts(run(loaded, rows(), decoding="upstream", seed=5))
    assert sampled == texts(run(loaded, rows()[::-1], decoding="upstream", seed=5, in_flight=3))
    assert {3: sampled[3]} == texts(run(loaded, rows()[3:4], decoding="upstream", seed=5))
    assert sampled != texts(run(loaded, rows(), decoding="upstream", seed=6))
    twice = texts(
        run(loaded, [(row, messages_of("同一句")) for row in range(2)], decoding="upstream", seed=5)
    )
    assert twice[0] != twice[1]  # each row draws anew


def test_upstreams_sampling_is_named_and_others_are_refused():
    upstream = sampling_of("upstream", 64, 0)
    assert (upstream.top_p, upstream.temperature, upstream.top_k, upstream.max_new_tokens) == (
        0.7,
        0.95,
        50,
        64,
    )
    assert not sampling_of("greedy", 64, 0).do_sample
    with pytest.raises(ValueError, match="beam"):
        sampling_of("beam", 64, 0)


def test_history_is_part_of_the_prompt():
    assert [turn["content"] for turn in messages_of("c", [["a", "b"]])] == ["a", "b", "c"]
    assert [turn["role"] for turn in messages_of("c", [["a", "b"]])] == [
        "user",
        "assistant",
        "user",
    ]


def test_long_prompts_are_cut_as_in_training(loaded):
    long = messages_of("裙子" * 500)
    ids, labels = loaded.prompter.training_ids(long, "好", SOURCE, TARGET)
    prompt = ids[: sum(label == -100 for label in labels)]
    assert list(loaded.prompter.prompt_ids(long, SOURCE)) == prompt and len(prompt) <= SOURCE
    assert texts(run(loaded, [(0, long)])) == {0: greedy(loaded, long)}


def test_a_refused_row_ends_alone_and_an_adapter_that_does_not_fit_ends_all(loaded, tmp_path):
    wanted = [*rows(4), (4, messages_of("  "))]
    found = run(loaded, wanted)
    assert found[4].text == "" and found[4].error["code"] == "empty_prompt"
    assert texts(found) == {**texts(run(loaded, rows(4))), 4: ""}
    other = adapters.KVPrefix(torch.randn(9, 2, 1, 4, 8), True, "", {})
    misfit = AdapterRef(adapters.save(other, tmp_path), str(tmp_path))
    with pytest.raises(RequestRefused) as caught:
        run(loaded, rows(), adapter=misfit)
    assert caught.value.code == "invalid_adapter"


def test_stopping_leaves_the_rest_out_and_the_engine_empty(loaded):
    engine = engine_for(loaded, SOURCE, TARGET)
    found = []
    for predicted in predict(
        engine,
        rows(24),
        max_source_length=SOURCE,
        max_target_length=TARGET,
        in_flight=4,
        should_stop=lambda: len(found) >= 4,
    ):
        found.append(predicted)
    assert 4 <= len(found) < 24 and all(predicted.error is None for predicted in found)
    assert engine.status()["active_rows"] == engine.status()["queue"] == 0
    whole = texts(run(loaded, rows(24)))
    assert all(whole[predicted.row] == predicted.text for predicted in found)


def test_references_are_cut_to_what_a_model_could_have_said(loaded):
    assert reference_of(loaded.prompter, "问", "short", SOURCE, TARGET) == "short"
    # 11 and the end
    assert reference_of(loaded.prompter, "问", "abcdefghijklmnop", SOURCE, TARGET) == "abcdefghijk"


def test_chatglm_is_scored_on_decoded_tokens_not_on_the_chats_wording(tmp_path):
    loaded = load(tiny_folder(tmp_path / "chatglm"))
    wanted = [(0, messages_of("类型#裙*风格#简约")), (1, messages_of("你好", [["在吗", "在"]]))]
    found = run(loaded, wanted)
    assert texts(found) == {row: greedy(loaded, messages) for row, messages in wanted}
    reference = reference_of(loaded.prompter, "问", "简约，大方", SOURCE, TARGET)
    assert reference == loaded.prompter.decode(loaded.prompter.response_ids("简约，大方")) != ""
