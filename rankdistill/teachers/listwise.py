"""A language model that reads a window of passages and puts them in order, as teacher (RankGPT, Sun et al. 2023,
arXiv:2304.09542; FIRST, Gangi Reddy et al. 2024, arXiv:2406.15657).

The windows of one list are asked one after another, for each depends on the order that the ones before it gave; those
of different queries, and of the several orders in which a list is shown, are asked together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from rankdistill.errors import RankdistillError, UsageError
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
from rankdistill.students.models import resolve_model
from rankdistill.teachers.base import Dev, TextList, check_finite
from rankdistill.teachers.listwise_training import ListwiseTraining, fine_tune, orders_fingerprint
from rankdistill.teachers.llm.answers import REPAIRS, read_answer
from rankdistill.teachers.llm.asking import AskingTeacher
from rankdistill.teachers.llm.base import Answer, Decoding, Request
from rankdistill.teachers.llm.local import TransformersBackend
from rankdistill.teachers.llm.prompts import Prompt, fit_passages, load_prompt
from rankdistill.teachers.llm.windows import reorder, windows
from rankdistill.teachers.reports import added

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
        queries_at_once: lists that are asked together, each in all its orders.
        train: fine-tune the backend's model (transformers) on another teacher's orders first, see ListwiseTraining.
    """

    type = "listwise"
    reads_lists = True

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
        passage_tokens: int = 200,
        prompt_tokens: int | None = None,
        temperature: float = 0.0,
        max_tokens: int | None = None,
        seed: int = 0,
        queries_at_once: int = 16,
        budget: str | float | None = None,
        prices: dict[str, float] | None = None,
        train: ListwiseTraining | None = None,
    ) -> None:
        super().__init__(backend, budget, prices)
        self._backend = dict(backend)
        self.training = ListwiseTraining.model_validate(train) if train is not None else None
        self._is_trained = False
        self.prompt_name = prompt or ("listwise_letters" if decoding == "first" else "listwise")
        self.prompt: Prompt = load_prompt(self.prompt_name, "listwise")
        self.window, self.step, self.passes = window, step, passes
        self.decoding: Decoding = decoding
        self.orders: list[Order] = list(orders)
        self.signal: Signal = signal
        self.confidence = confidence
        self.passage_tokens, self.prompt_tokens, self.max_tokens = passage_tokens, prompt_tokens, max_tokens
        self.temperature, self.seed = temperature, seed
        self.queries_at_once = queries_at_once
        self._check()
        self.score_kind: ScoreKind = "logit" if signal in ("logits", "plackett_luce") else "rank"
        self._report: dict[str, Any] = {}

    def _check(self) -> None:
        """Refuse settings that cannot be kept, before anything is paid for."""
        if self.training is not None and not isinstance(self.asking.backend, TransformersBackend):
            raise UsageError(
                f"a model behind the backend {self.asking.backend.type} is not trained here",
                where="teacher.train",
                fix="backend: {type: transformers, model: ...}",
            )
        windows(2 * self.window, self.window, self.step, self.passes)
        self.prompt.names(self.window)
        self.asking.backend.check(self.decoding)
        for name in ("passage_tokens", "queries_at_once"):
            if getattr(self, name) < 1:
                raise UsageError(f"{getattr(self, name)} is too few", where=f"teacher.{name}", fix="at least 1")
        if not self.orders:
            raise UsageError("no order", where="teacher.orders", fix=f"some of {', '.join(get_args(Order))}")
        if self.temperature < 0:
            raise UsageError(f"a temperature of {self.temperature}", where="teacher.temperature", fix="0 or above")
        if self.decoding == "first" and (self.temperature or self.max_tokens):
            name = "temperature" if self.temperature else "max_tokens"
            raise UsageError(f"decoding: first reads one step and has no {name}", where=f"teacher.{name}")
        repeated = [order for order in ("given", "reversed") if self.orders.count(order) > 1]
        if repeated and not self.temperature:
            raise UsageError(
                f"the order {repeated[0]} twice at temperature 0 gives the same answers twice",
                where="teacher.orders",
                fix="shuffled, or a temperature above 0",
            )
        if self.signal == "logits" and (self.decoding != "first" or self.step == self.window):
            raise UsageError(
                "logits are read in one step, from windows that overlap",
                where="teacher.signal",
                fix="decoding: first and a step below the window, or a signal from the ranks",
            )
        if (self.signal == "plackett_luce" or self.confidence) and len(self.orders) < 2:
            name = "confidence" if self.confidence else "plackett_luce"
            raise UsageError(
                f"{name} is read from several orders of a list",
                where="teacher.orders",
                fix="e.g. orders: [given, reversed, shuffled]",
            )

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
            "prompt": self.prompt.fingerprint(),
        }

    def train(
        self,
        collection: Collection,
        candidates: Iterable[tuple[str, Sequence[str], np.ndarray]],
        out: Path,
        seed: int,
        split: str = "train",
        dev: Dev | None = None,
    ) -> dict[str, Any]:
        """Fine-tune the backend's model on the orders that `train` names, whatever their queries' split."""
        backend, training = self._local()
        counts = fine_tune(
            resolve_model(backend.model_name).path,
            training,
            collection,
            Path(out),
            prompt=self.prompt,
            window=self.window,
            passage_tokens=self.passage_tokens,
            chat_template=backend.chat_template,
            template_options=backend.template_options,
            device=backend.device_name,
            seed=seed,
        )
        self.use_trained(out)
        return counts

    def use_trained(self, folder: Path) -> None:
        self.asking.use_backend({**self._backend, "model": str(folder)})
        self._is_trained = True

    def _local(self) -> tuple[TransformersBackend, ListwiseTraining]:
        if self.training is None or not isinstance(self.asking.backend, TransformersBackend):
            raise UsageError("this listwise model has no `train` settings", where="teacher.train")
        return self.asking.backend, self.training

    # -- what it is ---------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        if self.needs_training:
            raise RankdistillError("this listwise model must be trained before it teaches", fix="call train() first")
        return super().fingerprint()

    def _settings(self) -> dict[str, Any]:
        """What decides the scores beside the engine."""
        random = "shuffled" in self.orders or self.temperature > 0
        return {
            "type": self.type,
            "prompt": self.prompt.fingerprint(),
            "window": self.window,
            "step": self.step,
            "passes": self.passes,
            "decoding": self.decoding,
            "orders": self.orders,
            "signal": self.signal,
            "confidence": self.confidence,
            "passage_tokens": self.passage_tokens,
            "prompt_tokens": self.prompt_tokens,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed if random else None,
        }

    def describe(self) -> dict[str, Any]:
        template = self.prompt.model_dump()
        return {**self._settings(), "prompt": template, "backend": self.asking.backend.describe()}

    def score(self, lists: Sequence[TextList]) -> Iterator[tuple[str, list[str], np.ndarray]]:
        """Scores of each list as it is ready, which need not be in the order given.

        Raises:
            BudgetReached: the lists that were ready have been yielded; the answers of the others are kept.
        """
        for start in range(0, len(lists), self.queries_at_once):
            yield from self._score_together(lists[start : start + self.queries_at_once])

    def _score_together(self, lists: Sequence[TextList]) -> Iterator[tuple[str, list[str], np.ndarray]]:
        jobs = [_Job(self, item) for item in lists if item.doc_ids]
        for job in jobs:
            if job.done:
                yield from job.result()
        chains = [chain for job in jobs for chain in job.chains]
        while active := [chain for chain in chains if not chain.done]:
            for number, answer in self.asking.ask([(at, chain.request()) for at, chain in enumerate(active)]):
                chain = active[number]
                chain.take(answer)
                if chain.job.done:
                    yield from chain.job.result()

    # -- what was counted ---------------------------------------------------------------------------------------------

    def take_report(self) -> dict[str, Any]:
        report, self._report = self._report, {}
        return report

    def report_lines(self, report: dict[str, Any]) -> list[str]:
        return report_lines(report)


class _Job:
    """One list: its distinct texts, and a chain of windows for each order it is shown in."""

    def __init__(self, teacher: ListwiseTeacher, item: TextList) -> None:
        self.teacher, self.item = teacher, item
        # An id that comes twice is one document; ids of one text are shown once.
        texts: dict[str, int] = {}
        self.documents = {d: texts.setdefault(text, len(texts)) for d, text in zip(item.doc_ids, item.documents)}
        self.refused = False
        self.report = report = _Report()  # handed on with the scores: a list without them is asked again
        report.counts["lists"] += 1
        report.counts["same_text"] += len(self.documents) - len(texts)
        self.query = ""
        self.passages: list[str] = []
        self.logits: list[tuple[list[int], np.ndarray]] = []
        plan = windows(len(texts), teacher.window, teacher.step, teacher.passes)
        if plan:
            count = teacher.asking.backend.count_text
            self.passages, cut = fit_passages(list(texts), teacher.passage_tokens, count, teacher.prompt.delimiters)
            (self.query,), long = fit_passages([item.query], teacher.passage_tokens, count, teacher.prompt.delimiters)
            report.counts["queries_cut"] += long
            report.counts["passages"] += len(texts)
            report.counts["passages_cut"] += cut
        self.count = len(texts)
        self.chains = [_Chain(self, number, order, plan) for number, order in enumerate(teacher.orders)]

    @property
    def done(self) -> bool:
        return all(chain.done for chain in self.chains)

    def result(self) -> Iterator[tuple[str, list[str], np.ndarray]]:
        """The list's scores; none where no answer said anything of them."""
        teacher, chains = self.teacher, [chain for chain in self.chains if chain.readable or not chain.plan]
        orders = [chain.ranking for chain in chains]
        if self.refused or not orders or (teacher.confidence and len(orders) < 2):
            return
        self._count(chains)
        teacher._report = added(teacher._report, self.report.to_json())
        if teacher.signal == "logits":
            scores = joined_logits(self.logits, self.count)
        elif teacher.signal == "plackett_luce":
            scores = plackett_luce(orders, self.count)
        else:
            scores = mean_rank_scores(orders, self.count, teacher.signal)
        if teacher.confidence:
            scores = scores * max(0.0, agreement(orders))
        doc_ids = list(self.documents)
        values = scores[list(self.documents.values())].astype(np.float32)
        check_finite(self.item.query_id, doc_ids, values, teacher.type)
        yield self.item.query_id, doc_ids, values

    def _count(self, chains: list[_Chain]) -> None:
        report, orders = self.report, [chain.ranking for chain in chains]
        if len(orders) > 1 and self.count > 1:
            report.agreement += agreement(orders)
            report.counts["agreement_lists"] += 1
            # The first window of every chain holds the same passages.
            firsts = [chain.first for chain in chains]
            report.bias.add_repeats(np.stack([shown for shown, _ in firsts]), np.stack([place for _, place in firsts]))


class _Chain:
    """The windows of a list, one after another, shown in one order."""

    def __init__(self, job: _Job, number: int, order: Order, plan: list[tuple[int, int]]) -> None:
        self.job, self.number, self.order, self.plan = job, number, order, plan
        self.ranking = list(range(job.count))
        self.position = 0
        self.readable = False  # an answer said something of the list
        self.first: tuple[np.ndarray, np.ndarray]  # of the first window, by passage: place shown, place answered
        self._asked: tuple[Request, list[int]]

    @property
    def done(self) -> bool:
        return self.position >= len(self.plan) or self.job.refused

    def request(self) -> Request:
        """What the next window is asked."""
        teacher = self.job.teacher
        start, end = self.plan[self.position]
        names = (self.job.item.query, self.number, self.position)
        shown = shown_order(self.order, end - start, teacher.seed, *names)
        passages = [self.job.passages[self.ranking[start + at]] for at in shown]
        self._asked = teacher_request(teacher, self.job.query, passages, self.number, self.job.report.counts), shown
        return self._asked[0]

    def take(self, answer: Answer) -> None:
        """Put the window in the order of its answer."""
        teacher, (request, shown) = self.job.teacher, self._asked
        reading = read_answer(answer, request, teacher.prompt)
        teacher.asking.see(answer, reading.readable)
        self.readable |= reading.readable
        if answer.refused:
            self.job.refused = True
            return
        start, _ = self.plan[self.position]
        if reading.logits is not None and reading.readable:
            self.job.logits.append(([self.ranking[start + at] for at in shown], reading.logits))
        if self.position == 0:
            places, answered = np.empty(len(shown)), np.empty(len(shown))
            places[shown] = np.arange(len(shown))
            answered[[shown[at] for at in reading.order]] = np.arange(len(shown))
            self.first = places, answered
        reorder(self.ranking, start, [shown[at] for at in reading.order])
        self.position += 1
        report = self.job.report
        report.counts["answers"] += 1
        report.counts["clean"] += not reading.repairs
        report.repairs.update(reading.repairs)
        report.bias.add(reading.order)


def teacher_request(
    teacher: ListwiseTeacher, query: str, passages: list[str], number: int, counts: Counter[str]
) -> Request:
    """A window's request, its passages cut further where the whole prompt would be too long, which is counted.

    Raises:
        UsageError: the prompt is too long even with passages of a token.
    """

    def render() -> Request:
        return teacher.prompt.render(
            query,
            passages,
            decoding=teacher.decoding,
            temperature=teacher.temperature,
            seed=teacher.seed + number if teacher.temperature else 0,
            max_tokens=teacher.max_tokens,
        )

    request, backend = render(), teacher.asking.backend
    if teacher.prompt_tokens is None or backend.count_tokens(request) <= teacher.prompt_tokens:
        return request
    counts["prompts_shortened"] += 1
    tokens = min(teacher.passage_tokens, max(backend.count_text(passages)))
    while (excess := backend.count_tokens(request) - teacher.prompt_tokens) > 0:
        if tokens <= 1:
            raise UsageError(
                f"a prompt of {len(passages)} passages is longer than {teacher.prompt_tokens:,} tokens without any "
                "text of the passages",
                where="teacher.prompt_tokens",
                fix="more of them, or a window of fewer passages",
            )
        tokens = max(1, tokens - max(1, excess // len(passages)))
        passages, _ = fit_passages(passages, tokens, backend.count_text, teacher.prompt.delimiters)
        request = render()
    return request


class _Report:
    """What is counted while scoring: sums alone, so that reports add up."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.repairs: Counter[str] = Counter()
        self.agreement = 0.0
        self.bias = PositionBias()

    def to_json(self) -> dict[str, Any]:
        return {
            "counts": {name: count for name, count in self.counts.items() if count},
            "repairs": dict(self.repairs),
            "agreement_sum": self.agreement,
            "position": self.bias.to_json(),
        }


def report_lines(report: dict[str, Any]) -> list[str]:
    """For a person: answers, how many were repaired and how, agreement of the orders, and position bias."""
    counts: Counter[str] = Counter(report.get("counts", {}))
    if not counts["answers"]:
        return []
    answers, clean = counts["answers"], counts["clean"]
    lines = [
        f"{counts['lists']:,} lists, {answers:,} answers, {clean:,} of them ({clean / answers:.0%}) needed no repair"
    ]
    lines += [f"  {count:,} {REPAIRS[kind]}" for kind, count in sorted(report["repairs"].items(), key=lambda x: -x[1])]
    for name, text in (
        ("passages_cut", "passages were cut to their token budget"),
        ("queries_cut", "queries were cut to the same"),
        ("prompts_shortened", "prompts were shortened further"),
        ("same_text", "documents have the text of another one and share its score"),
    ):
        if counts[name]:
            lines.append(f"  {counts[name]:,} {text}")
    if counts["agreement_lists"]:
        lines.append(
            f"agreement of the orders (Kendall's τ): {report['agreement_sum'] / counts['agreement_lists']:.3f}"
        )
    bias = PositionBias(**report["position"])
    places = [place for place in bias.places() if place is not None]
    if bias.effect is not None:
        lines.append(f"position bias: shown a place later, a passage falls {bias.effect:+.3f} places in the answer")
    if len(places) > 1:
        half = len(places) // 2
        first, last = (float(np.mean(part)) for part in (places[:half], places[-half:]))
        lines.append(
            f"mean place in the answer (0 first, 1 last): {first:.2f} if shown in the first half, else {last:.2f}"
        )
    return lines
