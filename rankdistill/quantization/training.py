"""Training the quantiser: the list losses of distillation over compressed scores, with checkpoints that resume exactly.

Loss of a step: L_pq, the losses between the teacher's scores and those of the decoded vectors, + w · L_ivf, the same
losses with each document's centroid in its place, w = L_pq / L_ivf of the first batch (Distill-VQ, Xiao et al. 2022,
arXiv:2204.00185); a query encoder that is trained along also learns from the uncompressed scores.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankdistill.artifacts import write_atomically
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.base import Rows, Vectors
from rankdistill.indexes.specification import QuantizerSpecification
from rankdistill.losses.base import ListLoss
from rankdistill.progress import progress, say
from rankdistill.quantization.batches import Batch, Sampler, best_documents
from rankdistill.quantization.quantizer import VectorQuantizer, uniform_codes
from rankdistill.recipe import build
from rankdistill.students.base import StudentModel, to_device
from rankdistill.training.checkpoints import load_state, save_state

LOG, CHECKPOINT, STATE = "log.jsonl", "checkpoint", "state.json"
WEIGHTS, CODES, LISTS, LIVE = "quantizer.safetensors", "codes.npy", "lists.npy", "live.npy"
ENCODER = "encoder."  # before the names of a query encoder's tensors
LOG_EVERY = 10
# Overlapping subspaces: the share of the steps that fit the vectors, at a higher rate; the share after which codes are
# held and only codebooks learn; sweeps over all documents then.
FITTING, FITTING_RATE, SETTLED, SWEEPS = 0.25, 2.5, 0.9, 2
CODED_AT_ONCE = 8_192
AGREEMENT = 10  # documents compared with the exact ranking
BLOCK = 65_536
MOST_PAIRS = 1 << 28  # of documents in a step's lists: 1 GiB of float32
TEMPERATURE_SHARE = 1.0  # of the standard deviation of the teacher's scores among its best


class QuantizerTraining:
    """One training, resumable from `work`.

    Args:
        quantizer: from FAISS's trained parts, on the device that trains it.
        sampler: of queries and documents.
        codes: [n, M] FAISS's codes: read where codes stay frozen, written where subspaces overlap.
        student: whose query encoder is trained along.
    """

    def __init__(
        self,
        quantizer: VectorQuantizer,
        sampler: Sampler,
        specification: QuantizerSpecification,
        documents: Vectors,
        work: Path,
        *,
        codes: NDArray[np.uint8] | None = None,
        student: StudentModel | None = None,
    ) -> None:
        self.quantizer, self.sampler, self.specification = quantizer, sampler, specification
        self.documents, self.work, self.codes, self.student = documents, work, codes, student
        self.device = quantizer.codebooks.device
        self.losses: list[ListLoss] = [build("loss", loss.settings()) for loss in specification.losses]
        for loss in self.losses:
            if not isinstance(loss, ListLoss) or next(loss.buffers(), None) is not None:
                what = (
                    f"the loss {loss.type} reads more than a list's scores, or keeps state: it cannot train codebooks"
                )
                fix = "kl, listnet, margin_mse with all_pairs, or another loss over lists"
                raise RankdistillError(what, where="losses", fix=fix)
            if loss.needs_labels and not specification.documents.labelled:
                fix = "documents: {labelled: true}, or a loss that needs none (kl, listnet)"
                raise RankdistillError(f"the loss {loss.type} needs a labelled positive", where="losses", fix=fix)
        self._check_pairs()
        auto = specification.temperature == "auto"
        self.temperature = TEMPERATURE_SHARE * sampler.spread() if auto else float(specification.temperature)
        # Recorded scores have a scale of their own: brought to that of the similarities, which the student's are.
        self.teacher_scale = sampler.spread() / sampler.teacher_spread() if specification.relevance == "scores" else 1.0
        if specification.codes == "frozen" and quantizer.by_residual and quantizer.centroids is not None:
            # Frozen codes describe what is left after these very centroids, of these very lists.
            quantizer.centroids.weight.requires_grad_(False)
        self.modules: dict[str, nn.Module] = {"": quantizer}  # by what their tensors' names begin with
        if student is not None:
            self.modules[ENCODER] = student.eval()  # dropout would differ in a resumed training
        self.weights: dict[str, float] = {}  # fixed by the first batch: w of L_ivf, the unit of the reconstruction
        self.step = 0
        self.log: list[dict[str, Any]] = []
        self.lists: Tensor | None = None
        self.optimisers = self._optimisers()

    def run(self) -> tuple[float | None, float | None]:
        """Train to the last step, on from the last checkpoint; `agreement` before and after."""
        spec = self.specification
        resumed = self._load()
        if not resumed:
            self.log.append({"step": 0, f"overlap@{AGREEMENT}": self.agreement()})
        self._assign(keep=resumed)
        self._look_again(keep=resumed)
        with progress(f"quantize {spec.name}", spec.steps, "steps") as bar:
            bar.done = self.step
            while self.step < spec.steps:
                entry = self._train_step()
                self.step += 1
                if self.step % LOG_EVERY == 0 or self.step == spec.steps:
                    self.log.append({"step": self.step, **entry})
                bar.advance(1, f"loss {entry['loss']:.4f}")
                if self.quantizer.columns is not None and self.step == math.ceil(SETTLED * spec.steps):
                    self._settle()
                if self.step % spec.reassign_every == 0:
                    self._assign()
                    self._look_again()
                if self.step % spec.checkpoint_every == 0 and self.step < spec.steps:
                    self._save()
        self.log.append({"step": self.step, f"overlap@{AGREEMENT}": self.agreement()})
        self._write_log()
        return self.log[0][f"overlap@{AGREEMENT}"], self.log[-1][f"overlap@{AGREEMENT}"]

    def _encode(self, numbers: Rows) -> Tensor:
        """The query encoder's vectors of queries of the pool, with gradients while it trains."""
        assert self.student is not None
        texts = [self.sampler.texts[number] for number in numbers]
        inputs = to_device(self.student.preprocess(texts, "query"), self.student.device)
        return self.student.embed(inputs, "query").float().to(self.device)

    # -- one step -----------------------------------------------------------------------------------------------------

    def _train_step(self) -> dict[str, float]:
        spec, quantizer = self.specification, self.quantizer
        quantizer.train()
        batch = self.sampler.batch(self.step).to(self.device)
        vectors = self.sampler.document_vectors(batch.rows).to(self.device)
        if batch.teacher is None:
            teacher = self._listed(self.sampler.similarities(batch.queries, batch.rows), batch)
        else:
            teacher = batch.teacher * self.teacher_scale
        queries = batch.queries if self.student is None else self._encode(batch.numbers)
        rotated = vectors @ quantizer.rotation().T
        asked = queries @ quantizer.query_transform().T
        lists = None if self.lists is None else self.lists[torch.from_numpy(batch.rows)].to(self.device)
        decoded, _ = quantizer(rotated, lists, self._codes(rotated, lists, batch))
        parts = {"pq": self._loss(quantizer.score(asked, decoded), teacher, batch)}
        if lists is not None and quantizer.centroids is not None:
            parts["ivf"] = self._loss(quantizer.score(asked, quantizer.centroids(lists)), teacher, batch)
        if self.student is not None:
            parts["dense"] = self._loss(quantizer.score(asked, rotated), teacher, batch)
        error = (rotated - quantizer.fold(decoded)).square().sum(dim=1).mean()
        if "error" not in self.weights:
            self.weights["error"] = max(float(error.detach()), 1e-12)
            for name in ("ivf", "dense"):
                if name in parts:
                    self.weights[name] = float(parts["pq"].detach()) / max(float(parts[name].detach()), 1e-12)
        total = sum((self.weights.get(name, 1.0) * part for name, part in parts.items()), torch.zeros(()))
        # Overlapping codebooks first fit the vectors, so that ranking starts from less to repair.
        fitting = quantizer.columns is not None and self.step < FITTING * spec.steps
        if fitting:
            total = error / self.weights["error"]
        elif spec.reconstruction:
            total = total + spec.reconstruction * error / self.weights["error"]
        if not torch.isfinite(total):
            fix = "a lower codebook_rate, or another temperature"
            raise RankdistillError(f"the loss is {float(total)} at step {self.step}", where=spec.name, fix=fix)
        share, boost = _rate(self.step, spec.steps, spec.warmup), FITTING_RATE if fitting else 1.0
        for optimiser, rates in self.optimisers:
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * share * boost
            optimiser.zero_grad(set_to_none=True)
        if total.requires_grad:
            total.backward()
        for optimiser, _ in self.optimisers:
            optimiser.step()
        entry = {"loss": float(total.detach())} | {name: float(part.detach()) for name, part in parts.items()}
        return entry | {"reconstruction": float(error.detach()) / self.weights["error"]}

    def _codes(self, rotated: Tensor, lists: Tensor | None, batch: Batch) -> Tensor | None:
        """Codes that are not the nearest ones: frozen, or under the uniform constraint."""
        if self.quantizer.columns is not None:
            codes = self._held(batch.rows)
            if self.step < SETTLED * self.specification.steps:
                codes = self.quantizer.improve(rotated, codes)
                assert self.codes is not None
                self.codes[batch.rows] = codes.cpu().numpy()
            return codes
        if self.specification.codes == "frozen":
            return self._held(batch.rows)
        if self.specification.codes == "uniform":
            with torch.no_grad():
                rest, _ = self.quantizer.residuals(rotated, lists)
                return uniform_codes(self.quantizer.distances(rest) + rest.square().sum(dim=2).T[:, :, None])
        return None

    def _held(self, rows: Any) -> Tensor:
        """The codes kept of some documents, int64 [rows, M]."""
        assert self.codes is not None
        return torch.from_numpy(self.codes[rows].astype(np.int64)).to(self.device)

    @torch.no_grad()
    def _settle(self) -> None:
        """The codes of all documents, also of those no step has drawn, before the codebooks' last steps."""
        assert self.codes is not None
        rotation = self.quantizer.rotation().T
        for start in range(0, len(self.documents), CODED_AT_ONCE):
            part = slice(start, start + CODED_AT_ONCE)
            rotated = torch.from_numpy(np.array(self.documents[part], np.float32)).to(self.device) @ rotation
            self.codes[part] = self.quantizer.improve(rotated, self._held(part), SWEEPS).cpu().numpy()

    @staticmethod
    def _listed(scores: Tensor, batch: Batch) -> Tensor:
        return scores if batch.places is None else scores.gather(1, batch.places)

    def _loss(self, scores: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        student = self._listed(scores, batch) / self.temperature
        total = torch.zeros(())
        for loss in self.losses:
            loss.at_step(self.step, self.specification.steps)
            total = total + loss.now(loss.weight) * loss(student, teacher / self.temperature, batch.labels, batch.mask)
        return total

    def _check_pairs(self) -> None:
        """Refuse losses over all pairs of lists too long for that, before the memory does."""
        spec, drawn = self.specification, self.specification.documents
        size = drawn.limit if drawn.in_batch else drawn.top + drawn.random + 1
        size = drawn.list_size or min(size, len(self.documents))
        pairs = min(spec.batch, len(self.sampler.vectors)) * size**2
        slow = next((loss.type for loss in self.losses if loss.over_pairs), None)
        if spec.relevance == "vectors" and pairs > MOST_PAIRS and slow is not None:
            taken = f"{spec.batch} lists of {size} documents would take {pairs * 4 / 2**30:.0f} GiB a tensor"
            what = f"the loss {slow} compares all pairs: {taken}"
            raise UsageError(what, where=f"{spec.name}: losses", fix="documents: {list_size: 64}")

    def _optimisers(self) -> list[tuple[torch.optim.Optimizer, list[float]]]:
        """Each with the rates of its groups."""
        spec, quantizer = self.specification, self.quantizer
        # Rates follow the scale of what they move, so that one default suits vectors of any length.
        groups: list[tuple[list[nn.Parameter], float]] = [
            ([quantizer.codebooks], spec.codebook_rate * float(quantizer.codebooks.detach().std()))
        ]
        for parameter, rate in ((quantizer.query_map, spec.query_rate), (quantizer.skew, spec.rotation_rate)):
            if parameter is not None:
                groups.append(([parameter], rate))
        if self.student is not None:
            groups.append((list(self.student.parameters()), spec.encoder_rate))
        adam = torch.optim.Adam([{"params": params, "lr": rate} for params, rate in groups], betas=(0.9, 0.98))
        optimisers: list[tuple[torch.optim.Optimizer, list[float]]] = [(adam, [rate for _, rate in groups])]
        if quantizer.centroids is not None and quantizer.centroids.weight.requires_grad:
            rate = spec.centroid_rate * float(quantizer.centroids.weight.detach().std())
            optimisers.append((torch.optim.SparseAdam([quantizer.centroids.weight], lr=rate), [rate]))
        return optimisers

    # -- the whole collection -----------------------------------------------------------------------------------------

    def _assign(self, keep: bool = False) -> None:
        """Each document to the list that the index would probe first for it."""
        if self.quantizer.centroids is None:
            return
        if not keep:
            lists = np.empty(len(self.documents), np.int64)
            for start in range(0, len(lists), BLOCK):
                block = np.asarray(self.documents[start : start + BLOCK], np.float32)
                lists[start : start + BLOCK], _ = self.quantizer.encode(block, by_residual=False)
            np.save(self.work / LISTS, lists)
        self.lists = torch.from_numpy(np.load(self.work / LISTS, allow_pickle=False))

    def _look_again(self, keep: bool = False) -> None:
        """The best documents of each query by the codes of the moment, where the specification wants them live."""
        if not self.specification.documents.live or self.sampler.top is None:
            return
        file = self.work / LIVE
        if keep and file.is_file():
            self.sampler.top = np.load(file, mmap_mode="r", allow_pickle=False)
            return
        with torch.no_grad():
            transform = self.quantizer.query_transform(folded=True).T
            asked = (self.sampler.vectors.to(self.device) @ transform).cpu().numpy()
        count, metric = self.sampler.top.shape[1], self.quantizer.metric
        self.sampler.top = best_documents(asked, len(self.documents), self._decoded, count, metric, file)

    @torch.no_grad()
    def _decoded(self, part: Any) -> NDArray[np.float32]:
        """Documents (a slice or rows) as the codes of the moment give them back, [n, d]."""
        quantizer, held = self.quantizer, None if self.codes is None else self._held(part)
        if held is not None and not quantizer.by_residual:
            decoded = quantizer.fold(quantizer.decode(held))
        else:
            lists, codes = quantizer.encode(np.asarray(self.documents[part], np.float32))
            decoded = quantizer.decode(
                torch.from_numpy(codes.astype(np.int64)).to(self.device) if held is None else held
            )
            if quantizer.by_residual and quantizer.centroids is not None and lists is not None:
                decoded = decoded + quantizer.centroids(torch.from_numpy(lists).to(self.device))
        array: NDArray[np.float32] = decoded.cpu().numpy()
        return array

    @torch.no_grad()
    def agreement(self) -> float | None:
        """Share of the exact first ten that the codes put into the first ten too, over held-out queries.

        Exhaustive over at most 65,536 documents drawn by the seed; none where no query was held out.
        """
        sampler, quantizer = self.sampler, self.quantizer
        if not len(sampler.held_out):
            return None
        random = np.random.default_rng(sampler.seed)
        count = len(self.documents)
        rows = np.arange(count) if count <= BLOCK else np.sort(random.choice(count, BLOCK, replace=False))
        queries = sampler.vectors[sampler.held_out].to(self.device)
        exact = sampler.similarities(queries, rows).topk(min(AGREEMENT, len(rows)), dim=1).indices
        if self.student is not None:
            queries = self._encode(sampler.held_out)
        decoded = torch.from_numpy(self._decoded(rows)).to(self.device)
        asked = queries @ quantizer.query_transform(folded=True).T
        by_codes = quantizer.score(asked, decoded).topk(exact.shape[1], dim=1).indices
        return float((exact[:, :, None] == by_codes[:, None, :]).any(dim=2).float().mean())

    # -- files --------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """A checkpoint, renamed into place when whole."""
        new = self.work / f"{CHECKPOINT}.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        state = {
            f"{prefix}{name}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for prefix, module in self.modules.items()
            for name, value in module.state_dict().items()
        }
        save_file(state, new / WEIGHTS)
        for number, (optimiser, _) in enumerate(self.optimisers):
            save_state(optimiser.state_dict(), new, f"optimiser_{number}")
        for name in (LISTS, LIVE):
            if (self.work / name).is_file():
                shutil.copy(self.work / name, new / name)
        if self.quantizer.columns is not None:
            np.save(new / CODES, np.asarray(self.codes))
        values = {"step": self.step, "weights": self.weights, "log": self.log, "temperature": self.temperature}
        write_atomically(new / STATE, json.dumps(values))
        final = self.work / f"{CHECKPOINT}-{self.step:08d}"
        shutil.rmtree(final, ignore_errors=True)  # a damaged one
        new.rename(final)
        for other in self._checkpoints()[1:]:
            shutil.rmtree(other, ignore_errors=True)
        self._write_log()

    def _checkpoints(self) -> list[Path]:
        """The latest first."""
        return sorted(self.work.glob(f"{CHECKPOINT}-*"), reverse=True)

    def _load(self) -> bool:
        for folder in self._checkpoints():
            try:
                values = json.loads((folder / STATE).read_text(encoding="utf-8"))
                tensors = load_file(folder / WEIGHTS)
                states = [load_state(folder, f"optimiser_{number}") for number in range(len(self.optimisers))]
            except (OSError, ValueError):
                continue
            for prefix, module in self.modules.items():
                names = [name for name in tensors if name.startswith(ENCODER) == bool(prefix)]
                module.load_state_dict({name.removeprefix(prefix): tensors[name] for name in names})
            for (optimiser, _), state in zip(self.optimisers, states, strict=True):
                optimiser.load_state_dict(state)
            for name in (LISTS, LIVE):
                if (folder / name).is_file():
                    shutil.copy(folder / name, self.work / name)
            if self.quantizer.columns is not None:
                assert self.codes is not None
                self.codes[:] = np.load(folder / CODES, allow_pickle=False)
            self.step, self.weights, self.log = values["step"], values["weights"], values["log"]
            self.temperature = values["temperature"]
            say(f"{self.specification.name}: going on from step {self.step}")
            return True
        return False

    def _write_log(self) -> None:
        write_atomically(self.work / LOG, "".join(json.dumps(entry) + "\n" for entry in self.log))


def _rate(step: int, steps: int, warmup: float) -> float:
    """Linear up over the warm-up, linear down to 2% at the end."""
    rising = (step + 1) / max(1.0, warmup * steps)
    return min(1.0, rising, max(0.02, 1 - step / steps))
