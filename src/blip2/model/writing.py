"""Words out of a frozen LLM, one token a step: greedy, by chance, or by beam search.

    Writer   rows that are written side by side, each with a decoding of its own; who has finished leaves, others join
    write    all rows of one batch to their end

What comes out is what `transformers.GenerationMixin.generate` gives, token for token; it is faster where rows end at
different lengths, where there are beams (a prompt is read once, not once for every beam), and where a single row's next
words can be guessed (drafting.py): the LLM reads all guesses at once, and those stand that it would have said itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from blip2.model.language import LanguageModel
from blip2.model.reading import Reading

NEVER = -1e9  # the score of a beam that must not be chosen


@dataclass(frozen=True)
class Decoding:
    """How text is drawn from the LLM; the names are `transformers.GenerationConfig`'s."""

    num_beams: int = 1
    max_new_tokens: int = 30
    min_new_tokens: int = 0
    do_sample: bool = False
    top_p: float = 0.9
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    num_return_sequences: int = 1


@dataclass
class Row:
    """One text that is being written.

    Attributes:
        decoding: how; its beams and number of sequences are not looked at.
        token_ids: what was written, the stop token included.
        start_ids: what the decoder was given before that; counts for `repetition_penalty`.
        is_cancelled: nobody waits for it any more; it is dropped before the next step.
    """

    decoding: Decoding
    token_ids: list[int] = field(default_factory=list)
    start_ids: tuple[int, ...] = ()
    is_cancelled: bool = False


class Writer:
    """Rows that are written side by side; see the module's docstring."""

    def __init__(self, language_model: LanguageModel) -> None:
        self.language_model = language_model
        self.rows: list[Row] = []
        self._reading: Reading | None = None
        self._logits: Tensor | None = None  # (rows, V)

    def takes(self, reading: Reading) -> bool:
        """Whether rows that were read can be put beside those that are being written."""
        return self._reading is None or (self._reading.can_join and reading.can_join)

    def add(self, reading: Reading, logits: Tensor, decodings: Sequence[Decoding]) -> list[Row]:
        """Rows that a language model's `start` has read join; returns them in the same order."""
        starts = reading.written.tolist()
        rows = [Row(decoding, start_ids=tuple(start)) for decoding, start in zip(decodings, starts, strict=True)]
        if self._reading is None or self._logits is None:
            self._reading, self._logits = reading, logits
        else:
            self._reading.join(reading)
            self._logits = torch.cat([self._logits, logits])
        self.rows += rows
        return rows

    def step(self) -> tuple[list[Row], list[Row]]:
        """Writes one token in every row; in a single row also what was guessed of the tokens after it, if it was right.

        Returns:
            The rows that have new tokens, and those of them that are done and have left.
        """
        self._keep([not row.is_cancelled for row in self.rows])
        if not self.rows:
            return [], []
        assert self._logits is not None
        token_ids = _choose(self._logits, self.rows, self.language_model.stop_ids)
        written = list(self.rows)
        for row, token_id in zip(written, token_ids.tolist(), strict=True):
            row.token_ids.append(token_id)
        goes_on = [not self._is_done(row) for row in written]
        self._logits = None
        self._keep(goes_on)
        if self.rows:
            assert self._reading is not None
            if draft := self._draft(self._reading):
                self._read_draft(self._reading, draft)
            else:
                going = token_ids if all(goes_on) else token_ids[torch.tensor(goes_on, device=token_ids.device)]
                self._logits = self.language_model.step(self._reading, going)
        left = {id(row) for row in written} - {id(row) for row in self.rows}
        return written, [row for row in written if id(row) in left]

    def _draft(self, reading: Reading) -> list[int]:
        """Guesses of what follows the newest token, where a single row is written and what is likeliest is chosen."""
        row, decoding = self.rows[0], self.rows[0].decoding
        if len(self.rows) > 1 or decoding.do_sample or decoding.repetition_penalty != 1.0:
            return []
        count = len(row.token_ids)
        return self.language_model.draft(
            reading,
            row.token_ids[-1],
            most=decoding.max_new_tokens - count,
            num_without_stop=decoding.min_new_tokens - count,
        )

    def _read_draft(self, reading: Reading, draft: Sequence[int]) -> None:
        """Reads the newest token and guesses after it, and writes the guesses up to the first that is not chosen."""
        (row,) = self.rows
        num_read = reading.mask.shape[1] + 1
        logits = self.language_model.step_through(reading, [row.token_ids[-1], *draft])  # (1 + guesses, V)
        num_right = 0
        for guess in draft:
            if int(_choose(logits[num_right : num_right + 1], [row], self.language_model.stop_ids)) != guess:
                break
            num_right += 1
            row.token_ids.append(guess)
            if self._is_done(row):
                self._keep([False])
                return
        reading.shorten(num_read + num_right)
        self._logits = logits[num_right : num_right + 1]

    def _is_done(self, row: Row) -> bool:
        return row.token_ids[-1] in self.language_model.stop_ids or len(row.token_ids) == row.decoding.max_new_tokens

    def _keep(self, kept: Sequence[bool]) -> None:
        if all(kept):
            return
        self.rows = [row for row, keep in zip(self.rows, kept, strict=True) if keep]
        if not self.rows:
            self._reading = self._logits = None
            return
        assert self._reading is not None
        places = torch.tensor(kept, device=self._reading.mask.device).nonzero().flatten()
        self._reading.select(places)
        self._logits = self._logits[places] if self._logits is not None else None


def _choose(logits: Tensor, rows: Sequence[Row], stop_ids: Sequence[int]) -> Tensor:
    """The next token (B,) of every row; rows of one decoding are drawn together."""
    decodings = dict.fromkeys(row.decoding for row in rows)
    if len(decodings) == 1:
        return _drawn(logits, rows, rows[0].decoding, stop_ids)
    token_ids = torch.empty(len(rows), dtype=torch.long, device=logits.device)
    for decoding in decodings:
        chosen = [i for i, row in enumerate(rows) if row.decoding == decoding]
        places = torch.tensor(chosen, device=logits.device)
        token_ids[places] = _drawn(logits[places], [rows[i] for i in chosen], decoding, stop_ids)
    return token_ids


def _drawn(logits: Tensor, rows: Sequence[Row], decoding: Decoding, stop_ids: Sequence[int]) -> Tensor:
    written = [[*row.start_ids, *row.token_ids] for row in rows]
    scores = _processed(logits, written, [len(row.token_ids) for row in rows], decoding, stop_ids)
    if decoding.do_sample:
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1)[:, 0]
    if scores.device.type == "cpu":  # PyTorch's threads would spin on, where those of a quantised LLM are to compute
        return torch.from_numpy(scores.numpy().argmax(axis=-1))
    return scores.argmax(dim=-1)


def _processed(
    scores: Tensor,
    written: Sequence[Sequence[int]],
    num_new: Sequence[int],
    decoding: Decoding,
    stop_ids: Sequence[int],
) -> Tensor:
    """Scores (B, V) with what a decoding does to them before a token is drawn."""
    if decoding.repetition_penalty != 1.0:
        penalise: Any = RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty)
        scores = torch.cat(
            [
                penalise(torch.tensor([words], dtype=torch.long, device=scores.device), row[None])
                for words, row in zip(written, scores, strict=True)
            ]
        )
    early = [count < decoding.min_new_tokens for count in num_new]
    if any(early):
        stops = torch.tensor(list(stop_ids), dtype=torch.long, device=scores.device)
        without = scores.index_fill(1, stops, -torch.inf)
        if all(early):
            scores = without
        else:
            scores = torch.where(torch.tensor(early, device=scores.device)[:, None], without, scores)
    if decoding.do_sample:
        warp: Any = LogitsProcessorList()
        if decoding.temperature != 1.0:
            warp.append(TemperatureLogitsWarper(decoding.temperature))
        if decoding.top_p < 1.0:
            warp.append(TopPLogitsWarper(decoding.top_p))
        scores = warp(torch.empty(0), scores)
    return scores


@torch.no_grad()
def write(language_model: LanguageModel, reading: Reading, logits: Tensor, decoding: Decoding) -> Tensor:
    """Text after each prompt that was read.

    Args:
        language_model: the frozen LLM.
        reading, logits: what its `start` gave for B rows.
        decoding: of all rows.

    Returns:
        New token ids (B * R, T), R = `decoding.num_return_sequences`, those of a prompt side by side, the likeliest
        first where they come of beams; after a row's stop token padded on the right.
    """
    if decoding.num_beams > 1:
        return _BeamSearch(language_model, reading, logits, decoding).run()
    if decoding.num_return_sequences > 1:
        repeated = torch.arange(len(logits), device=logits.device).repeat_interleave(decoding.num_return_sequences)
        reading.select(repeated)
        logits = logits[repeated]
    writer = Writer(language_model)
    rows = writer.add(reading, logits, [decoding] * len(logits))
    while writer.rows:
        writer.step()
    return _stacked([row.token_ids for row in rows], language_model.pad_id, logits.device)


def _stacked(texts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> Tensor:
    length = max(map(len, texts), default=0)
    return torch.tensor([[*text, *[pad_id] * (length - len(text))] for text in texts], dtype=torch.long, device=device)


@dataclass(order=True)
class _Ended:
    """A text that came to its end in a beam."""

    score: float
    token_ids: tuple[int, ...] = field(compare=False)


class _BeamSearch:
    """The likeliest texts, K beams for each prompt, as transformers searches with `early_stopping=False`.

    A prompt ends when no beam can overtake the worst of its K finished texts any more, or at the greatest length.
    """

    def __init__(self, language_model: LanguageModel, reading: Reading, logits: Tensor, decoding: Decoding) -> None:
        self.language_model = language_model
        self.decoding = decoding
        self.reading = reading
        self.logits = logits  # (B, V) first, (B * K, V) then
        self.start_ids: list[list[int]] = reading.written.tolist()
        self.prompts = list(range(len(logits)))  # those that are not done
        self.ended: list[list[_Ended]] = [[] for _ in self.prompts]
        self.beams: list[list[tuple[float, list[int]]]] = [[(0.0, [])] for _ in self.prompts]

    def run(self) -> Tensor:
        """(B * R, T) as `write` gives them."""
        for length in range(1, self.decoding.max_new_tokens + 1):
            chosen = self._extend(length)
            if not self.prompts:
                break
            rows, token_ids = zip(*chosen, strict=True)
            device = self.logits.device
            self.reading.select(torch.tensor(rows, device=device))
            self.logits = self.language_model.step(self.reading, torch.tensor(token_ids, device=device))
        count = self.decoding.num_return_sequences
        best = [ended for texts in self.ended for ended in texts[:count]]
        return _stacked([ended.token_ids for ended in best], self.language_model.pad_id, self.logits.device)

    def _extend(self, length: int) -> list[tuple[int, int]]:
        """Makes every beam one token longer; gives, for each that goes on, its row until now and its new token."""
        num_beams, stop_ids = self.decoding.num_beams, self.language_model.stop_ids
        totals = self._totals()  # one (rows * V,) for each prompt
        goes_on, chosen, first_row = [], [], 0
        for prompt, (scores, places) in zip(self.prompts, totals, strict=True):
            beams = self.beams[prompt]
            vocabulary = self.logits.shape[1]
            running, ended = [], self.ended[prompt]
            for rank, (score, place) in enumerate(zip(scores, places, strict=True)):
                beam, token_id = divmod(place, vocabulary)
                beam = min(beam, len(beams) - 1)  # in the first step all are one, and the rest is drawn if all else is
                text = [*beams[beam][1], token_id]
                is_end = token_id in stop_ids or length == self.decoding.max_new_tokens
                running.append((score + (NEVER if is_end else 0.0), text, first_row + beam))
                if is_end and rank < num_beams:  # only what is among the best counts as finished
                    ended.append(_Ended(_penalised(score, length, self.decoding.length_penalty), tuple(text)))
            first_row += len(beams)
            ended.sort(reverse=True)  # stable: of equal ones the earlier stays first
            del ended[num_beams:]
            running = sorted(running, key=lambda one: one[0], reverse=True)[:num_beams]
            if length == self.decoding.max_new_tokens or self._is_settled(ended, running[0][0], length):
                continue
            goes_on.append(prompt)
            self.beams[prompt] = [(score, text) for score, text, _ in running]
            chosen += [(row, text[-1]) for _, text, row in running]
        self.prompts = goes_on
        return chosen

    def _is_settled(self, ended: Sequence[_Ended], best_running: float, length: int) -> bool:
        if len(ended) < self.decoding.num_beams:
            return False
        return _penalised(best_running, length, self.decoding.length_penalty) <= ended[-1].score

    def _totals(self) -> list[tuple[list[float], list[int]]]:
        """For each prompt the best continuations of its beams: summed log-probabilities, places (beam * V + token)."""
        decoding, stop_ids = self.decoding, self.language_model.stop_ids
        beams = [beam for prompt in self.prompts for beam in self.beams[prompt]]
        written = [[*self.start_ids[prompt], *text] for prompt in self.prompts for _, text in self.beams[prompt]]
        log_probs = self.logits.log_softmax(dim=-1)
        log_probs = _processed(log_probs, written, [len(text) for _, text in beams], decoding, stop_ids)
        sums = log_probs + torch.tensor([score for score, _ in beams], device=log_probs.device)[:, None]
        sums = sums.unflatten(0, (len(self.prompts), -1)).flatten(1)  # (prompts, rows each * V)
        count = max(2, 1 + len(stop_ids)) * decoding.num_beams
        count = min(count, sums.shape[1])
        if decoding.do_sample:
            # As many columns in the first step as in later ones: so the draws are transformers' for the same seed.
            missing = decoding.num_beams * log_probs.shape[1] - sums.shape[1]
            sums = torch.nn.functional.pad(sums, (0, missing), value=NEVER)
            places = torch.multinomial(sums.softmax(dim=-1), num_samples=count)
            scores = sums.gather(1, places)
        else:
            scores, places = sums.topk(count)
        return list(zip(scores.tolist(), places.tolist(), strict=True))


def _penalised(score: float, length: int, length_penalty: float) -> float:
    return score / length**length_penalty
