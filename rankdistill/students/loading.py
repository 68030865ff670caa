"""Opening models of any kind: one-line errors for what cannot be read, and how many tokens a text may have.

Nothing of a model is executed or unpickled: weights are safetensors, code that a model brings along is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.progress import quiet_transformers, warn
from rankdistill.students.models import AGAIN, model_folders, read_json, resolve_model, says

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
UNBOUNDED = 10**9  # a tokenizer's longest text, where none is meant
LEAST_ROOM = 8  # tokens that a prompt must leave for the text
SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # of every from_pretrained
PICKLES = ("pytorch_model*.bin", "adapter_model*.bin")
VOCABULARIES = (
    *("tokenizer.json", "tekken.json", "vocab*", "spiece*", "*.model", "*.spm", "*.tiktoken", "*.bpe", "bpe.codes"),
)
OBJECTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "config_sentence_transformers.json")
BYTES = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")  # they need no vocabulary
# It unpickles nothing but tensors (weights_only).
CONVERT = (
    'python -c "import sys, glob, torch; from safetensors.torch import save_file; p, n = sys.argv[1:]; save_file('
    "{k: v.contiguous().clone() for f in sorted(glob.glob(p + '/' + n + '*.bin')) for k, v in torch.load(f, "
    "map_location='cpu', weights_only=True).items()}, p + '/' + n.replace('pytorch_', '') + '.safetensors', "
    "{'format': 'pt'})\" "
)


def load_model(kind: Callable[..., T], folder: Path, device: str | torch.device | None = None, **options: Any) -> T:
    """A model of sentence-transformers, of whichever kind (with its options), from safetensors alone, whose texts are
    cut to what it has positions for."""
    weights = {"use_safetensors": True, **options.pop("model_kwargs", {})}
    with opening(folder):
        model = kind(str(folder), device=str(resolve_device(device)), model_kwargs=weights, **SAFE, **options)
    fit_texts(model, folder)
    return model


@contextmanager
def opening(folder: Path, library: str = "sentence-transformers") -> Iterator[None]:
    """Load a model of a folder inside this; whatever the libraries raise becomes one error that says what to do.

    Raises:
        RankdistillError: weights are pickles only, there is no tokenizer, a file is damaged, weights are missing, the
            model needs code of its own, or it is none that the library can load.
    """
    for part in model_folders(folder):
        _refuse_pickles(part)
        _refuse_without_vocabulary(part)
    try:
        with quiet_transformers(), _all_weights(folder):
            yield
    except RankdistillError:
        raise
    except Exception as error:  # of whatever kind: each library, format and architecture has its own
        check_files(folder, failed=True)
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise RankdistillError(f"this is no model that {library} can load: {why}", where=str(folder)) from error


@contextmanager
def _all_weights(folder: Path) -> Iterator[None]:
    """Refuse a model of whose weights some are in no file: transformers makes them up at random.

    A head that is new on purpose, and a pooler that no encoder here reads, may be missing. Sentence-transformers passes
    transformers' report of a loading on to nobody, so it is read on the way.
    """
    from transformers import PreTrainedModel

    load = PreTrainedModel.__dict__["from_pretrained"]

    def reporting(cls: Any, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        model, report = load.__func__(cls, *args, output_loading_info=True, **options)
        whole = type(model).__name__ in (getattr(model.config, "architectures", None) or [])
        base = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix or " ") else ""
        ranks = whole and type(model).__name__.endswith("ForSequenceClassification")
        missing = [name for name in sorted(report["missing_keys"]) if whole or name.startswith(base)]
        missing = [name for name in missing if ranks or "pooler" not in name.split(".")]
        if missing:
            raise RankdistillError(
                f"{len(missing)} of the model's weights are in no file, and would be random: "
                + ", ".join(missing[:5])
                + (" ..." if len(missing) > 5 else ""),
                where=str(folder),
                fix=AGAIN,
            )
        return (model, report) if output_loading_info else model

    setattr(PreTrainedModel, "from_pretrained", classmethod(reporting))  # type: ignore[arg-type]  # noqa: B010
    try:
        yield
    finally:
        setattr(PreTrainedModel, "from_pretrained", load)  # noqa: B010


def _refuse_pickles(part: Path) -> None:
    """Sentence-transformers unpickles a part's pytorch_model.bin where it finds nothing else."""
    pickles = [path for pattern in PICKLES for path in part.glob(pattern)]
    if pickles and not any(part.glob("*.safetensors")):
        stem = "adapter_model" if pickles[0].name.startswith("adapter") else "pytorch_model"
        raise RankdistillError(
            "the weights are a pickle, which may hold any program; rankdistill reads safetensors alone",
            where=str(pickles[0]),
            fix=f"convert it: {CONVERT}{str(part)!r} {stem}",
        )


def _refuse_without_vocabulary(part: Path) -> None:
    """Transformers makes up an empty tokenizer where the files are missing: every word would be unknown."""
    config, tokenizer = says(part, "config.json"), says(part, "tokenizer_config.json")
    if "model_type" not in config or tokenizer.get("tokenizer_class") in BYTES:
        return
    if not any(path.is_file() for pattern in VOCABULARIES for path in part.glob(pattern)):
        raise RankdistillError(
            "this model has no tokenizer (tokenizer.json, vocab.txt, *.model ...)",
            where=str(part),
            fix="copy the tokenizer's files from the model that it was made from",
        )


def check_model(name: str) -> Path:
    """A model's folder whose files can be read, as far as that is seen without loading it."""
    folder = resolve_model(name).path
    check_files(folder)
    return folder


def check_files(folder: Path, failed: bool = False) -> None:
    """Refuse a model with a pickle for weights, a damaged file, or without weights or vocabulary; one that could not be
    loaded (`failed`) for code of its own, too, and for files that another model may do without."""
    from safetensors import SafetensorError, safe_open

    for part in model_folders(folder):
        _refuse_pickles(part)
        _refuse_without_vocabulary(part)
        for path in sorted(part.glob("*.json")):
            if failed or path.name in OBJECTS:
                read_json(path, dict if path.name in OBJECTS else object)
        for path in sorted(part.glob("*.safetensors")):
            try:
                with safe_open(path, "np") as tensors:
                    tensors.keys()
            except (OSError, SafetensorError) as damage:
                raise RankdistillError(f"the weights are damaged: {damage}", where=str(path), fix=AGAIN) from None
        modules = read_json(part / "modules.json", list) if (part / "modules.json").is_file() else []
        types = [str(module.get("type")) for module in modules]
        foreign = [name for name in types if not name.startswith("sentence_transformers.")]
        mapped = any("auto_map" in says(part, name) for name in ("config.json", "tokenizer_config.json"))
        if failed and (foreign or mapped):  # transformers may know the architecture itself
            code = f" ({foreign[0]})" if foreign else ""
            raise RankdistillError(
                f"this model needs Python code of its own{code}, which is never run here",
                where=str(part),
                fix="a model of an architecture that transformers has itself; or score with the model's own program "
                "and read its scores (teacher.type: recorded)",
            )
    if not any(path for part in model_folders(folder) for path in part.glob("*.safetensors")):
        raise RankdistillError("this is no model: it has no weights (*.safetensors)", where=str(folder), fix=AGAIN)


def check_causal_lm(folder: Path) -> None:
    """Refuse a model that generates no text."""
    names = says(folder, "config.json").get("architectures") or []
    if not any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise RankdistillError(
            f"this is no causal language model ({', '.join(map(str, names)) or 'it does not say what it is'})",
            where=str(folder),
            fix="give a model that generates text (its config.json names a ...ForCausalLM)",
        )


def is_cross_encoder(folder: Path) -> bool:
    """By what the folder says of itself; sentence-transformers would put a random head on an encoder instead."""
    if says(folder, "config_sentence_transformers.json").get("model_type") == "CrossEncoder":
        return True
    names = says(folder, "config.json").get("architectures") or []
    return any(str(name).endswith(("ForSequenceClassification", "ForCausalLM")) for name in names)


# -- lengths ----------------------------------------------------------------------------------------------------------


def position_limit(model: Any, longest: int = UNBOUNDED) -> int:
    """Tokens of the longest text that a model of transformers has positions for; `longest` where it has no limit."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not positions or positions < 0:
        return longest
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding's.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(positions) - int(module.padding_idx) - 1
    return int(positions)


def text_limit(transformer: Any) -> int:
    """Tokens of the longest text for a Transformer module: its positions, else what it came with, else UNBOUNDED."""
    stated = transformer.max_seq_length or UNBOUNDED  # 10^30 where a tokenizer states none
    return position_limit(transformer.model, min(int(stated), UNBOUNDED))


def fit_texts(model: Any, folder: Path) -> None:
    """Cut texts to what each encoder of a model has positions for, and let it pad: some tokenizers allow more tokens,
    some state no limit, and those of many decoders have no padding token."""
    from sentence_transformers.base.modules import Transformer

    for module in model.modules():
        if isinstance(module, Transformer):
            limit = text_limit(module)
            for name in ("query_length", "document_length", "max_seq_length"):
                if length := getattr(module, name, None):
                    setattr(module, name, min(int(length), limit))
            _make_padding(module, folder)


def _make_padding(transformer: Any, folder: Path) -> None:
    """Name a token to pad with where there is none.

    Rankers find a text's last token as the last one that is no padding, so this is a token that no text ends in.
    """
    tokenizer, config = transformer.tokenizer, transformer.model.config.get_text_config()
    padding = getattr(config, "pad_token_id", None)
    if tokenizer.pad_token_id is None:
        last = tokenizer("a")["input_ids"][-1:]
        known = [padding, *(getattr(tokenizer, f"{name}_token_id") for name in ("eos", "unk", "bos", "sep"))]
        fitting = [number for number in known if number is not None and number not in last]
        if not fitting:
            raise RankdistillError(
                "this model's tokenizer has no padding token, and no other token that could serve as one",
                where=str(folder),
                fix='name one in its tokenizer_config.json: "pad_token": "..."',
            )
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(fitting[0])
    if padding is None:
        config.pad_token_id = tokenizer.pad_token_id


def say_cut(count: int, total: int) -> None:
    """Said once by what encodes queries."""
    warn(
        f"{count:,} of {total:,} queries are longer than query_length and are cut: their ends are not read (later ones "
        "are counted silently); a greater query_length reads them whole"
    )


def side_length(transformer: Any, side: str, length: int | None, prompt: str | None) -> int:
    """Tokens that a side's texts are cut to, special tokens and prompt included; `length` is without the prompt, None
    as many as the model can take."""
    limit = text_limit(transformer)
    bare = transformer.preprocess(["a"])["input_ids"].shape[1]
    if length is not None and length < bare:
        raise UsageError(
            f"{length} tokens hold no text: {bare - 1} are special tokens", where=f"student.{side}_length", fix="more"
        )
    if not prompt:
        return min(length or limit, limit)
    taken = transformer.preprocess(["a"], prompt=prompt)["input_ids"].shape[1] - bare
    if limit - taken < min(length or LEAST_ROOM, LEAST_ROOM):
        raise UsageError(
            f"the {side} prompt takes {taken} of the {limit} tokens that the model can read: no room is left for the"
            " text",
            where=f"student.{side}_prompt",
            fix="a shorter prompt, or a model with more positions",
        )
    return min(length + taken, limit) if length else limit
