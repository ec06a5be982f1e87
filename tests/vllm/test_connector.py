"""Prefixes through a real vLLM server: what it answers must be what our own engine answers, token
for token.
"""

import shutil

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from chat.engine.adapters import KVPrefix, save
from chat.engine.engine import Engine, EngineConfig
from chat.engine.loading import Loaded, load
from chat.engine.request import LONGEST_PREFIX, AdapterRef, Request, SamplingParams
from tests.support.live_portal import wait_for
from tests.support.tiny_models import byte_tokenizer
from tests.vllm import environment
from tests.vllm.server import Ask, VllmServer, command

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(environment.missing()), reason=environment.missing()),
]

LENGTHS = (1, 16, 20, 37, 64, 128, 130, 255)  # vLLM's blocks hold 128 tokens on a CPU
ANSWER = 40


class Checkpoint:
    """A model folder, eight adapters of it in vLLM's folder, and our engine's answers."""

    def __init__(self, folder, adapters, lengths):
        self.folder, self.adapters = folder, adapters
        self.loaded: Loaded = load(folder, device="cpu")
        adapters.mkdir()
        self.prefixes = [self.add(length, seed) for seed, length in enumerate(lengths)]

    def add(self, length: int, seed: int, dtype=torch.float32) -> tuple[str, int]:
        """(sha256, length) of a prefix that changes answers and keeps them sensible: keys and
        values of random tokens.
        """
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, self.loaded.vocabulary, (1, length), generator=generator)
        with torch.no_grad():
            cache = self.loaded.model(input_ids=ids, use_cache=True).past_key_values
        tensor = torch.stack(
            [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
        ).to(dtype)
        return self.publish(tensor), length

    def publish(self, tensor: torch.Tensor) -> str:
        name = save(KVPrefix(tensor, True, self.loaded.fingerprint), self.adapters / "new")
        (self.adapters / "new").rename(self.adapters / name)
        return name

    def prompt(self, words: int, seed: int) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(1000 + seed)
        return tuple(
            torch.randint(5, self.loaded.vocabulary, (words,), generator=generator).tolist()
        )

    def asks(self) -> list[Ask]:
        """Twenty: every prefix twice, and four bare ones between them."""
        prefixes = [*self.prefixes[:4], None, *self.prefixes[4:], None]
        return [
            Ask(self.prompt(3 + 5 * i, i), ANSWER, prefixes[i % len(prefixes)]) for i in range(20)
        ]

    def ours(self, asks: list[Ask]) -> list[tuple[int, ...]]:
        engine = Engine(self.loaded, EngineConfig(max_rows=16))
        answers = engine.generate(
            Request(
                str(number),
                prompt_ids=ask.prompt,
                adapter=AdapterRef(ask.prefix[0], str(self.adapters / ask.prefix[0]))
                if ask.prefix
                else None,
                sampling=SamplingParams(do_sample=False, max_new_tokens=ask.tokens),
            )
            for number, ask in enumerate(asks)
        )
        engine.close()
        return [answer.token_ids for answer in answers]


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    return Checkpoint(environment.model(), tmp_path_factory.mktemp("smol") / "adapters", LENGTHS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Qwen2; its heads are 32 wide, the smallest that vLLM takes on a CPU."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.25,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    return Checkpoint(folder / "model", folder / "adapters", LENGTHS)


@pytest.fixture(scope="module")
def server(smol, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "smol.log"
    more = ("--enable-prompt-tokens-details", "--max-model-len", "4096")
    details = command(smol.folder, smol.adapters, *more)
    with VllmServer(details, log) as server:
        yield server


def test_eight_prefixes_and_bare_rows_in_one_batch_are_our_engines_answers(smol, server):
    asks = smol.asks()
    assert server.all_tokens(asks) == smol.ours(asks)
    assert (
        len(
            set(
                smol.ours(
                    [Ask(asks[0].prompt, ANSWER, prefix) for prefix in (*smol.prefixes, None)]
                )
            )
        )
        > 5
    )


def test_rows_behind_the_longest_prefix_are_our_engines_answers(smol, server):
    prefix = smol.add(LONGEST_PREFIX, seed=78)
    asks = [Ask(smol.prompt(5 + 9 * i, 600 + i), 20, prefix if i % 3 else None) for i in range(6)]
    assert server.all_tokens(asks) == smol.ours(asks)


def test_rows_of_one_prefix_share_its_full_blocks(smol, server):
    """The second request finds the 128 tokens of the first full block in vLLM's own cache."""
    prefix = smol.add(200, seed=77)
    first, second = (Ask(smol.prompt(30, seed), 1, prefix) for seed in (501, 502))
    # The placeholders are the prompt's first token, so the prompts must share it to share the
    # blocks.
    second = Ask((first.prompt[0], *second.prompt), 1, prefix)
    server.tokens(first)
    _, answer = server.post(second.body())
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 128


def test_a_prefix_that_is_added_later_is_served_without_a_restart(smol, server):
    ask = Ask(smol.prompt(20, 300), ANSWER, smol.add(50, seed=300))
    assert server.tokens(ask) == smol.ours([ask])[0]


def spoiled(smol, what: str, ask: Ask) -> dict:
    body = ask.body()
    name, length = ask.prefix
    if what == "unknown":
        other = "0" * 64
        return {
            **body,
            "kv_transfer_params": {"prefix": other, "length": length},
            "cache_salt": other,
        }
    if what == "another content":
        other = "1" * 64
        shutil.copytree(smol.adapters / name, smol.adapters / other, dirs_exist_ok=True)
        return {
            **body,
            "kv_transfer_params": {"prefix": other, "length": length},
            "cache_salt": other,
        }
    if what == "another model":
        loaded = smol.loaded
        shape = (loaded.layers + 1, 2, loaded.kv_heads, length, loaded.head_dim)
        other = smol.publish(torch.zeros(shape))
        return {
            **body,
            "kv_transfer_params": {"prefix": other, "length": length},
            "cache_salt": other,
        }
    changes = {
        "no salt": {"cache_salt": None},
        "another salt": {"cache_salt": smol.prefixes[0][0]},
        "a wrong length": {"kv_transfer_params": {"prefix": name, "length": length + 1}},
        "a length beyond the prompt": {"kv_transfer_params": {"prefix": name, "length": 100_000}},
        "no length": {"kv_transfer_params": {"prefix": name}},
        "a path": {"kv_transfer_params": {"prefix": f"../adapters/{name}", "length": length}},
        "nothing but one "
        "token": {"prompt": [5, 6], "kv_transfer_params": {"prefix": name, "length": length}},
        "an echo": {"echo": True, "logprobs": 1},
        "prompt logprobs": {"prompt_logprobs": 1},
    }  # fmt: skip
    return {**body, **changes[what]}


SPOILED = (
    "unknown", "another model", "another content", "no salt", "another salt", "a wrong length",
    "a length beyond the prompt", "no length", "a path", "nothing but one token", "an echo",
    "prompt logprobs",
)  # fmt: skip


@pytest.mark.parametrize("what", SPOILED)
def test_a_prefix_that_cannot_be_put_there_fails_its_request_and_nothing_else(smol, server, what):
    """Never an answer without it: that would look like one of the tuned model."""
    ask = Ask(smol.prompt(12, 400), 8, smol.prefixes[5])
    status, answer = server.post(spoiled(smol, what, ask))
    assert status == 500, answer
    asks = [ask, Ask(ask.prompt, 8)]
    assert server.all_tokens(asks) == smol.ours(asks)


def test_a_reader_that_goes_away_frees_its_row(smol, server):
    before = server.metric("generation_tokens_total")
    with server.stream(Ask(smol.prompt(12, 600), 900, smol.prefixes[2]).body()) as answer:
        assert answer.readline().startswith(b"data:")
    wait_for(lambda: server.metric("num_requests_running") == 0, 60, "the row to be free")
    assert server.metric("generation_tokens_total") < before + 900


def test_a_prefix_is_put_back_after_a_preemption(tiny, tmp_path):
    """A cache too small for the batch: rows are pushed out, and come back with their prefix."""
    asks = tiny.asks()
    few = ("--block-size", "32", "--num-gpu-blocks-override", "40")
    with VllmServer(command(tiny.folder, tiny.adapters, *few), tmp_path / "tiny.log") as server:
        assert server.all_tokens(asks) == tiny.ours(asks)
        assert server.metric("num_preemptions_total") > 0


def test_half_precision_casts_the_prefix(tiny, tmp_path):
    """The same values kept as float32 and as bfloat16 are one prefix to a model in bfloat16."""
    wide, narrow = tiny.add(40, seed=9), tiny.add(40, seed=9, dtype=torch.bfloat16)
    assert wide != narrow
    prompts = [tiny.prompt(10 + i, 700 + i) for i in range(6)]
    half = command(tiny.folder, tiny.adapters, "--dtype", "bfloat16")
    with VllmServer(half, tmp_path / "tiny.log") as server:
        with_wide, with_narrow, bare = (
            [server.tokens(Ask(prompt, ANSWER, prefix)) for prompt in prompts]
            for prefix in (wide, narrow, None)
        )
    assert with_wide == with_narrow
    assert all(tuned != plain for tuned, plain in zip(with_wide, bare, strict=True))


def test_a_server_that_would_answer_without_the_prefix_does_not_start(tiny, tmp_path):
    other = command(tiny.folder, tiny.adapters, kv_load_failure_policy="recompute")
    server = VllmServer(other, tmp_path / "tiny.log")
    with pytest.raises(AssertionError, match="vLLM ended"), server:
        pass
    assert 'PrefixConnector needs kv_load_failure_policy "fail"' in server.output()
