"""Texts as token ids, and token ids in batches with little padding. Tokenizers, never torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import InputRejected, MissingExtra, ModelError
from pipeline.records import Reason

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_MAX_TOKENS = 8192
"""The longest text that jina-clip-v1's tokenizer admits, in tokens."""

MAX_PADDING = 0.08
"""The largest share of padding in one batch of texts; keeps any mixture under a tenth."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Texts as token ids, in input order, not padded.

    Attributes:
        ids: one list of ids a text, start and end tokens included.
        truncated: whether the text was longer than `max_tokens`.
    """

    ids: tuple[list[int], ...]
    truncated: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.ids)


class TextTokenizer:
    """The folder's `tokenizer.json`; padding and truncation are done here, so one object serves all threads.

    Args:
        path: the `tokenizer.json`.
        pad_token_id: from the config; the tower takes this id for padding.
        vocab_size: rows of the word embedding.
        max_tokens: longer texts are cut, keeping the end token.
        ceiling: the longest text that the tower takes, in tokens.

    Raises:
        ModelError: unreadable, or made for another model.
        MissingExtra: tokenizers is not installed.
    """

    def __init__(
        self, path: Path, *, pad_token_id: int, vocab_size: int, max_tokens: int, ceiling: int = TOKENIZER_MAX_TOKENS
    ) -> None:
        if not 3 <= max_tokens <= TOKENIZER_MAX_TOKENS:
            raise ModelError(f"max_tokens must be 3 to {TOKENIZER_MAX_TOKENS}, not {max_tokens}.")
        self.max_tokens, self.ceiling = max_tokens, ceiling
        self._tokenizer = _open_tokenizer(path)
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= vocab_size:
            raise ModelError(
                f"{path} is another model's tokenizer: its largest id is {largest}, but config.json's vocab_size is "
                f"{vocab_size}. Use the tokenizer.json that came with the weights."
            )
        pad_id = _pad_id(self._tokenizer)
        if pad_id != pad_token_id:
            raise ModelError(
                f"{path} is another model's tokenizer: it pads with id {pad_id}, but config.json's pad_token_id is "
                f"{pad_token_id}. Use the tokenizer.json that came with the weights."
            )
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        mask = self._tokenizer.encode("a").special_tokens_mask
        if len(mask) < 3 or not mask[0] or not mask[-1]:
            raise ModelError(
                f"{path} is another model's tokenizer: it adds no start and end token. Use the tokenizer.json that "
                "came with the weights."
            )

    def tokenize(self, texts: Sequence[str], *, max_tokens: int | None = None) -> TokenBatch:
        """Turn texts into ids.

        Raises:
            InputRejected: `text_empty` for an empty or blank text.
        """
        texts = readable(texts)
        limit = min(max_tokens or self.max_tokens, self.ceiling)
        encodings = self._tokenizer.encode_batch_fast(texts)
        ids = [encoding.ids for encoding in encodings]
        # Cutting before the last id is what truncation on the right does to one sequence with one end token.
        cut = tuple(one if len(one) <= limit else one[: limit - 1] + one[-1:] for one in ids)
        return TokenBatch(cut, tuple(len(one) > limit for one in ids))


def readable(texts: Sequence[str]) -> list[str]:
    """The texts as UTF-8 can hold them: a lone surrogate becomes a question mark.

    Raises:
        InputRejected: `text_empty` for an empty or blank text.
    """
    for index, text in enumerate(texts):
        if not text or text.isspace():
            raise InputRejected(Reason.TEXT_EMPTY, f"text {index} is empty or blank")
    return [text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8") for text in texts]


def _pad_id(tokenizer: Tokenizer) -> int | None:
    if tokenizer.padding is not None:
        return int(tokenizer.padding["pad_id"])
    for token in ("[PAD]", "<pad>"):
        found = tokenizer.token_to_id(token)
        if found is not None:
            return int(found)
    return None


def _open_tokenizer(path: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise MissingExtra("Reading text needs tokenizers; install it with: pip install 'twotower[search]'.") from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for every fault of the file
        raise ModelError(f"{path} cannot be read as a tokenizer ({error}); fetch the model again.") from error


def pack(lengths: Sequence[int], budget: int, *, is_padded: bool = True) -> list[tuple[int, int]]:
    """Cut texts that are sorted by length into batches.

    Args:
        lengths: tokens of each text, ascending.
        budget: cells of a batch; one text over it stands alone.
        is_padded: cells are texts times the longest text, else tokens.

    Returns:
        (first, last + 1) of each batch, covering all texts in order, each within the budget and `MAX_PADDING`.
    """
    batches: list[tuple[int, int]] = []
    start, tokens = 0, 0
    for index, length in enumerate(lengths):
        cells = (index - start + 1) * length if is_padded else tokens + length
        if index > start and (cells > budget or cells - tokens - length > MAX_PADDING * cells):
            batches.append((start, index))
            start, tokens = index, 0
        tokens += length
    if lengths:
        batches.append((start, len(lengths)))
    return batches
