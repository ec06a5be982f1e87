"""Two adapters in one request: joined exactly, offered only where they were trained so, and at
every door.
"""

import json

import pytest
import torch
from django.core.exceptions import ValidationError
from transformers.cache_utils import DynamicCache

from chat import registry
from chat.checkpoints import adapter_files
from chat.compositions import composed
from chat.conversations import turns
from chat.engine import adapters
from chat.engine.engine import Engine, EngineConfig
from chat.engine.request import LONGEST_PREFIX, AdapterRef
from chat.models import Adapter, Conversation
from tests.support.folders import adapter_folder, checkpoint_folder
from tests.support.tiny_models import (
    END,
    greedy,
    loaded_model,
    plain_model,
    prefix_tensor,
)


@pytest.fixture
def base(db, tmp_path, data_dir):
    return registry.register_checkpoint(checkpoint_folder(tmp_path / "base"))


@pytest.fixture
def make(base, member, tmp_path):
    """make(name, beside=()): an adapter that was trained beside others."""

    def made(name, beside=(), seed=0, owner=member, **changes) -> Adapter:
        folder = adapter_folder(tmp_path / name.replace("/", "-"), seed=seed, **changes)
        path = folder / adapter_files.DESCRIPTION
        told = json.loads(path.read_text(encoding="utf-8"))
        told["metadata"] = {"recipe": {"beside": ",".join(one.sha256 for one in beside)}}
        path.write_text(json.dumps(told), encoding="utf-8")
        return registry.publish_adapter(folder, name=name, checkpoint=base, owner=owner)

    return made


@pytest.mark.parametrize("architecture", ["qwen2", "glm", "chatglm"])
def test_the_engine_answers_behind_both_as_transformers_does(architecture, tmp_path):
    loaded = loaded_model(architecture)
    tensors = [prefix_tensor(architecture, length, seed) for length, seed in ((5, 1), (8, 2))]
    folders = []
    for number, tensor in enumerate(tensors):
        prefix = adapters.KVPrefix(tensor, loaded.shifts_positions, loaded.fingerprint)
        folders.append(tmp_path / str(number))
        adapters.save(prefix, folders[-1])
    adapter_files.join(*folders, tmp_path / "both", {})
    both = adapters.load(tmp_path / "both")
    assert torch.equal(both.tensor, torch.cat(tensors, dim=3)) and both.pre_seq_len == 13
    prompt = (20, 21, 22, 23, 24, 25, 26)
    if architecture == "chatglm":
        from chat.chatglm import PrefixCache
        from tests.support.tiny_models import GMASK, SOP

        prompt = (*prompt, GMASK, SOP)
        cache, ids = PrefixCache(both.tensor), torch.tensor([prompt])
        settings = {}
    else:
        cache, ids = DynamicCache(), torch.tensor([prompt])
        for number in range(loaded.layers):
            keys, values = (
                torch.cat([tensor[number, part] for tensor in tensors], dim=1)[None]
                for part in (0, 1)
            )
            cache.update(keys, values, number)
        # generation wants ids for what the cache holds; only those behind it are computed
        ids = torch.cat([torch.zeros(1, 13, dtype=torch.long), ids], dim=1)
        settings = {"attention_mask": torch.ones_like(ids)}
    output = plain_model(architecture).generate(
        ids, past_key_values=cache, max_new_tokens=12, do_sample=False, pad_token_id=END, **settings
    )
    engine = Engine(loaded, EngineConfig(max_rows=2, max_length=64))
    try:
        ref = AdapterRef("both", str(tmp_path / "both"))
        (answer,) = engine.generate([greedy("1", prompt, 12, ref)])
    finally:
        engine.close()
    assert list(answer.token_ids) == output[0, ids.shape[1] :].tolist()


def test_together_only_where_one_was_trained_beside_the_other(
    make, base, member, other_member, tmp_path
):
    style = make("style", seed=1)
    domain = make("domain", beside=[style], seed=2)
    other = make("other", seed=3)
    both = composed(member, domain, style)
    assert both == composed(member, style, domain), "in the order in which they were trained"
    assert both.name == "style+domain" and both.parts == [style.sha256, domain.sha256]
    assert both.pre_seq_len == style.pre_seq_len + domain.pre_seq_len
    parts = [adapters.load(one.path).tensor for one in (style, domain)]
    assert torch.equal(adapters.load(both.path).tensor, torch.cat(parts, dim=3))
    with pytest.raises(ValidationError) as refused:
        composed(member, domain, other)
    assert refused.value.code == "not_composable"
    domain.pre_seq_len = LONGEST_PREFIX - 1
    Adapter.objects.filter(pk=both.pk).delete()
    with pytest.raises(ValidationError, match=str(LONGEST_PREFIX)):
        composed(member, domain, style)


def test_every_door_names_two_adapters(make, base, member, other_member, client, settings):
    style = make("style", seed=1)
    domain = make("domain", beside=[style], seed=2)
    other = make("a+b", seed=3)
    for name in ("base:style+domain", "base:domain+style", "domain+style"):
        assert registry.find_model(member, name)[1].parts == [style.sha256, domain.sha256]
    assert registry.find_model(member, "base:a+b")[1] == other, "a name may have the sign"
    assert Adapter.objects.count() == 4
    for name in ("base:style+nobody", "elsewhere:style+domain", "+", "style+"):
        with pytest.raises(LookupError):
            registry.find_model(member, name)
    with pytest.raises(LookupError):  # other people's are not there
        registry.find_model(other_member, "base:style+domain")
    with pytest.raises(ValidationError) as refused:
        registry.find_model(member, "base:style+a+b")
    assert refused.value.error_dict["model"][0].code == "not_composable"

    for wish in (["domain", "style"], [style.pk, domain.pk], "style+domain"):
        conversation = Conversation.objects.create(owner=member)
        _message, answer = turns.create_turn(conversation, member, "hi", adapter=wish)
        assert answer.adapter.parts == [style.sha256, domain.sha256]
        assert answer.model_label == "base:style+domain"
    conversation = Conversation.objects.create(owner=member)
    client.force_login(member)
    path = f"/api/v1/conversations/{conversation.pk}/messages/"
    for wish in (
        ["style", "a+b"],
        ["style", None],
        ["style"],
        ["style", "domain", "a+b"],
        [[], {}],
    ):
        answer = client.post(
            path, {"content": "hi", "adapter": wish}, content_type="application/json"
        )
        assert answer.status_code == 400 and "adapter" in json.dumps(answer.json()), wish


def test_what_does_not_fit_together_is_told(make, member):
    style = make("style", seed=1)
    domain = make("domain", beside=[style], seed=2)
    path = domain.path / adapter_files.DESCRIPTION
    told = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**told, "dtype": "bfloat16"}), encoding="utf-8")
    with pytest.raises(ValidationError, match="dtype float32 and bfloat16"):
        composed(member, style, domain)
    (style.path / adapter_files.WEIGHTS).unlink()
    path.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(ValidationError, match="No such file"):
        composed(member, style, domain)
