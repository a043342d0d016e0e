"""The same bits on every run, where an accelerator would not give them by itself."""

from __future__ import annotations

import keras


def make_deterministic() -> None:
    """Makes the backend choose deterministic algorithms, for the whole process; they are slower.

    On a CPU, TensorFlow and JAX are deterministic without it.

    Raises:
        ValueError: On JAX, which reads this from the environment when it starts.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        # It refuses random operations until there is a seed.
        keras.utils.set_random_seed(0)
        tf.config.experimental.enable_op_determinism()
    elif backend == "torch":
        import torch

        torch.use_deterministic_algorithms(True)
    else:
        raise ValueError(
            "JAX is made deterministic by the environment: set "
            "XLA_FLAGS=--xla_gpu_deterministic_ops=true before it starts. "
            f"Received: the backend {backend!r}"
        )
