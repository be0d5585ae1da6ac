"""What simple methods reach with the same frozen image features; the Q-Former should be above all of them.

nearest neighbour    the label of the most similar training picture, by the cosine of mean-centred pooled features
  whitened           the same after dividing out how pictures of one concept differ (within-concept covariance)
ridge                linear regression from pooled features to MiniLM embeddings of the captions

Pooled features are the mean, or the mean and the maximum, over the tokens of an image. numpy, double precision.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import BertModel

from blip2.checkpoints import frozen
from blip2.preprocessing.text import QFormerTokenizer

SHRINKAGE = 0.1  # of the within-concept covariance towards a multiple of the identity, so that it can be inverted
RIDGES = tuple(10.0**power for power in range(-1, 6))  # tried by generalised cross-validation
SENTENCE_MODEL = "minilm-l6-v2"
TEXTS_AT_ONCE = 64


def concept_scores(
    pictures: np.ndarray, gallery: np.ndarray, gallery_labels: Sequence[str], labels: Sequence[str]
) -> np.ndarray:
    """How near each picture is to each label: the cosine with the label's nearest picture in the gallery.

    Args:
        pictures: (P, D) features.
        gallery: (G, D) features of labelled pictures; their mean is taken off both.
        gallery_labels: G labels.
        labels: the C labels to choose from.

    Returns:
        (P, C); -inf for a label that no picture in the gallery has.
    """
    centre = gallery.mean(axis=0)
    similarity = _unit(pictures - centre) @ _unit(gallery - centre).T  # (P, G)
    column_of = {label: i for i, label in enumerate(labels)}
    scores = np.full((len(labels), len(pictures)), -np.inf)
    known = [(column_of[label], i) for i, label in enumerate(gallery_labels) if label in column_of]
    columns, rows = np.array(known, dtype=int).reshape(-1, 2).T
    np.maximum.at(scores, columns, similarity.T[rows])
    return scores.T


def whitening(features: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """The matrix W (D, D) after which pictures of one label scatter alike in all directions: features @ W.

    Args:
        features: (N, D).
        labels: N labels; those with one picture tell nothing.
    """
    _, group = np.unique(np.array(labels), return_inverse=True)
    sums = np.zeros((group.max() + 1, features.shape[1]))
    np.add.at(sums, group, features)
    sizes = np.bincount(group)
    inside = (features - (sums / sizes[:, None])[group])[sizes[group] > 1]  # (M, D)
    covariance = inside.T @ inside / max(len(inside), 1)
    level = np.trace(covariance) / len(covariance)
    values, vectors = np.linalg.eigh((1 - SHRINKAGE) * covariance + SHRINKAGE * level * np.eye(len(covariance)))
    return vectors / np.sqrt(values)


def ridge(
    inputs: np.ndarray, targets: np.ndarray, penalties: Sequence[float] = RIDGES
) -> Callable[[np.ndarray], np.ndarray]:
    """Linear regression with a quadratic penalty, chosen by generalised cross-validation.

    Args:
        inputs: (N, D), standardised within.
        targets: (N, E).
        penalties: to choose from.

    Returns:
        The fitted function (M, D) -> (M, E).
    """
    mean, scale = inputs.mean(axis=0), inputs.std(axis=0) + 1e-8
    standard = (inputs - mean) / scale
    offset = targets.mean(axis=0)
    left, values, right = np.linalg.svd(standard, full_matrices=False)
    projected = left.T @ (targets - offset)  # (D, E)

    def cross_validation(penalty: float) -> float:
        kept = values**2 / (values**2 + penalty)
        residual = ((targets - offset - left @ (kept[:, None] * projected)) ** 2).sum()
        return float(residual / (len(inputs) - kept.sum()) ** 2)

    penalty = min(penalties, key=cross_validation)
    weights = right.T @ ((values / (values**2 + penalty))[:, None] * projected)  # (D, E)
    return lambda rows: (rows - mean) / scale @ weights + offset


def ridge_scores(predicted: np.ndarray, text_embeds: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Cosines (I, T) of predicted embeddings (I, E) with those of texts (T, E), both less `centre` (E,)."""
    return _unit(predicted - centre) @ _unit(text_embeds - centre).T


@torch.inference_mode()
def sentence_embeddings(texts: Sequence[str], name: str = SENTENCE_MODEL) -> np.ndarray:
    """Sentence embeddings (T, E), unit length: the mean of a BERT's last hidden states, as MiniLM has it.

    Args:
        texts: T texts.
        name: of a text initialisation, or a BERT's folder.

    Raises:
        DownloadFailed: the package is not here and cannot be fetched.
    """
    start = frozen.load_text_init(name)
    model = BertModel(start.config, add_pooling_layer=False).eval()
    model.load_state_dict({name: start.state_dict[name] for name in model.state_dict()})
    tokenizer = QFormerTokenizer(start.tokenizer_file)
    embeds = []
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        batch = tokenizer.encode(texts[first : first + TEXTS_AT_ONCE])
        hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state  # (B, T, D)
        weight = batch.attention_mask[..., None].to(hidden.dtype)
        embeds.append((hidden * weight).sum(dim=1) / weight.sum(dim=1))  # (B, D)
    return _unit(torch.cat(embeds).double().numpy())


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
