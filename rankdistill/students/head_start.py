"""Where a head that was made starts from: biases that leave a text the terms that stand out in it.

A head tied to an encoder's word embeddings gives nearly every term a logit above 0, so nearly all of the vocabulary is
active in every text, and a regulariser spends the training on that alone. But what a logit exceeds its own mean by says
which terms a text is about, without any training. So each term's bias takes off its mean logit and so many of its
standard deviations that a document keeps a given number of terms. A masked-language warm-up cannot bring this about:
softmax does not see a level that all terms share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from rankdistill.collections import Collection

DOCUMENTS = 512  # looked at
TEXTS = 32  # at a time
DEAD = -1e4  # bias of tokens that are no words


def sample_documents(collection: Collection, most: int = DOCUMENTS) -> list[str]:
    """Documents spread evenly over a collection."""
    rows = np.unique(np.linspace(0, collection.document_count - 1, most).astype(np.int64))
    return collection.document_texts(rows)


@torch.no_grad()
def start_biases(
    hidden: Sequence[tuple[Tensor, Tensor]], weight: Tensor, terms: int, special: Sequence[int] = ()
) -> Tensor:
    """Biases [vocabulary] with which documents have `terms` active terms on average, under max pooling.

    Args:
        hidden: of some documents, a part at a time: ([texts, tokens, width] what the head's last map is applied to,
            [texts, tokens] which tokens count).
        weight: [vocabulary, width] of that map.
        special: tokens that are no words: never active.
    """
    weight = weight.float()
    tokens = torch.cat([made[mask.bool()] for made, mask in hidden]).float()
    centre = tokens.mean(dim=0)
    spread = (tokens - centre).T @ (tokens - centre) / len(tokens)  # covariance [width, width]
    mean = weight @ centre
    deviation = ((weight @ spread) * weight).sum(dim=1).clamp(min=1e-12).sqrt()
    words = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    words[list(special)] = False
    highest = []  # of each document: how many standard deviations a term's best logit is above its mean
    for made, mask in hidden:
        for text, counts in zip(made, mask.bool(), strict=True):
            if counts.any():
                logits = text[counts].float() @ weight.T
                highest.append(((logits.amax(dim=0) - mean) / deviation)[words])
    cut = min(len(highest) * terms, sum(map(len, highest)))
    threshold = torch.cat(highest).topk(cut).values[-1] if cut else torch.zeros(())
    biases = -mean - threshold * deviation
    biases[~words] = DEAD
    return biases
