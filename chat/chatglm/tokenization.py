"""ChatGLM-6B's tokenizer: sentencepiece `ice_text.model`, as transformers 5 tokenizers go
(docs/chatglm.md#6-tokenizer).
"""

from __future__ import annotations

import re
import shutil
from functools import cached_property
from pathlib import Path

import numpy
import sentencepiece
from transformers import PreTrainedTokenizer
from transformers.utils import PaddingStrategy

from .pieces import Pieces, PieceStream

_SPACES = re.compile(r" {2,}")


def _blanks(match: re.Match) -> str:
    length = len(match[0])
    rest = length % 80
    return "<|blank_80|>" * (length // 80) + (f"<|blank_{rest}|>" if rest > 1 else " " * rest)


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Text to ids as the original does it, with two deliberate differences (docs/chatglm.md).

    User text never becomes special ids: `<sop>`, `[MASK]` and the like are split as the words that
    they are (`split_special_tokens=True` is the default here; False gives the original's ids). And
    an id beyond the vocabulary decodes to nothing instead of raising IndexError.

    Rows end in [gMASK] <sop>; a pair becomes a + [gMASK] <sop> + b + <eop>. When padding is asked
    for, and only then, rows get the original's attention_mask [1, s, s] (True = hidden) and
    position_ids [2, s].
    """

    vocab_files_names = {"vocab_file": "ice_text.model"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        end_token: str = "</s>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        num_image_tokens: int = 20000,
        split_special_tokens: bool = True,
        **kwargs,
    ):
        """num_image_tokens: offset of every id. 0 in the published tokenizer_config.json; the
        oldest one does not name it.
        """
        self.vocab_file, self.num_image_tokens = vocab_file, num_image_tokens
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(vocab_file))
        except RuntimeError as error:
            raise OSError(
                f"the vocabulary ice_text.model is missing or damaged: {error}"
            ) from error
        kwargs.pop("auto_map", None)
        # from_pretrained collects unknown *_token entries of tokenizer_config.json here, to make
        # special tokens of them
        own = kwargs.pop("model_specific_special_tokens", {})
        self.end_token, self.gmask_token = (
            own.pop("end_token", end_token),
            own.pop("gmask_token", gmask_token),
        )
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            mask_token=mask_token,
            pad_token=pad_token,
            unk_token=unk_token,
            split_special_tokens=split_special_tokens,
            **kwargs,
        )
        # Plain attributes, as the original has them: not among all_special_tokens, but written to
        # tokenizer_config.json.
        self.init_kwargs.update(
            end_token=self.end_token,
            gmask_token=self.gmask_token,
            num_image_tokens=num_image_tokens,
        )

    # Vocabulary

    @property
    def vocab_size(self) -> int:
        return self.processor.GetPieceSize() + self.num_image_tokens

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        size = self.processor.GetPieceSize()
        pieces = self.processor.IdToPiece(list(range(size)))
        return dict(
            zip(pieces, range(self.num_image_tokens, size + self.num_image_tokens), strict=True)
        )

    def get_vocab(self) -> dict[str, int]:
        return {**self._vocabulary, **self._added_tokens_encoder}

    def __len__(self) -> int:
        return max([self.vocab_size - 1, *self._added_tokens_decoder]) + 1

    @property
    def gmask_token_id(self) -> int:
        return self._convert_token_to_id(self.gmask_token)

    @property
    def end_token_id(self) -> int:
        return self._convert_token_to_id(self.end_token)

    def _convert_token_to_id(self, token: str) -> int:
        return self.processor.PieceToId(token) + self.num_image_tokens

    def _convert_id_to_token(self, index: int) -> str:
        index -= self.num_image_tokens
        return (
            self.processor.IdToPiece(index)
            if 0 <= index < self.processor.GetPieceSize()
            else self.unk_token
        )

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        target = (
            Path(save_directory)
            / f"{filename_prefix + '-' if filename_prefix else ''}ice_text.model"
        )
        if Path(self.vocab_file).resolve() != target.resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    # Text to ids

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        text = _SPACES.sub(_blanks, text.replace("\n", "<n>").replace("\t", "<|tab|>"))
        return self.processor.EncodeAsPieces(text)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        ids = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.eos_token_id]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        if already_has_special_tokens:
            return super().get_special_tokens_mask(
                token_ids_0, token_ids_1, already_has_special_tokens=True
            )
        mask = [0] * len(token_ids_0) + [1, 1]
        return mask if token_ids_1 is None else mask + [0] * len(token_ids_1) + [1]

    def _pad(
        self,
        encoded_inputs: dict,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict:
        """Left padding, with mask and positions computed on the row alone and then padded."""
        if padding_strategy == PaddingStrategy.DO_NOT_PAD:
            return encoded_inputs
        if (padding_side or self.padding_side) != "left":
            raise ValueError("ChatGLM's tokenizer pads on the left only")
        ids = encoded_inputs["input_ids"]
        length = len(ids)
        target = (
            length
            if padding_strategy == PaddingStrategy.LONGEST or max_length is None
            else max_length
        )
        if pad_to_multiple_of:
            target = -(-target // pad_to_multiple_of) * pad_to_multiple_of
        padding = max(target - length, 0)

        context = ids.index(self.bos_token_id) if self.bos_token_id in ids else length
        if "attention_mask" not in encoded_inputs and return_attention_mask is not False:
            hidden = ~numpy.tri(length, dtype=bool)
            hidden[:, :context] = False
            encoded_inputs["attention_mask"] = numpy.pad(
                hidden[None], ((0, 0), (padding, 0), (padding, 0)), constant_values=True
            )
        if "position_ids" not in encoded_inputs:
            place = numpy.arange(length)
            mask_id = self.gmask_token_id if self.gmask_token_id in ids else self.mask_token_id
            if mask_id in ids:
                place[context:] = ids.index(mask_id)
            block = numpy.maximum(numpy.arange(length) - context + 1, 0)
            encoded_inputs["position_ids"] = numpy.pad(
                numpy.stack((place, block)), ((0, 0), (padding, 0))
            )
        if "special_tokens_mask" in encoded_inputs:
            encoded_inputs["special_tokens_mask"] = [1] * padding + encoded_inputs[
                "special_tokens_mask"
            ]
        encoded_inputs["input_ids"] = [self.pad_token_id] * padding + list(ids)
        return encoded_inputs

    # Ids to text

    @cached_property
    def pieces(self) -> Pieces:
        return Pieces(self.processor, offset=self.num_image_tokens)

    def stream(self) -> PieceStream:
        """A decoder for ids as they are generated, about 0.3 us each: step(id) -> text, flush() ->
        text.
        """
        return PieceStream(self.pieces)

    def _decode(
        self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs
    ) -> str:
        ids = (
            [token_ids] if isinstance(token_ids, int) else [int(token_id) for token_id in token_ids]
        )
        if skip_special_tokens:
            special = set(self.all_special_ids)
            ids = [token_id for token_id in ids if token_id not in special]
        return self.pieces.decode(ids)
