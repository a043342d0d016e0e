"""Batch norms of networks with random weights."""

import keras


def settle(model, x):
    """Gives every batch norm the statistics of what it reads for `x`.

    Under random statistics the activations of a deep network grow until the gates of its
    squeeze-and-excites are 0 or 1 by chance of rounding, which no two backends share.
    """
    norms = [each for each in model.layers if isinstance(each, keras.layers.BatchNormalization)]
    momentum = norms[0].momentum
    for norm in norms:
        norm.momentum = 0.0
    model(x, training=True)
    for norm in norms:
        norm.momentum = momentum
