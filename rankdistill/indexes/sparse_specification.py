"""Index specifications of sparse students: which inverted index of term weights to build, or which server's files."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from rankdistill.plain import Name, Section


class SparseSpecification(Section):
    """What the specifications of all inverted indexes share; a YAML file in indexes/.

    One of another package is named by `type: my_package.my_module:MySpecification`; the functions `build`, and
    `open_index` where this program shall search it, stand beside it in its module.
    """

    module: ClassVar[str] = ""  # of those here, which are imported when they are asked for

    type: str
    name: Name
    description: str = ""


class QuantisedSpecification(SparseSpecification):
    """Weights as integers: 1 to 2^bits - 1 in even steps up to the largest weight."""

    bits: int = Field(default=8, ge=1, le=16, description="of a document's weight")
    maximum: float | None = Field(
        default=None, gt=0, description="weight of the highest integer; the largest of the collection unless given"
    )
    above: Literal["clip", "error"] = Field(
        default="clip", description="weights above the maximum: taken for it and counted, or refused"
    )


class LuceneImpactSpecification(QuantisedSpecification):
    """A Lucene index whose term frequencies are impacts; opens with pyserini."""

    module = "lucene_impact"
    type: Literal["lucene_impact"] = Field(default="lucene_impact")
    query_bits: int = Field(default=8, ge=1, le=16, description="of a query's weight")


class CiffSpecification(QuantisedSpecification):
    """A Common Index File Format export (Lin et al. 2020, arXiv:2003.08276), for PISA, Terrier, JASSv2 ..."""

    module = "ciff"
    type: Literal["ciff"] = Field(default="ciff")


class SeismicSpecification(SparseSpecification):
    """A Seismic index (Bruch et al. 2024, arXiv:2404.18812): blocked inverted lists with summaries, approximate."""

    module = "seismic"
    type: Literal["seismic"] = Field(default="seismic")
    postings: int = Field(default=3500, ge=1, description="documents kept a term, on average")
    centroid_fraction: float = Field(default=0.1, gt=0, le=1, description="blocks a list, by its documents")
    summary_energy: float = Field(default=0.4, gt=0, le=1, description="share of a block's weight its summary keeps")
    minimum_block: int = Field(default=2, ge=1, description="documents a block, at least")
    neighbours: int = Field(default=0, ge=0, description="of each document, to look at beside the hits; 0: none")
    query_cut: int = Field(default=10, ge=1, description="heaviest terms of a query that choose blocks")
    heap_factor: float = Field(default=0.7, gt=0, le=1, description="blocks below this share of the k-th are skipped")


class ServerSpecification(SparseSpecification):
    """Bulk files and a mapping for a search server."""

    module = "search_servers"
    type: Literal["opensearch", "elasticsearch"]
    field_type: Literal["rank_features", "sparse_vector"]
    index: str = Field(
        default="rankdistill", pattern=r"^[a-z0-9][a-z0-9_.+-]*$", max_length=255, description="its name on the server"
    )
    field: str = Field(
        default="terms", pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", description="name of the field that holds the weights"
    )
    texts: bool = Field(default=True, description="send title and text along, to be shown and searched by BM25")
    file_megabytes: float = Field(
        default=10, gt=0, le=100, description="size of a bulk file, at most; servers refuse requests above 100, some 10"
    )
    gzip: bool = Field(default=False, description="compress the bulk files; their size is meant uncompressed")

    @field_validator("field")
    @classmethod
    def _free(cls, field: str) -> str:
        if field in ("title", "text"):
            raise ValueError("title and text are fields of their own")
        return field


class OpenSearchSpecification(ServerSpecification):
    """For OpenSearch. Its own `sparse_vector` (3.3, approximate) takes token ids, not these files."""

    type: Literal["opensearch"] = Field(default="opensearch")
    field_type: Literal["rank_features"] = "rank_features"


class ElasticsearchSpecification(ServerSpecification):
    """For Elasticsearch: `sparse_vector` from 8.15 on, `rank_features` for older ones."""

    type: Literal["elasticsearch"] = Field(default="elasticsearch")
    field_type: Literal["rank_features", "sparse_vector"] = "sparse_vector"


# `type` → specification
SPARSE: dict[str, type[SparseSpecification]] = {
    "lucene_impact": LuceneImpactSpecification,
    "seismic": SeismicSpecification,
    "opensearch": OpenSearchSpecification,
    "elasticsearch": ElasticsearchSpecification,
    "ciff": CiffSpecification,
}
