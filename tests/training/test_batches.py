"""The training stream: a pure function of the batch number, each distinct document of a batch once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from rankdistill.recipe import build
from rankdistill.students.base import cut
from rankdistill.training.batches import BatchStream, usable_lists, whole

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.scores.lists import ScoredLists

MakeStream = Callable[..., BatchStream]


@pytest.fixture
def make_stream(lists: ScoredLists, tiny_collection: Collection, tiny_encoder: Path, tmp_path: Path) -> MakeStream:
    student = build("student", {"type": "dense", "model": str(tiny_encoder), "similarity": "dot"}).create("cpu").eval()

    def make(
        size: int = 4,
        documents: int = 6,
        seed: int = 1,
        length: int = 20,
        token_budget: int = 128,
        topics: bool = False,
    ) -> BatchStream:
        model = {"clusters": 2, "model": str(tiny_encoder)} if topics else {}
        batches = build("sampler", {"type": "topic_batches" if topics else "random_batches", "size": size, **model})
        chosen = build("sampler", {"type": "balanced_pairs" if topics else "random_documents", "size": documents})
        members = usable_lists(lists, chosen)
        batches.prepare(lists, members, tiny_collection, tmp_path)
        return BatchStream(lists, tiny_collection, student, batches, chosen, seed, length, token_budget, members)

    return make


def token_rows(item: dict[str, Any]) -> list[tuple[int, ...]]:
    """The token ids of every document of a batch, without padding."""
    return [
        tuple(ids[mask.bool()].tolist())
        for part in item["documents"]
        for ids, mask in zip(part["input_ids"], part["attention_mask"], strict=True)
    ]


def test_each_distinct_document_is_in_a_batch_once(make_stream: MakeStream) -> None:
    stream = make_stream()
    for number in range(len(stream)):
        item = stream[number]
        rows = token_rows(item)
        assert len(set(rows)) == len(rows)
        assert sorted(np.unique(item["index"])) == list(range(len(rows)))
    assert any(len(token_rows(stream[number])) < stream[number]["index"].numel() for number in range(20))


def test_index_labels_and_scores_belong_to_the_documents(
    make_stream: MakeStream, lists: ScoredLists, tiny_collection: Collection
) -> None:
    stream = make_stream()
    for number in (0, 7, 19):
        item = stream[number]
        _, members = stream.locate(number)
        rows = token_rows(item)
        for place, member in enumerate(members):
            query_id, doc_rows, scores, relevance = lists[int(member)]
            query = stream.student.preprocess(tiny_collection.query_texts([query_id]), "query")["input_ids"][0]
            assert item["queries"]["input_ids"][place][: len(query)].tolist() == query.tolist()
            of_score = {round(float(score), 5): at for at, score in enumerate(scores)}
            for column in range(item["index"].shape[1]):
                at = of_score[round(float(item["teacher_scores"][place, column]), 5)]
                assert item["relevance"][place, column] == relevance[at]
                text = tiny_collection.document_texts([int(doc_rows[at])])
                wanted = stream.student.preprocess(text, "document")["input_ids"][0]
                assert rows[int(item["index"][place, column])] == tuple(wanted.tolist())
        assert (item["relevance"][:, 0] > 0).all() and item["mask"].all()


def test_parts_stay_within_the_token_budget(make_stream: MakeStream) -> None:
    few, many = make_stream(token_budget=64)[0]["documents"], make_stream(token_budget=4096)[0]["documents"]
    assert len(few) > len(many)
    assert all(part["input_ids"].numel() <= 64 for part in few)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.equal(right)
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.mark.parametrize("topics", [False, True])
def test_the_stream_is_the_same_in_any_order_and_for_any_number_of_workers(
    make_stream: MakeStream, topics: bool
) -> None:
    """So a resumed training, which makes its stream anew and begins in the middle, reads the same batches."""
    stream = make_stream(length=8, size=2, topics=topics)
    in_order = [stream[number] for number in range(8)]
    backwards = make_stream(length=8, size=2, topics=topics)
    assert all(same(backwards[number], in_order[number]) for number in reversed(range(8)))
    loader: Any = torch.utils.data.DataLoader(stream, batch_size=1, collate_fn=whole, num_workers=2)  # type: ignore[arg-type]
    assert all(map(same, loader, in_order))
    assert not same(make_stream(seed=2, size=2, topics=topics)[0], in_order[0])


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("topics", [False, True])
def test_epochs_follow_each_other_and_no_query_comes_twice_in_one(
    make_stream: MakeStream, lists: ScoredLists, processes: int, topics: bool
) -> None:
    """Process r of W has the batches i·W + r, each from a stream of its own: together they are the one stream."""
    streams = [make_stream(size=4, topics=topics) for _ in range(processes)]
    stream, an_epoch = streams[0], len(lists) // 4
    places = [streams[number % processes].locate(number) for number in range(3 * an_epoch)]
    assert [epoch for epoch, _ in places] == [epoch for epoch in range(3) for _ in range(an_epoch)]
    for epoch in range(3):
        used = np.concatenate([members for at, members in places if at == epoch])
        assert len(set(used.tolist())) == len(used)
    with pytest.raises(IndexError):
        stream[len(stream)]


def test_lists_of_unequal_length_are_padded_and_masked(
    make_stream: MakeStream, tiny_collection: Collection, tmp_path: Path
) -> None:
    """A list of three documents beside one of eight: the pads point at a document that is in the batch anyway."""
    from rankdistill.scores.lists import build_lists

    everything = tiny_collection.doc_ids(range(8))
    candidates = [
        (query_id, everything[:length], np.zeros(length))
        for query_id, length in zip(tiny_collection.query_ids("train")[:2], (3, 8), strict=True)
    ]
    unequal = build_lists(
        candidates, lambda q, d: np.arange(len(d)) + 0.5, tiny_collection, "train", tmp_path / "lists"
    )
    stream = make_stream(size=2, documents=8)
    stream.lists, stream.members = unequal, np.arange(len(unequal))
    item = stream[0]
    assert sorted(item["mask"].sum(1).tolist()) == [3, 8]
    assert len(token_rows(item)) == 8
    short = int(item["mask"].sum(1).argmin())
    assert (item["relevance"][short, 3:] == -1).all() and not item["teacher_scores"][short, 3:].any()


def test_fewer_lists_than_a_batch_make_one_batch_of_all(make_stream: MakeStream, lists: ScoredLists) -> None:
    stream = make_stream(size=64)
    assert len(stream[0]["queries"]["input_ids"]) == len(lists)
    assert stream.locate(3)[0] == 3


@pytest.mark.parametrize("side", ["right", "left"])
def test_documents_are_cut_to_their_first_tokens(side: str) -> None:
    lengths, longest = [7, 3, 5], 7
    ids, mask = torch.zeros(3, longest, dtype=torch.int64), torch.zeros(3, longest, dtype=torch.int64)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(longest - length, None)
        ids[row, place], mask[row, place] = torch.arange(1, length + 1), 1
    made = cut({"input_ids": ids, "attention_mask": mask, "other": ["as", "it", "is"]}, 4)
    kept = [row[counts.bool()].tolist() for row, counts in zip(made["input_ids"], made["attention_mask"], strict=True)]
    assert kept == [[1, 2, 3, 4], [1, 2, 3], [1, 2, 3, 4]] and made["other"] == ["as", "it", "is"]
    assert cut({"input_ids": ids, "attention_mask": mask}, None)["input_ids"] is ids
