"""A language model that reads a window of passages and puts them in order, as teacher (RankGPT, Sun et al. 2023,
arXiv:2304.09542; FIRST, Gangi Reddy et al. 2024, arXiv:2406.15657).

Windows go from the end of the list to its beginning. The best of each lie in the next one too, so that a good document
travels to the front however deep it began.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.recipe import build
from rankdistill.scores.rank_scores import (
    Order,
    PositionBias,
    RankFunction,
    agreement,
    joined_logits,
    mean_rank_scores,
    plackett_luce,
    shown_order,
)
from rankdistill.scores.store import ScoreKind
from rankdistill.teachers.base import Candidates, Dev, TextList
from rankdistill.teachers.listwise_training import ListwiseTraining, orders_fingerprint, train_listwise
from rankdistill.teachers.llm.answers import REPAIRS
from rankdistill.teachers.llm.asking import AskingTeacher, Talk, numbered
from rankdistill.teachers.llm.base import Decoding, Request
from rankdistill.teachers.llm.local import TransformersBackend
from rankdistill.teachers.llm.prompts import fit_passages

if TYPE_CHECKING:
    from rankdistill.collections import Collection

Signal = Literal[RankFunction, "plackett_luce", "logits"]


class ListwiseTeacher(AskingTeacher):
    """A listwise language model.

    A document's score depends on the list it is in, so a list is scored whole or not at all (see `reads_lists`).
    Documents with the same text are shown once and share a score. A list of one document is not asked for. A list
    none of whose answers could be read, or of which a prompt was refused, gets no score; of several orders those count
    that have an answer.

    Args:
        prompt: a template of kind listwise: a file, or a shipped name; by default listwise_letters for decoding first,
            else listwise.
        window: passages a prompt.
        step: by how much a window is nearer to the beginning than the one before it.
        passes: how often the windows go over the list.
        decoding: generate: free text, repaired by rules; first: one step, the identifiers' logits; constrained: only
            identifiers that are left may be generated.
        orders: in which orders each window is shown; the list is ranked once for each: given, reversed, shuffled.
        signal: the score. From the rank, averaged over `orders`: reciprocal 1/r, log ln(n/r), ndcg_gain 1/log2(1+r),
            none −r; plackett_luce: strengths fitted to the several orders; logits: the model's own (decoding: first),
            windows brought to one scale.
        confidence: multiply a list's scores by how far its orders agree (Kendall's τ, at least 0): less is learnt from
            lists of which the model is not sure.
        prompt_tokens: passages are cut further until a prompt has at most so many tokens; null: no such limit.
        temperature: of the sampling; 0 always takes the likeliest.
        max_tokens: of an answer; by default enough for a whole ranking.
        seed: of shuffled orders and of the sampling.
        train: fine-tune the backend's model (transformers) on another teacher's orders first, see ListwiseTraining.
    """

    type = "listwise"
    kind = "listwise"
    reads_lists = True
    counted = {
        "passages_cut": "passages were cut to their token budget",
        "queries_cut": "queries were cut to the same",
        "prompts_shortened": "prompts were shortened further",
        "same_text": "documents have the text of another one and share its score",
    }

    def __init__(
        self,
        backend: dict[str, Any],
        prompt: str | None = None,
        window: int = 20,
        step: int = 10,
        passes: int = 1,
        decoding: Decoding = "generate",
        orders: Sequence[Order] = ("given",),
        signal: Signal = "reciprocal",
        confidence: bool = False,
        prompt_tokens: int | None = None,
        temperature: float = 0.0,
        max_tokens: int | None = None,
        seed: int = 0,
        train: ListwiseTraining | None = None,
        **asking: Any,
    ) -> None:
        self.decoding = decoding
        super().__init__(backend, prompt or ("listwise_letters" if decoding == "first" else "listwise"), **asking)
        self.training = ListwiseTraining.model_validate(train) if train is not None else None
        self._is_trained = False
        self.window, self.step, self.passes = window, step, passes
        self.orders: list[Order] = list(orders)
        self.signal: Signal = signal
        self.confidence = confidence
        self.prompt_tokens, self.max_tokens = prompt_tokens, max_tokens
        self.temperature, self.seed = temperature, seed
        self._check()
        self.score_kind: ScoreKind = "logit" if signal in ("logits", "plackett_luce") else "rank"

    def _check(self) -> None:
        """Refuse settings that cannot be kept, before anything is paid for."""
        one_step, several = self.decoding == "first", len(self.orders) > 1
        twice = next((order for order in ("given", "reversed") if self.orders.count(order) > 1), "")
        drawn = "temperature" if self.temperature else "max_tokens"
        engine = self.asking.backend
        wrong = {  # what → whether it is, the key, what to do
            f"a model behind the backend {engine.type} is not trained here": (
                self.training is not None and not isinstance(engine, TransformersBackend),
                "train",
                "backend: {type: transformers, model: ...}",
            ),
            "no order": (not self.orders, "orders", f"some of {', '.join(get_args(Order))}"),
            f"decoding: first reads one step and has no {drawn}": (
                one_step and (self.temperature or self.max_tokens),
                drawn,
                "leave it out",
            ),
            f"the order {twice} twice at temperature 0 gives the same answers twice": (
                twice and not self.temperature,
                "orders",
                "shuffled, or a temperature above 0",
            ),
            "logits are read in one step, from windows that overlap": (
                self.signal == "logits" and (not one_step or self.step == self.window),
                "signal",
                "decoding: first and a step below the window, or a signal from the ranks",
            ),
            "plackett_luce and confidence are read from several orders of a list": (
                (self.signal == "plackett_luce" or self.confidence) and not several,
                "orders",
                "e.g. orders: [given, reversed, shuffled]",
            ),
        }
        for what, (holds, key, fix) in wrong.items():
            if holds:
                raise UsageError(what, where=f"teacher.{key}", fix=fix)
        windows(2 * self.window, self.window, self.step, self.passes)
        self.template.names(self.window)

    # -- training -----------------------------------------------------------------------------------------------------

    @property
    def needs_training(self) -> bool:
        return self.training is not None and not self._is_trained

    def training_inputs(self) -> dict[str, Any]:
        backend, training = self._local()
        return {
            **dict.fromkeys(("budget", "prices", "queries_at_once", "signal", "orders", "confidence"), None),
            "backend": backend.fingerprint(),
            "train": {**training.model_dump(), "orders": orders_fingerprint(training.orders)},
            "prompt": self.template.fingerprint(),
        }

    def train(
        self,
        collection: Collection,
        candidates: Candidates,
        out: Path,
        seed: int,
        split: str = "train",
        dev: Dev | None = None,
    ) -> dict[str, Any]:
        """Fine-tune the backend's model on the orders that `train` names, whatever their queries' split."""
        backend, training = self._local()
        counts = train_listwise(
            backend.model,
            collection,
            out,
            training,
            prompt=self.template,
            window=self.window,
            passage_tokens=self.passage_tokens,
            chat_template=backend.chat_template,
            template_options=backend.template_options,
            device=backend.device,
            seed=seed,
        )
        self.use_trained(out)
        return counts

    def use_trained(self, folder: Path) -> None:
        self.asking.backend = build("backend", {**self.backend, "model": str(folder)}, "teacher.backend")
        self._is_trained = True

    def _local(self) -> tuple[TransformersBackend, ListwiseTraining]:
        if self.training is None or not isinstance(self.asking.backend, TransformersBackend):
            raise UsageError("this listwise model has no `train` settings", where="teacher.train")
        return self.asking.backend, self.training

    # -- scoring ------------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        if self.needs_training:
            raise RankdistillError("this listwise model must be trained before it teaches", fix="call train() first")
        return super().fingerprint()

    def _settings(self) -> dict[str, Any]:
        names = (
            "window", "step", "passes", "decoding", "orders", "signal", "confidence", "passage_tokens", "prompt_tokens",
            "temperature", "max_tokens",
        )  # fmt: skip
        random = "shuffled" in self.orders or self.temperature > 0
        return {**{name: getattr(self, name) for name in names}, "seed": self.seed if random else None}

    def _talk(self, item: TextList) -> Talk:
        texts, places = numbered(item)
        count, plan = len(texts), windows(len(texts), self.window, self.step, self.passes)
        counts = Counter(lists=1, same_text=len(places) - count)
        repairs: Counter[str] = Counter()
        bias = PositionBias()
        if plan:
            passages, cut = self._fitted(texts)
            (query,), long = self._fitted([item.query])
            counts.update(queries_cut=long, passages=count, passages_cut=cut)
        rankings = [list(range(count)) for _ in self.orders]
        readable = [not plan] * len(rankings)  # an answer said something of the list
        logits: list[tuple[list[int], np.ndarray]] = []
        first: list[tuple[np.ndarray, np.ndarray]] = []  # of the first window, by passage: place shown, place answered
        for position, (start, end) in enumerate(plan):
            shown = [
                shown_order(order, end - start, self.seed, item.query, number, position)
                for number, order in enumerate(self.orders)
            ]
            windowed = [ranking[start:end] for ranking in rankings]
            readings = yield [
                self._request(query, [passages[window[at]] for at in order], number, counts)
                for number, (window, order) in enumerate(zip(windowed, shown, strict=True))
            ]
            for number, (window, order, reading) in enumerate(zip(windowed, shown, readings, strict=True)):
                if reading is None or reading.refused:
                    return None
                readable[number] |= reading.readable
                if reading.logits is not None and reading.readable:
                    logits.append(([window[at] for at in order], reading.logits))
                answered = [order[at] for at in reading.order]
                if position == 0:
                    first.append((np.argsort(order), np.argsort(answered)))
                rankings[number][start:end] = [window[at] for at in answered]
                counts.update(answers=1, clean=not reading.repairs)
                repairs.update(reading.repairs)
                bias.add(reading.order)
        orders = [ranking for ranking, said in zip(rankings, readable, strict=True) if said]
        if not orders or (self.confidence and len(orders) < 2):
            return None
        agreed = 0.0
        if len(orders) > 1 and plan:
            agreed = agreement(orders)
            counts["agreement_lists"] = 1
            # The first window holds the same passages in every order.
            pairs = [pair for pair, said in zip(first, readable, strict=True) if said]
            bias.add_repeats(*(np.stack(column) for column in zip(*pairs, strict=True)))
        self._count({"counts": +counts, "repairs": repairs, "agreement_sum": agreed, "position": bias.to_json()})
        if self.signal == "logits":
            scores = joined_logits(logits, count)
        elif self.signal == "plackett_luce":
            scores = plackett_luce(orders, count)
        else:
            scores = mean_rank_scores(orders, count, self.signal)
        if self.confidence:
            scores = scores * max(0.0, agreement(orders))
        return list(places), scores[list(places.values())]

    def _request(self, query: str, passages: list[str], number: int, counts: Counter[str]) -> Request:
        """A window's request, its passages cut further where the whole prompt would be too long, which is counted."""

        def render() -> Request:
            return self.template.render(
                query,
                passages,
                decoding=self.decoding,
                temperature=self.temperature,
                seed=self.seed + number if self.temperature else 0,
                max_tokens=self.max_tokens,
            )

        request, backend = render(), self.asking.backend
        if self.prompt_tokens is None or backend.count_tokens(request) <= self.prompt_tokens:
            return request
        counts["prompts_shortened"] += 1
        tokens = min(self.passage_tokens, max(backend.count_text(passages)))
        while (excess := backend.count_tokens(request) - self.prompt_tokens) > 0:
            if tokens <= 1:
                raise UsageError(
                    f"a prompt of {len(passages)} passages is longer than {self.prompt_tokens:,} tokens without any "
                    "text of the passages",
                    where="teacher.prompt_tokens",
                    fix="more of them, or a window of fewer passages",
                )
            tokens = max(1, tokens - max(1, excess // len(passages)))
            passages, _ = fit_passages(passages, tokens, backend.count_text, self.template.delimiters)
            request = render()
        return request

    def report_lines(self, report: dict[str, Any]) -> list[str]:
        """Answers, how many were repaired and how, agreement of the orders, and position bias."""
        counts: Counter[str] = Counter(report.get("counts", {}))
        if not counts["answers"]:
            return []
        answers, clean = counts["answers"], counts["clean"]
        lines = [
            f"{counts['lists']:,} lists, {answers:,} answers, {clean:,} of them ({clean / answers:.0%}) needed no "
            "repair"
        ]
        lines += [f"  {n:,} {REPAIRS[kind]}" for kind, n in Counter(report["repairs"]).most_common()]
        lines += [f"  {line}" for line in super().report_lines(counts)]
        if counts["agreement_lists"]:
            mean = report["agreement_sum"] / counts["agreement_lists"]
            lines.append(f"agreement of the orders (Kendall's τ): {mean:.3f}")
        bias = PositionBias(**report["position"])
        if bias.effect is not None:
            lines.append(f"position bias: shown a place later, a passage falls {bias.effect:+.3f} places in the answer")
        means = [place for place in bias.places() if place is not None]
        if half := len(means) // 2:
            early, late = (float(np.mean(part)) for part in (means[:half], means[-half:]))
            lines.append(
                f"mean place in the answer (0 first, 1 last): {early:.2f} if shown in the first half, else {late:.2f}"
            )
        return lines


def windows(count: int, size: int, step: int, passes: int = 1) -> list[tuple[int, int]]:
    """Ranges [start, end) of a list of `count`, in the order in which they are asked.

    100 documents, size 20 and step 10 are 9 windows a pass. Each window holds `size` documents (or all, where there
    are fewer), the last one of a pass too: it reaches further back where `count` is not a multiple of `step`. A list
    that fits one window is one window a pass; none of no documents, and none of a single one, which needs no asking.
    """
    if not 1 <= step <= size:  # above the size, documents would be left out
        raise UsageError(
            f"a step of {step} does not fit a window of {size}", where="teacher.step", fix=f"1 to {size}, half is usual"
        )
    if count < 2:
        return []
    width = min(size, count)
    starts = [*range(count - width, 0, -step), 0]
    return [(start, start + width) for start in starts] * passes
