"""The model card of a trained student, written from the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from rankdistill import __version__
from rankdistill.recipe import Recipe

if TYPE_CHECKING:
    from rankdistill.collections import Collection

LOADERS = {"multi_vector": "MultiVectorEncoder", "splade": "SparseEncoder", "inference_free": "SparseEncoder"}
USE = """```python
from sentence_transformers import LOADER

model = LOADER("PATH/TO/THIS/FOLDER")
queries = model.encode_query(["..."])
documents = model.encode_document(["..."])
scores = model.similarity(queries, documents)
```"""
QUERIES_ONLY = """This model encodes queries only. Documents are encoded by `DOCUMENT_MODEL`; an index of its vectors is
searched with this model's.

```python
from sentence_transformers import SentenceTransformer

queries = SentenceTransformer("PATH/TO/THIS/FOLDER").encode_query(["..."])
documents = SentenceTransformer("DOCUMENT_MODEL").encode_document(["..."])
```"""

PAIRS = """This model re-ranks: it reads a query and a document together.

```python
from sentence_transformers import CrossEncoder

# The flag is for a module that is a class of rankdistill, which must be installed; the folder itself has no code.
model = CrossEncoder("PATH/TO/THIS/FOLDER", trust_remote_code=True)
scores = model.predict([("a query", "a document"), ("a query", "another")])
```

To rankdistill it is a teacher as well: `teacher: {type: cross_encoder, model: PATH/TO/THIS/FOLDER}`."""


def model_card(recipe: Recipe, collection: Collection, counts: dict[str, Any], notes: dict[str, Any]) -> str:
    """A README.md for `model/`: what it is, how to use it, how it was trained, what was measured on dev."""
    student = recipe.student.settings()
    teacher = recipe.teacher.settings() if recipe.teacher else None
    header = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "text-ranking" if recipe.student_kind == "cross_encoder" else "sentence-similarity",
        "base_model": student.get("model"),
        "tags": ["sentence-transformers", "rankdistill", "distillation", "retrieval", student["type"]],
    }
    dev = notes.get("dev") or {}
    rows = "".join(f"| {step} | {value:.4f} |\n" for step, value in dev.items())
    measured = f"\nDev {notes['dev_metric']}:\n\n| step | value |\n|---:|---:|\n{rows}" if rows else ""
    losses = ", ".join(method.type for method in recipe.training.losses)
    loader = LOADERS.get(student["type"], "SentenceTransformer")
    use = QUERIES_ONLY if "document_model" in student else PAIRS if recipe.student_kind == "cross_encoder" else USE
    use = use.replace("LOADER", loader).replace("DOCUMENT_MODEL", str(student.get("document_model")))
    article = "an" if student["type"][0] in "aeiou" else "a"
    used = {"student": student, "teacher": teacher, "training": recipe.training.model_dump(mode="json")}
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---

# {recipe.name}: {article} {student["type"]} student

{recipe.description.strip() or "A retriever distilled from a ranker."}

## Use

{use}

## Training

Trained by rankdistill {__version__} on {counts["lists"]:,} scored lists of the collection `{collection.name}`
({collection.document_count:,} documents), {counts["steps"]:,} steps, loss: {losses},
teacher: {f"`{teacher['type']}`" if teacher else "none (labels only)"}, {notes["parameters"]:,} parameters,
{notes["precision"]}.
The published weights are the best by the dev metric.
{measured}
Settings:

```yaml
{yaml.safe_dump(used, sort_keys=False)}```
"""
