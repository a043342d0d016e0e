"""One device, or several that train as one (data-parallel), with the engines that Keras has.

On JAX that is `keras.distribution.DataParallel`; on TensorFlow `tf.distribute`, over the devices
of one machine (MirroredStrategy) or of several (MultiWorkerMirroredStrategy, where TF_CONFIG names
them). Each step's batch is divided evenly, and batch norms use the statistics of the whole batch,
so the result is that of one device with the same batch, up to the order of sums.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from keras_effnet.training.batches import Batch

# Makes some rows of every batch.
Produce = Callable[[slice], Iterator[Batch]]


class Replicas:
    """One device, or, on JAX, all of one machine.

    Attributes:
        count: Devices; the batch size must be a multiple of it.
        writes: Whether this process writes files: of several, the first one does.
        several_processes: Whether there are others.
        description: For people.
    """

    count = 1
    writes = True
    several_processes = False
    description = "one device"

    def scope(self) -> contextlib.AbstractContextManager:
        """In which model and optimizer are made."""
        return contextlib.nullcontext()

    def adapt(self, model: keras.Model) -> None:
        """Lets layers that look at the whole batch do so across devices."""

    def check_batch_size(self, batch_size: int) -> None:
        """Raises ValueError if a batch cannot be divided among the devices."""
        if batch_size % self.count:
            raise ValueError(
                f"The batch size must be a multiple of the {self.count} devices. "
                f"Received: {batch_size}"
            )

    def check_same(self, model: keras.Model) -> None:
        """Checks that all processes hold the same model, whose weights each made for itself.

        Raises:
            ValueError: If they do not. All processes raise it.
        """

    def feed(
        self, produce: Produce, size: tuple[int, int], targets: int, batch_size: int
    ) -> Iterator[Any]:
        """Starts a pass over images: batches in the form that `train` and `test` take.

        Args:
            produce: Yields those rows of every batch that it is asked for.
            size: (height, width) of the images.
            targets: Values of an image's target.
            batch_size: Images of a batch, over all devices.
        """
        return produce(slice(None))

    def train(self, model: keras.Model, batch: Any) -> dict[str, float]:
        """Does one step. Returns its loss and metrics."""
        logs = model.train_on_batch(*batch, return_dict=True)
        return {name: float(value) for name, value in logs.items()}

    def test(self, model: keras.Model, batches: Iterator[Any]) -> dict[str, float]:
        """Returns the weighted metrics of a model over batches."""
        sums: dict[str, float] = {}
        total = 0.0
        for batch in batches:
            logs = model.test_on_batch(*batch, return_dict=True)
            weight = float(batch.weights.sum())
            total += weight
            for name, value in logs.items():
                sums[name] = sums.get(name, 0.0) + weight * float(value)
        return {name: value / total for name, value in sums.items() if name != "loss"}


class JaxReplicas(Replicas):
    """All devices of one machine, on the JAX backend."""

    def __init__(self) -> None:
        devices = keras.distribution.list_devices()
        self.count = len(devices)
        self.description = f"{self.count} devices (keras.distribution.DataParallel)"
        self._distribution = keras.distribution.DataParallel(devices=devices)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        # Steps look it up again, so it is not taken back at the end of the scope.
        keras.distribution.set_distribution(self._distribution)
        yield


class TensorFlowReplicas(Replicas):
    """The devices of one machine or of several, on the TensorFlow backend.

    Keras' own `fit` refuses MultiWorkerMirroredStrategy (it reduces scalars along an axis), so
    its `train_step` is run on the replicas here, and its results are reduced.
    """

    def __init__(self) -> None:
        import tensorflow as tf

        workers = _workers()
        if len(workers) > 1:
            self._strategy = tf.distribute.MultiWorkerMirroredStrategy()
            self.several_processes = True
            resolver = self._strategy.cluster_resolver
            self.writes = resolver.task_type == "chief" or (
                resolver.task_id == 0 and "chief" not in resolver.cluster_spec().jobs
            )
        else:
            kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
            devices = [device.name for device in tf.config.list_logical_devices(kind)]
            self._strategy = tf.distribute.MirroredStrategy(devices)
        self.count = self._strategy.num_replicas_in_sync
        self.description = (
            f"{self.count} devices in {max(1, len(workers))} "
            f"{'processes' if len(workers) > 1 else 'process'} "
            f"(tf.distribute.{type(self._strategy).__name__})"
        )
        self._steps: dict[Any, Callable[[Any], Any]] = {}

    def scope(self) -> contextlib.AbstractContextManager:
        return self._strategy.scope()

    def adapt(self, model: keras.Model) -> None:
        for layer in model._flatten_layers(include_self=False):
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = True

    def check_same(self, model: keras.Model) -> None:
        import tensorflow as tf

        if not self.several_processes:
            return
        digest = hashlib.sha256(json.dumps(model.get_config(), sort_keys=True).encode())
        for weight in model.get_weights():
            digest.update(np.ascontiguousarray(weight).data)
        # Sums of these, and of their squares, are exact in float64.
        numbers = np.frombuffer(digest.digest(), np.uint16).astype(np.float64)
        own = np.concatenate([numbers, numbers**2])

        @tf.function
        def mean() -> Any:
            values = self._strategy.run(lambda: tf.constant(own))
            return self._strategy.reduce("MEAN", values, axis=None)

        # Where all are alike, the mean of the squares is the square of the mean.
        first, second = np.split(mean().numpy(), 2)
        if np.any(second != first**2):
            raise ValueError(
                f"The {len(_workers())} processes hold different models. Start each with the same "
                "command, files and versions, on machines with processors of one kind."
            )

    def feed(
        self, produce: Produce, size: tuple[int, int], targets: int, batch_size: int
    ) -> Iterator[Any]:
        import tensorflow as tf

        each = batch_size // self.count
        shapes = ((each, *size, 3), (each, targets), (each,))
        signature = tuple(tf.TensorSpec(shape, tf.float32) for shape in shapes)

        def of_process(context: Any) -> Any:
            share = batch_size // context.num_input_pipelines
            start = context.input_pipeline_id * share

            def replica_batches() -> Iterator[tuple[np.ndarray, ...]]:
                # One after the other for each device of this process.
                for batch in produce(slice(start, start + share)):
                    for first in range(0, share, each):
                        yield tuple(part[first : first + each] for part in batch)

            data = tf.data.Dataset.from_generator(replica_batches, output_signature=signature)
            return data.prefetch(share // each)

        return iter(self._strategy.distribute_datasets_from_function(of_process))

    def train(self, model: keras.Model, batch: Any) -> dict[str, float]:
        model.reset_metrics()
        logs = self._run(model, model.train_step, batch)
        return {name: float(value) for name, value in logs.items()}

    def test(self, model: keras.Model, batches: Iterator[Any]) -> dict[str, float]:
        model.reset_metrics()
        for batch in batches:
            self._run(model, model.test_step, batch)
        # Read outside the replicas, metrics add up over all of them.
        logs = model.get_metrics_result()
        return {name: float(value) for name, value in logs.items() if name != "loss"}

    def _run(self, model: keras.Model, step: Callable[[Any], Any], batch: Any) -> Any:
        import tensorflow as tf

        key = (model.optimizer, step.__name__)
        if key not in self._steps:

            @tf.function
            def run(batch: Any) -> Any:
                logs = self._strategy.run(step, args=(batch,))
                return {
                    name: self._strategy.reduce("MEAN", value, axis=None)
                    for name, value in logs.items()
                }

            self._steps[key] = run
        return self._steps[key](batch)


def make_replicas(distribute: bool) -> Replicas:
    """What a training runs on.

    Args:
        distribute: Whether to use all devices of this machine, or, on TensorFlow, of all machines
            that the environment variable TF_CONFIG names. It must be called before anything is
            computed: TensorFlow connects the machines first.

    Returns:
        The devices.

    Raises:
        ValueError: If the backend cannot, or if there is only one device.
    """
    if not distribute:
        return Replicas()
    backend = keras.backend.backend()
    if backend == "jax":
        replicas = JaxReplicas()
    elif backend == "tensorflow":
        replicas = TensorFlowReplicas()
    else:
        raise ValueError(
            "Keras has no data-parallel training on PyTorch. Set KERAS_BACKEND=jax (all devices of "
            "one machine) or KERAS_BACKEND=tensorflow (of several machines, too), or train on one "
            f"device. Received: the backend {backend!r}"
        )
    if replicas.count < 2:
        raise ValueError(
            "Data-parallel training needs two or more devices, and there is one. Train without it; "
            "on several machines, set TF_CONFIG on each."
        )
    return replicas


def _workers() -> list[str]:
    """Addresses of the processes that TF_CONFIG names."""
    text = os.environ.get("TF_CONFIG", "{}")
    try:
        cluster = json.loads(text).get("cluster", {})
        return [*cluster.get("chief", ()), *cluster.get("worker", ())]
    except (ValueError, AttributeError) as error:
        raise ValueError(
            "The environment variable TF_CONFIG must hold JSON such as "
            '{"cluster": {"worker": ["host1:12345", "host2:12345"]}, "task": {"type": "worker", '
            f'"index": 0}}}}. Received: {text!r}'
        ) from error
