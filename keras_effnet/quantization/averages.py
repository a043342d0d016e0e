"""Moving averages of weights that an optimizer keeps (`use_ema=True`)."""

import contextlib
from collections.abc import Iterator

import keras


@contextlib.contextmanager
def averaged_weights(model: keras.Model) -> Iterator[None]:
    """Puts the moving averages of the weights into a model, where its optimizer keeps them.

    At the end of the block the model has its own weights again.
    """
    own = [keras.ops.convert_to_numpy(variable) for variable in model.trainable_variables]
    use_averages(model)
    try:
        yield
    finally:
        for variable, value in zip(model.trainable_variables, own, strict=True):
            variable.assign(value)


def use_averages(model: keras.Model) -> None:
    """Replaces the weights of a model by their moving averages, where its optimizer keeps them."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if not optimizer.use_ema:
        return
    averages = optimizer._model_variables_moving_average
    for variable, average in zip(optimizer._trainable_variables, averages, strict=True):
        variable.assign(keras.ops.convert_to_numpy(average))
