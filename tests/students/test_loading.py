from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from small_models import LONG, WORDS, make_model

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.students.dense import DenseStudent, StaticStudent
from rankdistill.students.loading import opening
from rankdistill.students.multi_vector import MultiVectorStudent
from rankdistill.students.query_tower import QueryTowerStudent
from rankdistill.students.sparse import SpladeStudent
from rankdistill.teachers.cross_encoder import CrossEncoderTeacher
from rankdistill.teachers.encoders import BiEncoderTeacher

if TYPE_CHECKING:
    from rankdistill.students.base import StudentModel


def edit_json(path: Path, **values: Any) -> None:
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | values))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pickled(folder: Path) -> None:
    """As older libraries saved a model: weights in pytorch_model.bin alone."""
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder; a start of any student too."""
    return make_model(tmp_path_factory.mktemp("roberta") / "model", "roberta", "ForSequenceClassification")


# -- models that cannot be read ---------------------------------------------------------------------------------------

MAKERS: dict[str, Any] = {"dense": DenseStudent, "splade": SpladeStudent, "multi_vector": MultiVectorStudent}
OPENERS: dict[str, Callable[[str], Any]] = {
    "cross_encoder": lambda name: CrossEncoderTeacher(name, device="cpu").load(),
    "bi_encoder": lambda name: BiEncoderTeacher(name, device="cpu").load(),
    "dense": lambda name: DenseStudent(name).create("cpu"),
    "static": lambda name: StaticStudent(name).create("cpu"),
    "splade": lambda name: SpladeStudent(name).create("cpu"),
    "multi_vector": lambda name: MultiVectorStudent(name).create("cpu"),
    "query_tower": lambda name: QueryTowerStudent(name, document_model=name).create("cpu"),
}
DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "pickle alone": (pickled, "the weights are a pickle", "pytorch_model.bin"),
    "cut weights": (lambda f: halve(f / "model.safetensors"), "the weights are damaged", "model.safetensors"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "weights are damaged", "model.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "it has no weights", ""),
    "own code": (
        lambda f: edit_json(f / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"}),
        "needs Python code of its own",
        "",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer", ""),
    "cut configuration": (lambda f: halve(f / "config.json"), "cannot be read", "config.json"),
    "cut tokenizer": (lambda f: halve(f / "tokenizer.json"), "cannot be read", "tokenizer.json"),
    "a list for an object": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object", "config.json"),
    "a word for a number": (lambda f: edit_json(f / "config.json", hidden_size="x"), "can load", ""),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", OPENERS)
def test_a_model_that_cannot_be_read_is_one_error_that_names_the_file(
    roberta: Path, tmp_path: Path, kind: str, damage: str
) -> None:
    harm, words, where = DAMAGE[damage]
    folder = shutil.copytree(roberta, tmp_path / "model")
    harm(folder)
    with pytest.raises(RankdistillError) as raised:
        OPENERS[kind](str(folder))
    assert words in raised.value.what and "trust_remote_code" not in raised.value.what
    assert str(raised.value.where).endswith(where)


def test_the_command_that_converts_a_pickle_does_so(
    roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(roberta, tmp_path / "model")
    pickled(folder)
    with pytest.raises(RankdistillError) as raised:
        CrossEncoderTeacher(str(folder), device="cpu").load()
    command = shlex.split(str(raised.value.fix).removeprefix("convert it: "))
    monkeypatch.setattr(sys, "argv", command[2:])
    exec(command[2], {})
    pairs = np.array([[0, 0], [0, 1]])
    texts = ["w1 w2"], ["w3 w4", "w5"]
    found, wanted = (
        CrossEncoderTeacher(str(name), precision="fp32", device="cpu").score_pairs(*texts, pairs)
        for name in (folder, roberta)
    )
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("kind", OPENERS)
def test_missing_weights_are_named(roberta: Path, tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(roberta, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    (gone,) = [name for name in weights if name.endswith("layer.0.output.dense.weight")]
    if kind == "cross_encoder":
        gone = "classifier.out_proj.weight"
    save_file(
        {name: one for name, one in weights.items() if name != gone}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(RankdistillError, match="would be random: ") as error:
        OPENERS[kind](str(folder))
    assert gone.removeprefix("roberta.") in str(error.value) and str(folder) in str(error.value)


def test_a_part_that_is_a_pickle_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

    model = SentenceTransformer(str(tiny_encoder), device="cpu")
    model.append(Dense(32, 8))
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    assert DenseStudent(str(tmp_path / "model")).create("cpu").dimension == 8
    pickled(tmp_path / "model" / "2_Dense")
    with pytest.raises(RankdistillError, match="pickle") as raised:
        DenseStudent(str(tmp_path / "model")).create("cpu")
    assert str(raised.value.where).endswith("2_Dense/pytorch_model.bin")


def test_a_module_of_foreign_code_is_never_imported(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "model")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "own.Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(RankdistillError, match=r"code of its own \(own.Transformer\)"):
        DenseStudent(str(folder)).create("cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"scale": "x"}', '{"similarity": 5}', '{"scale": NaN}'])
@pytest.mark.parametrize("kind", ["dense", "splade", "multi_vector", "query_tower"])
def test_damaged_settings_of_a_student_name_their_file(roberta: Path, tmp_path: Path, kind: str, text: str) -> None:
    folder = tmp_path / "model"
    OPENERS[kind](str(roberta)).save(folder)
    (folder / "rankdistill.json").write_text(text)
    student: Any = {**MAKERS, "query_tower": QueryTowerStudent}[kind]()
    with pytest.raises(RankdistillError, match="this file of a model") as raised:
        student.open(folder, "cpu")
    assert str(raised.value.where).endswith("rankdistill.json")


def test_an_error_of_our_own_passes_through(tiny_encoder: Path) -> None:
    with pytest.raises(UsageError, match="as it was"), opening(tiny_encoder):
        raise UsageError("as it was")


# -- lengths ----------------------------------------------------------------------------------------------------------


def tokens(model: StudentModel, side: Any = "document", text: str = LONG) -> int:
    return int(model.preprocess([text], side)["attention_mask"].sum())


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    ("architecture", "wanted", "expected"),
    [
        ("roberta", None, 64),
        ("roberta", 1024, 64),
        ("roberta", 20, 20),
        ("t5", None, 601),
        ("t5", 50, 50),
        ("gpt2", None, 40),
    ],
)
def test_texts_are_cut_to_what_the_model_has_positions_for(
    roberta: Path, tmp_path: Path, kind: str, architecture: Any, wanted: int | None, expected: int
) -> None:
    if kind == "splade" and architecture != "roberta":
        pytest.skip("it has no masked-language head")
    folder = roberta if architecture == "roberta" else make_model(tmp_path / "model", architecture)
    if kind == "multi_vector" and wanted is None:
        expected = min(expected, 128)  # its default
    maker = MAKERS[kind]
    model = maker(str(folder), query_length=wanted, document_length=wanted, precision="fp32").create("cpu")
    assert tokens(model) == expected
    vectors = model.encode_documents([LONG, "w1"])
    assert vectors.shape[0] == 2 if hasattr(vectors, "shape") else len(vectors) == 2
    model.save(tmp_path / "saved")
    assert tokens(maker(precision="fp32").open(tmp_path / "saved", "cpu")) == expected


@pytest.mark.parametrize("kind", MAKERS)
def test_a_folder_made_elsewhere_is_cut_to_its_positions_too(roberta: Path, tmp_path: Path, kind: str) -> None:
    """... or refused, where it compares vectors otherwise than by products."""
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder

    start = make_model(tmp_path / "start", "roberta", "ForMaskedLM") if kind == "splade" else roberta
    peers: Any = {"dense": SentenceTransformer, "splade": SparseEncoder, "multi_vector": MultiVectorEncoder}
    peer = peers[kind](str(start), device="cpu")
    peer.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    model = MAKERS[kind]().open(tmp_path / "model", "cpu")
    assert tokens(model) == 64
    model.encode_documents([LONG])
    if kind == "splade":
        edit_json(tmp_path / "model" / "config_sentence_transformers.json", similarity_fn_name="cosine")
        with pytest.raises(UsageError, match="compares vectors by cosine"):
            SpladeStudent().open(tmp_path / "model", "cpu")


def test_a_bi_encoder_teacher_without_a_stated_length_reads_whole_texts(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    folder = make_model(tmp_path / "model", "t5")
    teacher = BiEncoderTeacher(str(folder), similarity="cos", precision="fp32", device="cpu")
    found = teacher.score_pairs(["w1 w2"], [LONG, f"{LONG} w7 w7 w7"], np.array([[0, 0], [0, 1]]))
    peer = SentenceTransformer(str(folder), device="cpu")
    wanted = peer.similarity(peer.encode(["w1 w2"]), peer.encode([LONG, f"{LONG} w7 w7 w7"])).numpy()[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_words_of_a_model_that_marks_ends_alone_become_a_table(tmp_path: Path) -> None:
    """T5 frames a text as `... </s>`: each word's vector is the encoder's of that word so framed."""
    folder = make_model(tmp_path / "model", "t5")
    table = StaticStudent(str(folder), similarity="cos").create("cpu").encode_documents(["w1", "w2"])
    peer = DenseStudent(str(folder), similarity="cos").create("cpu").encode_documents(["w1", "w2"])
    np.testing.assert_allclose(table, peer, atol=1e-2)


# -- prompts ----------------------------------------------------------------------------------------------------------

PROMPT = " ".join(WORDS[:20]) + " "


@pytest.mark.parametrize("kind", MAKERS)
def test_a_prompt_does_not_count_towards_the_length(roberta: Path, kind: str) -> None:
    model = MAKERS[kind](str(roberta), query_prompt=PROMPT, query_length=12, precision="fp32").create("cpu")
    assert tokens(model, "query") == 32  # 20 of the prompt, 10 of the text, 2 special
    vectors = model.encode_queries([f"{word} {word}" for word in WORDS[:4]])
    different = vectors.toarray() if kind == "splade" else vectors if kind == "dense" else None
    if different is not None:  # the prompt alone used to be all that was left
        assert len(np.unique(different.round(4), axis=0)) == 4


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("side", ["query", "document"])
def test_a_prompt_that_leaves_no_room_is_refused(roberta: Path, kind: str, side: str) -> None:
    with pytest.raises(UsageError, match="no room is left for the text"):
        MAKERS[kind](str(roberta), **{f"{side}_prompt": LONG}).create("cpu")


def test_the_prompt_of_a_published_embedder_does_not_count_either(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "model")
    edit_json(
        folder / "config_sentence_transformers.json", prompts={"query": "metal which rusts in water and oxygen: "}
    )
    model = DenseStudent(str(folder), query_length=6).create("cpu")
    assert tokens(model, "query", "gold and iron and oak and the sun") == 6 + 8


@pytest.mark.parametrize("length", [-3, 0, 1, 2])
def test_a_length_without_room_for_a_word_is_refused(roberta: Path, length: int) -> None:
    with pytest.raises(UsageError, match=f"{length} tokens hold no text: 2 are special"):
        DenseStudent(str(roberta), query_length=length).create("cpu")


# -- vectors as the model makes and compares them ---------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("normalised", [True, False])
def test_a_cut_of_dimensions_is_honoured(tiny_encoder: Path, tmp_path: Path, similarity: Any, normalised: bool) -> None:
    """`truncate_dim`: a Matryoshka model's first dimensions."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    peer = SentenceTransformer(
        modules=[*SentenceTransformer(str(tiny_encoder), device="cpu"), *([Normalize()] if normalised else [])],
        similarity_fn_name=similarity,
        truncate_dim=8,
        device="cpu",
    )
    peer.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    queries, documents = ["which metal rusts", "oak"], ["iron is a metal", "the oak is a tree", "gold"]
    expected = peer.similarity(peer.encode(queries), peer.encode(documents)).numpy()
    student = DenseStudent(str(tmp_path / "model"), precision="fp32")
    for model in (student.create("cpu"), student.open(tmp_path / "model", "cpu")):
        assert model.dimension == 8 and model.encode_documents(documents).shape == (3, 8)
        np.testing.assert_allclose(model.similarities(queries, documents), expected, atol=1e-5)
    teacher = BiEncoderTeacher(str(tmp_path / "model"), precision="fp32", device="cpu")
    pairs = np.indices((2, 3)).reshape(2, -1).T
    np.testing.assert_allclose(teacher.score_pairs(queries, documents, pairs), expected.ravel(), atol=1e-5)


@pytest.mark.parametrize("width", [8, 16])
def test_a_query_tower_of_and_for_a_cut_model(tiny_encoder: Path, tmp_path: Path, width: int) -> None:
    folders = []
    for name, dimension in (("large", 8), ("small", width)):
        folders.append(str(shutil.copytree(tiny_encoder, tmp_path / name)))
        edit_json(tmp_path / name / "config_sentence_transformers.json", truncate_dim=dimension)
    model = QueryTowerStudent(folders[1], document_model=folders[0], precision="fp32").create("cpu")
    assert model.encode_queries(["gold"]).shape == model.encode_documents(["gold"]).shape == (1, 8)
    if width == 8:  # the projection starts from the cut itself
        np.testing.assert_allclose(model.encode_queries(["gold"]), model.encode_documents(["gold"]), atol=1e-5)


@pytest.mark.parametrize("name", ["manhattan", "euclidean"])
def test_a_distance_is_refused_unless_the_recipe_says_how_to_compare(
    tiny_encoder: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "model")
    edit_json(folder / "config_sentence_transformers.json", similarity_fn_name=name)
    for attempt in (
        lambda: DenseStudent(str(folder)).create("cpu"),
        lambda: DenseStudent().open(folder, "cpu"),
        lambda: BiEncoderTeacher(str(folder), device="cpu").load(),
    ):
        with pytest.raises(UsageError, match=f"by their {name} distance"):
            attempt()
    assert BiEncoderTeacher(str(folder), similarity="dot", device="cpu").load().similarity == "dot"
