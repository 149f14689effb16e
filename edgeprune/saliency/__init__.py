"""The value of every channel and every block: one function a criterion, registered by name. Higher = keep, never < 0.

The criteria lie in files by what they look at: `weights`, `batch_norms`, `activations`, `reconstruction`, `gradients`,
`curvature`, `losses`, `blocks`. docs/criteria.md lists them.
"""

from __future__ import annotations

from edgeprune.saliency import activations as activations
from edgeprune.saliency import batch_norms as batch_norms
from edgeprune.saliency import curvature as curvature
from edgeprune.saliency import gradients as gradients
from edgeprune.saliency import losses as losses
from edgeprune.saliency import reconstruction as reconstruction
from edgeprune.saliency import weights as weights
from edgeprune.saliency.blocks import drop_costs
from edgeprune.saliency.normalising import NORMALISATIONS, Normalisation, normalised
from edgeprune.saliency.registry import CRITERIA, Criterion, Saliency, Values, check_data, criterion, score

__all__ = [
    "CRITERIA",
    "NORMALISATIONS",
    "Criterion",
    "Normalisation",
    "Saliency",
    "Values",
    "check_data",
    "criterion",
    "drop_costs",
    "normalised",
    "score",
]
