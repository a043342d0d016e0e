"""Training: phases and schedules, augmentation, checkpoints that resume, several devices."""

from .augmentation import OPERATIONS, Mix, rand_augment, vary
from .batches import Batch, EvaluationBatches, Images, TrainingBatches, balanced_weights
from .checkpoint import Position, read_position, restore_checkpoint, save_checkpoint
from .config import AugmentationConfig, Phase, TrainingConfig
from .curves import draw_curves, write_log
from .determinism import make_deterministic
from .folder import differences, fingerprint, open_folder
from .loop import NonFiniteLossError, Observer, Result, train
from .replicas import Replicas, make_replicas

__all__ = [
    "OPERATIONS",
    "AugmentationConfig",
    "Batch",
    "EvaluationBatches",
    "Images",
    "Mix",
    "NonFiniteLossError",
    "Observer",
    "Phase",
    "Position",
    "Replicas",
    "Result",
    "TrainingBatches",
    "TrainingConfig",
    "balanced_weights",
    "differences",
    "draw_curves",
    "fingerprint",
    "make_deterministic",
    "make_replicas",
    "open_folder",
    "rand_augment",
    "read_position",
    "restore_checkpoint",
    "save_checkpoint",
    "train",
    "vary",
    "write_log",
]
