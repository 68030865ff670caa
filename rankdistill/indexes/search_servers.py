"""Files for OpenSearch and Elasticsearch: term weights as bulk requests, the mapping, a query to try, how to load them.

Both keep a weight as Lucene's FeatureField does, with 9 significant bits: it is written rounded to the nearest such
number (an error of 1/512 at most), where the server would cut it off. What else they refuse, each counted in the
manifest:

- dots in the names of terms: "." becomes "__", as in Elastic's own models, an empty name "_"; where that is another
  term's name, one "_" more. terms.json has the names by term id.
- weights of 0, and below the smallest normal float32 (1.2e-38): left out.
- document ids that are empty or longer than 512 bytes: an error, for hits could not be told apart.
- weights of a query above 64 (OpenSearch's neural_sparse): all of its weights are scaled down together.

No server was at hand when this was written: the files are tested against real Lucene and by parsing.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.base import DocumentIds, ranked
from rankdistill.indexes.sparse_specification import ServerSpecification
from rankdistill.progress import progress

INDEX, TERMS, QUERY, CLAUSES, EXPECTED, HOWTO = (
    "index.json", "terms.json", "query.json", "query_rank_feature.json", "expected.json", "HOWTO.txt"
)  # fmt: skip
LONGEST_ID = 512  # bytes
HEAVIEST = 64.0  # a query's weight, in Lucene's FeatureField
DOCUMENTS_AT_ONCE = 1024
QUERY_TERMS = 8  # of the query to try
LOWEST = np.float32(np.finfo(np.float32).tiny)
HIGHEST = np.array(0x7F7F8000, np.uint32).view(np.float32)  # the largest finite number of 9 significant bits


def build(
    specification: ServerSpecification, vectors: Any, doc_ids: Sequence[str], terms: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Write the files of csr_matrix [documents, vocabulary]; what to count in the manifest.

    Memory: one bulk file, and the rounded weights of one block of documents.

    Args:
        doc_ids: of the rows; a `sparse.DocumentIds` brings title and text too.

    Raises:
        RankdistillError: a document id that no server takes.
        UsageError: texts are asked for and `doc_ids` has none.
    """
    names, renamed = feature_names(terms)
    if specification.texts and not isinstance(doc_ids, DocumentIds):
        raise UsageError("there are no texts to send along", where=f"{specification.name}: texts", fix="texts: false")
    counts = {"renamed_terms": renamed, "vanishing_weights": 0, "files": 0, "bytes": 0}
    for content in _bulks(_documents(specification, vectors, doc_ids, names, counts), specification.file_megabytes):
        counts["files"] += 1
        path = folder / f"bulk-{counts['files']:05}.ndjson"
        if specification.gzip:
            path, content = path.with_suffix(".ndjson.gz"), gzip.compress(content, mtime=0)
        counts["bytes"] += path.write_bytes(content)
    _write_json(folder / INDEX, index_body(specification))
    _write_json(folder / TERMS, names, indent=None)
    _write_example(specification, vectors, doc_ids, names, folder)
    (folder / HOWTO).write_text(_howto(specification, vectors.shape[0]), encoding="utf-8")
    return counts


def _bulks(documents: Iterable[bytes], megabytes: float) -> Iterator[bytes]:
    """As many documents as fit into one file, at least one."""
    waiting = bytearray()
    for document in documents:
        if waiting and len(waiting) + len(document) > int(megabytes * 1_000_000):
            yield bytes(waiting)
            waiting.clear()
        waiting += document
    if waiting:
        yield bytes(waiting)


def feature_names(terms: Sequence[str]) -> tuple[list[str], int]:
    """The names of terms on a server, all different, and how many are not the term itself."""
    taken = {term for term in terms if term.strip() and "." not in term}
    names: dict[str, None] = {}
    for term in terms:
        name = term if term in taken else term.replace(".", "__") if term.strip() else "_"
        while name in names or (name != term and name in taken):
            name += "_"
        names[name] = None
    return list(names), sum(name != term for name, term in zip(names, terms, strict=True))


def rounded_weights(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weights as Lucene's FeatureField keeps them: nearest numbers of 9 significant bits, 0 where it cannot."""
    bits = np.ascontiguousarray(weights, np.float32).view(np.uint32)
    nearest = ((bits + 0x3FFF + ((bits >> 15) & 1)) & ~np.uint32(0x7FFF)).view(np.float32)
    return np.where(weights < LOWEST, np.float32(0), np.minimum(nearest, HIGHEST))


def index_body(specification: ServerSpecification) -> dict[str, Any]:
    """What creates the index: one shard without a copy, which one machine can hold."""
    properties: dict[str, Any] = {specification.field: {"type": specification.field_type}}
    if specification.texts:
        properties |= {"title": {"type": "text"}, "text": {"type": "text"}}
    return {
        "settings": {"index": {"number_of_shards": 1, "number_of_replicas": 0}},
        "mappings": {"dynamic": "strict", "properties": properties},
    }


def query_body(
    specification: ServerSpecification, weights: Mapping[str, float], size: int = 10, *, clauses: bool = False
) -> dict[str, Any]:
    """A search whose scores are inner products.

    Args:
        weights: name of a term (terms.json) → weight > 0.
        clauses: as rank_feature clauses, which also a server without OpenSearch's plugin neural-search knows.
    """
    field = specification.field
    query: dict[str, Any]
    if specification.field_type == "sparse_vector":
        if clauses:
            raise UsageError("a sparse_vector field has no rank_feature clauses", where=specification.name)
        # From 9.1 on a server leaves out terms of a query unless it is told not to.
        query = {"sparse_vector": {"field": field, "query_vector": dict(weights), "prune": False}}
    elif clauses or specification.type != "opensearch":
        each = [
            {"rank_feature": {"field": f"{field}.{name}", "linear": {}, "boost": weight}}
            for name, weight in weights.items()
        ]
        query = {"bool": {"should": each}}
    else:
        scale = min(1.0, HEAVIEST / max(weights.values(), default=1.0))
        query = {"neural_sparse": {field: {"query_tokens": {name: weight * scale for name, weight in weights.items()}}}}
    return {"size": size, "_source": {"excludes": [field]}, "query": query}


# -- bulk files -------------------------------------------------------------------------------------------------------


def _documents(
    specification: ServerSpecification,
    vectors: Any,
    doc_ids: Sequence[str],
    names: Sequence[str],
    counts: dict[str, int],
) -> Iterator[bytes]:
    """The two lines of each document."""
    quoted, field = [_json(name) for name in names], _json(specification.field)
    with progress(f"write for {specification.name}", vectors.shape[0], "documents") as bar:
        for first in range(0, vectors.shape[0], DOCUMENTS_AT_ONCE):
            ids = doc_ids[first : first + DOCUMENTS_AT_ONCE]
            part = vectors[first : first + len(ids)]
            weights = rounded_weights(part.data)
            counts["vanishing_weights"] += int((weights == 0).sum())
            # 9 bits leave few different numbers, each written once with the fewest digits that read back alike.
            values, places = np.unique(weights, return_inverse=True)
            numbers = [f":{value}" if value > 0 else "" for value in values]
            features = [
                numbers[place] and quoted[column] + numbers[place]
                for column, place in zip(part.indices.tolist(), places.tolist(), strict=True)
            ]
            texts = [""] * len(ids)
            if specification.texts and isinstance(doc_ids, DocumentIds):
                documents = doc_ids.collection.documents(range(first, first + len(ids)))
                texts = [f',"title":{_json(found.title)},"text":{_json(found.text)}' for found in documents]
            for doc_id, shown, (start, end) in zip(ids, texts, pairwise(part.indptr.tolist()), strict=True):
                weighted = ",".join(filter(None, features[start:end]))
                yield f'{{"index":{{"_id":{_json(_fit_id(doc_id))}}}}}\n{{{field}:{{{weighted}}}{shown}}}\n'.encode()
            bar.advance(len(ids))


def _fit_id(doc_id: str) -> str:
    """A document id that both servers take."""
    if not doc_id or len(doc_id.encode()) > LONGEST_ID:
        what = f"longer than {LONGEST_ID} bytes" if doc_id else "empty"
        what = f"a document id is {what}, which OpenSearch and Elasticsearch refuse"
        raise RankdistillError(what, where=repr(doc_id[:80]), fix="give the documents shorter ids")
    return doc_id


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


# -- what goes with them ----------------------------------------------------------------------------------------------


def _write_example(
    specification: ServerSpecification, vectors: Any, doc_ids: Sequence[str], names: Sequence[str], folder: Path
) -> None:
    """A query made of the first document's heaviest terms, and the hits that the weights as written give it."""
    filled = np.flatnonzero(np.diff(vectors.indptr) > 0)
    if not len(filled):
        return
    document = vectors[filled[0]]
    weights = rounded_weights(document.data)
    heaviest = np.argsort(-weights, kind="stable")[:QUERY_TERMS]
    heaviest = heaviest[weights[heaviest] > 0]
    query = {names[document.indices[place]]: float(weights[place]) for place in heaviest}
    asked = np.zeros(vectors.shape[1])
    asked[document.indices[heaviest]] = weights[heaviest]
    if query and specification.type == "opensearch":
        asked *= min(1.0, HEAVIEST / max(query.values()))
    scores = np.zeros(vectors.shape[0])
    for first in range(0, vectors.shape[0], DOCUMENTS_AT_ONCE):
        part = vectors[first : first + DOCUMENTS_AT_ONCE]
        part.data = rounded_weights(part.data)
        scores[first : first + part.shape[0]] = part @ asked
    filled = np.flatnonzero(scores > 0)
    hits = ranked(filled, scores[filled], 10)
    shown = [{"_id": doc_ids[int(row)], "_score": float(score)} for row, score in zip(*hits, strict=True)]
    _write_json(folder / QUERY, query_body(specification, query))
    if specification.type == "opensearch":
        _write_json(folder / CLAUSES, query_body(specification, query, clauses=True))
    _write_json(folder / EXPECTED, shown)


def _howto(specification: ServerSpecification, documents: int) -> str:
    server = {"opensearch": "OpenSearch", "elasticsearch": "Elasticsearch"}[specification.type]
    url = f"http://localhost:9200/{specification.index}"
    encoding = " -H 'Content-Encoding: gzip'" if specification.gzip else ""
    pattern = f"bulk-*.ndjson{'.gz' if specification.gzip else ''}"
    plugin = f"\n{CLAUSES} asks the same without the plugin neural-search, which {QUERY} needs.\n"
    plugin = plugin if server == "OpenSearch" else ""
    return f"""{documents:,} documents for {server}, field type {specification.field_type}.

Create the index, load the documents, make them visible (add -u USER:PASSWORD and https:// where the server asks):

    curl -X PUT {url} -H 'Content-Type: application/json' --data-binary @{INDEX}
    for file in {pattern}; do
        curl -s -X POST '{url}/_bulk?filter_path=errors,items.*.error' \\
            -H 'Content-Type: application/x-ndjson'{encoding} --data-binary "@$file"
    done
    curl -X POST {url}/_refresh

Each file must answer {{"errors":false}}. Then

    curl -X POST {url}/_search -H 'Content-Type: application/json' --data-binary @{QUERY}

finds the hits of {EXPECTED} (equal scores in any order).
{plugin}
A query of your own has the student's query weights in place of the example's: term id 42 of the student is the name at
place 42 of {TERMS}, which starts at 0. From Python, for an inference-free student (any other encodes its queries with
rankdistill.Workspace("RUN").student()):

    import json
    from rankdistill.students.token_weights import TokenWeights

    names = json.load(open("{TERMS}"))
    query = TokenWeights.open("RUN/student/model").encode_queries(["some words"])
    weights = {{names[term]: float(weight) for term, weight in zip(query.indices, query.data)}}
"""
