"""CIFF: read back with the library's reader, an export is the quantised vectors, gaps, counts and order included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from rankdistill.errors import RankdistillError
from rankdistill.indexes.ciff import FILE, build
from rankdistill.indexes.sparse_specification import CiffSpecification

TERMS = ["the", "", "東", "a", "é", "A", "##s", "."] + [f"t{n}" for n in range(42)]
DOCUMENTS = 120


def random_vectors() -> Any:
    """Some documents and some terms are empty; the first document holds the first term."""
    vectors = sparse.random(DOCUMENTS, len(TERMS), 0.1, "lil", np.float32, np.random.default_rng(0))
    vectors[5], vectors[:, 9] = 0, 0
    vectors[0, 0] = 0.5
    vectors = (vectors.tocsr() * 2).astype(np.float32)
    vectors.eliminate_zeros()
    vectors.sort_indices()
    return vectors


def read_back(path: Path) -> tuple[Any, list[Any], list[Any]]:
    reading = pytest.importorskip("ciff_toolkit.read")
    with reading.CiffReader(path) as reader:
        return reader.read_header(), list(reader.read_postings_lists()), list(reader.read_documents())


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_librarys_reader_gives_back_the_quantised_vectors(bits: int, tmp_path: Path) -> None:
    vectors = random_vectors()
    ids = [f"doc-{n} é" for n in range(DOCUMENTS)]
    counts = build(CiffSpecification(name="ciff", bits=bits), vectors, ids, TERMS, tmp_path)
    header, lists, documents = read_back(tmp_path / FILE)
    levels, step = 2**bits - 1, float(vectors.data.max()) / (2**bits - 1)
    assert counts["step"] == pytest.approx(step) and counts["clipped_weights"] == 0
    expected = np.zeros(vectors.shape, np.int64)
    rows, columns = vectors.nonzero()
    expected[rows, columns] = np.clip(np.rint(vectors.data.astype(np.float64) / step), 1, levels)
    found = np.zeros(vectors.shape, np.int64)
    names = ["[id 1]" if term == "" else term for term in TERMS]
    for entry in lists:
        frequencies = [posting.tf for posting in entry.postings]
        found[np.cumsum([posting.docid for posting in entry.postings]), names.index(entry.term)] = frequencies
        assert (entry.df, entry.cf) == (len(frequencies), sum(frequencies))
    assert (found == expected).all()
    kept = vectors.data >= step / 2  # smaller ones become 1, so that no term is lost
    assert np.abs(found[rows, columns] * step - vectors.data)[kept].max() <= step / 2 + 1e-6
    written = [entry.term for entry in lists]
    assert written == sorted(written, key=str.encode) and counts["terms"] == len(written)
    assert set(names) - set(written) == {names[column] for column in np.flatnonzero(found.sum(0) == 0)}
    assert [(record.docid, record.collection_docid) for record in documents] == list(enumerate(ids))
    assert [record.doclength for record in documents] == found.sum(1).tolist() and documents[5].doclength == 0
    assert header.version == 1 and header.num_docs == header.total_docs == DOCUMENTS
    assert header.num_postings_lists == header.total_postings_lists == len(lists)
    assert header.total_terms_in_collection == found.sum()
    assert header.average_doclength == pytest.approx(found.sum() / DOCUMENTS)
    assert f"impacts of {bits} bits" in header.description


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RankdistillError, match="two of the vocabulary's 50 terms are 'a'"):
        build(CiffSpecification(name="ciff"), random_vectors(), [""] * DOCUMENTS, ["a", *TERMS[1:]], tmp_path)
    dense = sparse.csr_matrix(np.ones((1, 40_000), np.float32))
    with pytest.raises(RankdistillError, match="add up to more than"):
        build(CiffSpecification(name="c", bits=16), dense, ["x"], [str(n) for n in range(40_000)], tmp_path)


def test_an_empty_collection_is_an_empty_index(tmp_path: Path) -> None:
    empty = sparse.csr_matrix((2, len(TERMS)), dtype=np.float32)
    assert build(CiffSpecification(name="ciff"), empty, ["a", "b"], TERMS, tmp_path)["terms"] == 0
    header, lists, documents = read_back(tmp_path / FILE)
    assert lists == [] and header.num_docs == len(documents) == 2
