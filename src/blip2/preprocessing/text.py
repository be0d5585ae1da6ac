"""Tokenizers of the Q-Former and of the language model: strings -> token ids.

    QFormerTokenizer    BERT's WordPiece and one new token, [DEC], which starts a text to be generated; pads right
    LanguageTokenizer   whatever the frozen language model came with; targets pad right, prompts left for a decoder,
                        which goes on where they end, and right for an encoder, which counts positions from the start

Text of users never becomes a special token: "[SEP]" or "<|im_end|>" typed by somebody are plain characters.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from blip2.errors import BadData, MissingFile, UserError

DEC_TOKEN = "[DEC]"
_BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class TextBatch:
    """B texts as tokens.

    Attributes:
        input_ids: (B, T), long.
        attention_mask: (B, T), long, 1 = real token.
    """

    input_ids: Tensor
    attention_mask: Tensor

    def to(self, device: torch.device | str) -> "TextBatch":
        """The same batch on a device."""
        return TextBatch(self.input_ids.to(device), self.attention_mask.to(device))

    def __len__(self) -> int:
        return len(self.input_ids)


def pad(rows: Sequence[Sequence[int]], pad_id: int, *, side: str = "right") -> TextBatch:
    """Rows of token ids as one batch, filled with `pad_id` on the side "left" or "right" up to the longest."""
    longest = max((len(row) for row in rows), default=0)
    input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)  # (B, T)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        input_ids[i, place] = torch.tensor(row, dtype=torch.long)
        attention_mask[i, place] = 1
    return TextBatch(input_ids, attention_mask)


class QFormerTokenizer:
    """WordPiece with [DEC] as its last id: 30,522 for `bert-base-uncased` and MiniLM, so a vocabulary of 30,523."""

    def __init__(self, path: str | Path) -> None:
        """Reads a tokenizer.json, a vocab.txt (lower-cased text), or a folder that holds one of the two.

        Raises:
            MissingFile: there is no such file.
            BadData: the file is no BERT tokenizer.
        """
        self._tokenizer = _bert_tokenizer(_tokenizer_file(Path(path)))
        self._tokenizer.add_special_tokens([DEC_TOKEN])
        self._tokenizer.encode_special_tokens = True  # "[SEP]" in a text is "[", "sep", "]"
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.pad_id = self._id("[PAD]")
        self.cls_id = self._id("[CLS]")
        self.sep_id = self._id("[SEP]")
        self.dec_id = self._id(DEC_TOKEN)
        self.vocab_size = self._tokenizer.get_vocab_size()

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise BadData(f"The Q-Former's tokenizer has no {token} token, so it is not BERT's. Give BERT's vocab.txt.")
        return found

    def encode(self, texts: Sequence[str], max_length: int = 32) -> TextBatch:
        """Texts as [CLS] words [SEP], padded right to the longest; what is cut off leaves [SEP] in its place."""
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch([checked(text) for text in texts])]
        rows = [row if len(row) <= max_length else [*row[: max_length - 1], self.sep_id] for row in rows]
        return pad(rows, self.pad_id)

    def decode(self, input_ids: Tensor) -> list[str]:
        """The texts of ids (B, T), special tokens left out."""
        return self._tokenizer.decode_batch(input_ids.tolist())


def checked(text: str) -> str:
    """The text itself.

    Raises:
        UserError: it is none, or has characters that no encoding has, as bytes of a terminal that are not UTF-8.
    """
    if not isinstance(text, str):
        raise UserError(f"A text was expected, not {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"The text {text!r} is not UTF-8. Write it in UTF-8.") from None
    return text


def _tokenizer_file(path: Path) -> Path:
    """The tokenizer.json or vocab.txt that `path` is or holds."""
    if path.is_dir():
        for name in ("tokenizer.json", "vocab.txt"):
            if (path / name).is_file():
                return path / name
        raise MissingFile(f"{path} holds neither tokenizer.json nor vocab.txt.")
    if not path.is_file():
        raise MissingFile(f"There is no tokenizer file {path}.")
    return path


def _bert_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or built around a vocab.txt as `bert-base-uncased` has it."""
    if path.suffix == ".json":
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BadData(f"{path} cannot be read as a tokenizer: {error}") from None
    words = path.read_text(encoding="utf-8").splitlines()
    vocab = {word: i for i, word in enumerate(words)}
    if not {"[UNK]", "[CLS]", "[SEP]"} <= vocab.keys():
        raise BadData(f"{path} lacks [UNK], [CLS] or [SEP], so it is not a BERT vocabulary.")
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    tokenizer.add_special_tokens([token for token in _BERT_SPECIAL if token in vocab])
    return tokenizer


class LanguageTokenizer:
    """The language model's own tokenizer with our rules for padding, beginning and end.

    A bos token (or T5's closing eos) is added to prompts only where the tokenizer does so by itself. A target
    continues a prompt: it starts with the space that parts them, in the way of this tokenizer, has no bos, and ends
    with eos.
    """

    def __init__(self, tokenizer: Any, *, prompt_padding: Literal["left", "right"] = "left") -> None:
        """Wraps a Hugging Face tokenizer, which is not changed.

        Args:
            tokenizer: the one that came with the language model.
            prompt_padding: "left" for a decoder-only model, "right" for an encoder-decoder: there, padding between the
                visual prompt and the text would change how far apart they seem.

        Raises:
            BadData: it has no end-of-text token, so generation would not stop.
        """
        if tokenizer.eos_token_id is None:
            raise BadData("The language model's tokenizer has no end-of-text token, so its answers would never end.")
        self.tokenizer = tokenizer
        self._lock = threading.Lock()  # an encoding changes the tokenizer's settings, so that threads must take turns
        self.prompt_padding = prompt_padding
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._special_ids = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self._special_texts = sorted((str(text) for text in tokenizer.all_special_tokens), key=len, reverse=True)
        self._beginning, self._ending = self._find_ends()
        self._parting_space = self._find_parting_space()

    def encode_prompts(self, prompts: Sequence[str]) -> TextBatch:
        """Prompts padded on the side `prompt_padding`. An empty prompt may have no token."""
        rows = [self._beginning + self._plain_ids(prompt) + self._ending for prompt in prompts]
        return pad(rows, self.pad_id, side=self.prompt_padding)

    def encode_targets(
        self,
        targets: Sequence[str],
        *,
        prompts: Sequence[str] | None = None,
        max_length: int | Sequence[int] | None = None,
        append_eos: bool = True,
    ) -> TextBatch:
        """Texts that continue a prompt, padded right, each with eos at its end.

        Args:
            targets: captions or answers, without a leading space.
            prompts: what each continues; a text after an empty one begins without the space that parts. None: none is
                empty.
            max_length: longest row in tokens, eos included, for all rows or for each; a text that is cut ends without
                eos, for it goes on.
            append_eos: off for a beginning that the model is to continue.
        """
        end = [self.eos_id] if append_eos else []
        spaces = [self._parting_space] * len(targets)
        if prompts is not None:
            spaces = [self._parting_space if prompt else "" for prompt in prompts]
        rows = [self._plain_ids(space + target.strip()) + end for space, target in zip(spaces, targets, strict=True)]
        limits = max_length if isinstance(max_length, Sequence) else [max_length] * len(rows)
        return pad([row[:limit] for row, limit in zip(rows, limits, strict=True)], self.pad_id)

    def token_id(self, text: str) -> int:
        """The one token that `text` is.

        Raises:
            BadData: it is several.
        """
        ids = self._plain_ids(text)
        if len(ids) != 1:
            raise BadData(f"{text!r} is {len(ids)} tokens of this language model; what ends a text must be one.")
        return ids[0]

    def decode(self, input_ids: Tensor) -> list[str]:
        """The texts of new ids (B, T) up to the first eos, special tokens left out, without spaces at the ends."""
        rows = [self._until_eos(row) for row in input_ids.tolist()]
        with self._lock:
            return [
                self.tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
                for row in rows
            ]

    def _until_eos(self, row: list[int]) -> list[int]:
        return row[: row.index(self.eos_id)] if self.eos_id in row else row

    def _find_ends(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts around a text by itself: bos for Llama and OPT, eos for T5, often nothing."""
        plain = self._encode("a")
        whole = self.tokenizer("a")["input_ids"]
        starts = (i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain)
        start = next(starts, 0)
        return whole[:start], whole[start + len(plain) :]

    def _find_parting_space(self) -> str:
        """What parts a target from its prompt: a space, or nothing where the tokenizer adds it by itself."""
        adds_it_itself = self._encode("a") + self._encode("b") == self._encode("a b")
        return "" if adds_it_itself else " "

    def _plain_ids(self, text: str) -> list[int]:
        """Token ids of `text` alone, none of them special."""
        ids = self._encode(checked(text))
        if self._special_ids.isdisjoint(ids):
            return ids
        # SentencePiece vocabularies hold "</s>" as a piece of its own, which splitting does not undo: part its letters.
        for special in self._special_texts:
            text = text.replace(special, f"{special[:1]} {special[1:]}")
        return [token for token in self._encode(text) if token not in self._special_ids]

    def _encode(self, text: str) -> list[int]:
        with self._lock:
            return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
