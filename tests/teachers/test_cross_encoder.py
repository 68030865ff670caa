from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from small_models import LONG, make_model

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.scores.store import ScoreStore
from rankdistill.students.pair_encoder import longest_first, token_ids
from rankdistill.students.token_batches import resolve_precision
from rankdistill.teachers.base import TextList
from rankdistill.teachers.cross_encoder import CrossEncoderTeacher
from rankdistill.teachers.cross_encoder_training import CrossEncoderTraining
from rankdistill.teachers.scoring import score_candidates

if TYPE_CHECKING:
    from rankdistill.collections import Collection


@pytest.fixture(scope="module")
def cross_encoder(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real cross-encoder with a random head whose logits spread over several units."""
    from sentence_transformers import CrossEncoder

    torch.manual_seed(3)
    model = CrossEncoder(str(next(tiny_encoder.rglob("config.json")).parent), num_labels=1, max_length=64, device="cpu")
    with torch.no_grad():
        for name, weight in model.model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=1.0 if "embeddings" in name or "classifier" in name else 0.2)
    folder = tmp_path_factory.mktemp("ce") / "model"
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


def opened(folder: Path, **settings: Any) -> CrossEncoderTeacher:
    return CrossEncoderTeacher(str(folder), **{"precision": "fp32", "device": "cpu", **settings})


def scores_of(teacher: CrossEncoderTeacher, lists: list[TextList]) -> np.ndarray:
    return np.concatenate([scores for _, _, scores in teacher.score(lists)])


def lists_of(collection: Collection, queries: int = 8, repeat: int = 1) -> list[TextList]:
    ids = collection.query_ids()[:queries]
    rows = list(range(collection.document_count))
    documents = [" ".join([text] * (1 + row % repeat)) for row, text in enumerate(collection.document_texts(rows))]
    documents[3] = ""
    return [
        TextList(q, text, collection.doc_ids(rows), documents)
        for q, text in zip(ids, collection.query_texts(ids), strict=True)
    ]


def predicted(folder: Path, lists: list[TextList], max_length: int | None = None, **options: Any) -> np.ndarray:
    from sentence_transformers import CrossEncoder

    peer = CrossEncoder(str(folder), device="cpu", max_length=max_length, **options)
    pairs = [(item.query, document) for item in lists for document in item.documents]
    return np.asarray(peer.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False))


@pytest.mark.parametrize("max_length", [None, 33, 20])
def test_scores_equal_those_of_predict(
    cross_encoder: Path, tiny_collection: Collection, max_length: int | None
) -> None:
    lists = lists_of(tiny_collection, repeat=7)  # some pairs are longer than the limit
    teacher = opened(cross_encoder, max_length=max_length, token_budget=512)
    scores, expected = scores_of(teacher, lists), predicted(cross_encoder, lists, max_length)
    assert teacher.load().joiner is not None and scores.dtype == np.float32 and expected.std() > 0.3
    np.testing.assert_allclose(scores, expected, atol=1e-4)


PAIRS = np.array([[q, d] for q in range(2) for d in range(4)])
TEXTS = ["w1 w2", "w3 w4 w5 w6"], [LONG, "w7", "w8 w9 w1 " * 5, f"w7 {LONG}"]


@pytest.mark.parametrize(
    ("kind", "max_length", "limit"),
    [("roberta", None, 64), ("roberta", 1024, 64), ("roberta", 20, 20), ("t5", None, 10**9), ("gpt2", None, 40)],
)
def test_pairs_are_cut_to_what_the_model_has_positions_for(
    tmp_path: Path, kind: Any, max_length: int | None, limit: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same scores as `predict` gives with that limit, alone and in a batch, by models with and without padding."""
    from sentence_transformers import CrossEncoder

    folder = make_model(tmp_path / "model", kind, "ForSequenceClassification")
    teacher = opened(folder, max_length=max_length)
    found = teacher.score_pairs(*TEXTS, PAIRS)
    assert teacher.load().limit == limit
    assert ("1,024, but model has 64 positions" in capsys.readouterr().err) == (max_length == 1024)
    peer = CrossEncoder(str(folder), device="cpu", max_length=min(limit, 1000))
    peer.tokenizer.pad_token = peer.tokenizer.pad_token or "</s>"  # asked for, though a pair alone is not padded
    pairs = [(TEXTS[0][q], TEXTS[1][d]) for q, d in PAIRS]
    wanted = [peer.predict([pair], activation_fn=torch.nn.Identity(), show_progress_bar=False)[0] for pair in pairs]
    assert np.std(wanted) > 0.01
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_length_that_leaves_no_room_for_a_pair_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "roberta", "ForSequenceClassification")
    with pytest.raises(UsageError, match=r"5 tokens leave no room .* beside 4 that frame them\n.*\n.*at least 6"):
        opened(folder, max_length=5).score_pairs(*TEXTS, PAIRS)


def test_a_model_that_pads_with_nothing_and_ends_pairs_in_its_end_token(tmp_path: Path) -> None:
    """Padding with the end token would hide the pair's own: another one is taken, and none is an error."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = make_model(tmp_path / "model", "gpt2", "ForSequenceClassification")
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    ends = TemplateProcessing(single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = ends
    tokenizer.save_pretrained(folder)
    teacher = opened(folder)
    together = teacher.score_pairs(*TEXTS, PAIRS)
    alone = [teacher.score_pairs(*TEXTS, PAIRS[at : at + 1])[0] for at in range(len(PAIRS))]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert teacher.load().model.tokenizer.pad_token == "<unk>"
    tokenizer.unk_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(RankdistillError, match="has no padding token"):
        opened(folder).load()


def test_bf16_scores_are_nearer_to_fp32_than_those_of_predict(cross_encoder: Path, tiny_collection: Collection) -> None:
    lists = lists_of(tiny_collection)
    exact, half = (scores_of(opened(cross_encoder, precision=precision), lists) for precision in ("fp32", "bf16"))
    theirs = predicted(cross_encoder, lists, model_kwargs={"dtype": torch.bfloat16})
    error = float(np.abs(half - exact).mean())
    assert 0 < error < float(np.abs(theirs - exact).mean())
    assert error < 0.05 * exact.std()  # weights at random and large: far worse than a trained model's
    assert np.corrcoef(half, exact)[0, 1] > 0.998
    # The head runs in float32: logits are not rounded to the steps of bf16.
    assert (torch.tensor(half).bfloat16().float().numpy() != half).mean() > 0.9


def test_a_model_stored_in_half_precision_scores(
    cross_encoder: Path, tiny_collection: Collection, tmp_path: Path
) -> None:
    """ModernBERT has a norm between its head's layers, which takes no float32 while its own weights are fp16."""
    from transformers import AutoTokenizer, ModernBertConfig, ModernBertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(str(cross_encoder))
    torch.manual_seed(5)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ModernBertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=128, num_labels=1, bos_token_id=None, eos_token_id=None,
        **ids, **shape,
    )  # fmt: skip
    model = ModernBertForSequenceClassification(config)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.5)
    model.half().save_pretrained(str(tmp_path))
    tokenizer.save_pretrained(str(tmp_path))
    lists = lists_of(tiny_collection, queries=3)
    expected = predicted(tmp_path, lists, model_kwargs={"dtype": torch.float32})
    for precision, allowed in (("fp32", 1e-4), ("bf16", 0.15)):
        scores = scores_of(opened(tmp_path, precision=precision), lists)
        assert np.abs(scores - expected).mean() < allowed * expected.std(), precision


def test_each_pair_is_scored_once(
    cross_encoder: Path, tiny_collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = lists_of(tiny_collection, queries=2)
    item = lists[0]._replace(doc_ids=lists[0].doc_ids * 2, documents=lists[0].documents * 2)
    teacher = opened(cross_encoder)
    asked: list[int] = []
    original = teacher.score_pairs

    def counting(queries: Any, documents: Any, pairs: np.ndarray) -> np.ndarray:
        asked.append(len(pairs))
        return original(queries, documents, pairs)

    monkeypatch.setattr(teacher, "score_pairs", counting)
    (_, ids, scores), _ = teacher.score([item, lists[1]])
    assert asked == [len({*lists[0].documents}) * 2]
    half = len(ids) // 2
    np.testing.assert_array_equal(scores[:half], scores[half:])


@pytest.mark.parametrize("room", [5, 6, 17, 40])
def test_longest_first_is_the_tokenizers_rule(tiny_encoder: Path, room: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(next(tiny_encoder.rglob("tokenizer.json")).parent))
    random = np.random.default_rng(room)
    lengths = random.integers(0, 30, size=(60, 2))
    for q, d in lengths:
        encoded = tokenizer(
            [(" ".join(["."] * q), " ".join(["."] * d))], truncation="longest_first", max_length=room + 3
        )
        sides = encoded.sequence_ids(0)
        kept = longest_first(np.array([q]), np.array([d]), room)
        assert (int(kept[0][0]), int(kept[1][0])) == (sides.count(0), sides.count(1)), (q, d)


def test_long_queries_are_cut_counted_and_said_once(
    cross_encoder: Path, tiny_collection: Collection, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = opened(cross_encoder, query_length=6)
    document = tiny_collection.document_texts([0])
    long = TextList("q", "iron gold oak " * 20, ["a"], document)
    short = TextList("q", "iron gold oak " * 2, ["a"], document)
    (_, _, first), (_, _, second) = (next(iter(teacher.score([item]))) for item in (long, short))
    length = len(token_ids(teacher.load().tokenizer, [short.query])[0])
    assert length >= 6 and first == second  # the same first tokens remain
    assert list(teacher.score([long, short]))
    assert teacher.load().cut["query"] == (2 if length == 6 else 4)
    assert capsys.readouterr().err.count("are cut") == 1


def test_broken_weights_are_refused(cross_encoder: Path, tiny_collection: Collection) -> None:
    teacher = opened(cross_encoder)
    with torch.no_grad():
        teacher.load().model.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(RankdistillError, match="nan"):
        list(teacher.score(lists_of(tiny_collection, 1)))


def test_an_encoder_is_no_cross_encoder(tiny_encoder: Path) -> None:
    with pytest.raises(RankdistillError, match="not a cross-encoder"):
        opened(tiny_encoder).load()
    with pytest.raises(RankdistillError, match="trained"):
        opened(tiny_encoder, train=CrossEncoderTraining()).fingerprint()


def test_the_fingerprint_depends_on_what_decides_the_scores(cross_encoder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(cross_encoder, copy)
    known = opened(cross_encoder).fingerprint()
    assert opened(copy, token_budget=99).fingerprint() == known
    changed = ({"max_length": 20}, {"query_length": 9}, {"precision": "bf16"})
    assert len({known, *(opened(copy, **change).fingerprint() for change in changed)}) == 4


@pytest.mark.parametrize(
    ("start", "loss"), [("encoder", "lce"), ("head", "lce"), ("head", "bce"), ("head", "listnet"), ("head", "lambda")]
)
def test_training_learns_and_saves_an_ordinary_cross_encoder(
    tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path, start: Any, loss: Any
) -> None:
    from sentence_transformers import CrossEncoder

    everything = tiny_collection.doc_ids(range(tiny_collection.document_count))
    candidates = [(query_id, everything, np.zeros(len(everything))) for query_id in tiny_collection.query_ids("train")]
    learns = loss in ("lce", "bce")
    settings = {"start": start, "loss": loss, "steps": 40 if learns else 2, "learning_rate": 3e-3, "batch_size": 4}
    teacher, again = (opened(tiny_encoder, train=settings) for _ in range(2))
    assert teacher.needs_training
    report = teacher.train(tiny_collection, candidates, tmp_path / "ce", seed=7)
    assert not teacher.needs_training and report["queries"] == len(candidates)
    assert [path.name for path in tmp_path.iterdir()] == ["ce"]
    plain = CrossEncoder(str(tmp_path / "ce"), device="cpu", trust_remote_code=start == "encoder")
    assert plain.num_labels == 1 and isinstance(plain.activation_fn, torch.nn.Identity)
    lists = lists_of(tiny_collection, 3)
    expected = predicted(tmp_path / "ce", lists, trust_remote_code=start == "encoder")
    np.testing.assert_allclose(scores_of(teacher, lists), expected, atol=1e-4)
    if learns:
        ranks, texts = [], tiny_collection.document_texts(range(len(everything)))
        for query_id, _, _ in candidates:
            item = TextList(query_id, tiny_collection.query_texts([query_id])[0], everything, texts)
            scores = scores_of(teacher, [item])
            positive = next(iter(tiny_collection.qrels("train")[query_id]))
            ranks.append(int((scores > scores[everything.index(positive)]).sum()))
        assert np.mean(ranks) < len(everything) / 5  # chance is a half
        again.train(tiny_collection, candidates[::-1], tmp_path / "again", seed=7)
        assert again.fingerprint() == teacher.fingerprint()


def test_candidates_are_scored_once_for_all_runs(
    cross_encoder: Path, tiny_collection: Collection, tmp_path: Path
) -> None:
    ids = tiny_collection.doc_ids(range(10))
    candidates = [(query_id, [*ids, "nowhere"], np.zeros(11)) for query_id in tiny_collection.query_ids()[:6]]
    store = ScoreStore(tmp_path)
    teacher = opened(cross_encoder)
    first = score_candidates(teacher, tiny_collection, candidates[:4], store, chunk_pairs=25)
    assert (first.scored, first.reused) == (40, 0)
    second = score_candidates(teacher, tiny_collection, candidates, store)
    assert (second.scored, second.reused, second.score_kind) == (20, 40, "logit")
    query_id, doc_ids, _ = candidates[5]
    text = tiny_collection.query_texts([query_id])[0]
    item = TextList(query_id, text, ids, tiny_collection.document_texts(range(10)))
    np.testing.assert_allclose(second.scores_of(query_id, doc_ids)[:10], predicted(cross_encoder, [item]), atol=1e-4)
    assert np.isnan(second.scores_of(query_id, doc_ids)[10])


def test_precision_auto_never_means_emulation() -> None:
    assert resolve_precision("cpu", "auto") in ("bf16", "fp32")
    assert resolve_precision("cpu", "fp16") == "fp16"
