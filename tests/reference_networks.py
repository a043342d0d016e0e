"""Forward passes of other projects' EfficientNets, written from their code, for the converters.

They share nothing with the package: own tables, own rounding, `torch.nn.functional` or `tf.nn` for
the arithmetic. A pass makes up every tensor when it first needs it, under the name that the project
gives it, so that one run yields both a checkpoint and the output that belongs to it. Batch norms
get about the statistics of what they read: activations then stay in range through any depth.
"""

import math

import numpy as np

# kind, repeats, kernel, stride, expansion, channels in, channels out, squeeze-and-excite
V1 = """
    mb 1 3 1 1  32  16 0.25
    mb 2 3 2 6  16  24 0.25
    mb 2 5 2 6  24  40 0.25
    mb 3 3 2 6  40  80 0.25
    mb 3 5 1 6  80 112 0.25
    mb 4 5 2 6 112 192 0.25
    mb 1 3 1 6 192 320 0.25
"""
LITE = V1.replace("0.25", "0")
EDGETPU = """
    fused 1 3 1 4  24  24 0
    fused 2 3 2 8  24  32 0
    fused 4 3 2 8  32  48 0
    mb    5 5 2 8  48  96 0
    mb    4 5 1 8  96 144 0
    mb    2 5 2 8 144 192 0
"""
V2_BASE = """
    fused 1 3 1 1  32  16 0
    fused 2 3 2 4  16  32 0
    fused 2 3 2 4  32  48 0
    mb    3 3 2 4  48  96 0.25
    mb    5 3 1 6  96 112 0.25
    mb    8 3 2 6 112 192 0.25
"""
V2_S = """
    fused  2 3 1 1  24  24 0
    fused  4 3 2 4  24  48 0
    fused  4 3 2 4  48  64 0
    mb     6 3 2 4  64 128 0.25
    mb     9 3 1 6 128 160 0.25
    mb    15 3 2 6 160 256 0.25
"""

# Kernels so small that the variances behind them are about 1e-2: the epsilon of a batch norm, 1e-5
# or 1e-3, then shows in what it computes.
_KERNEL_SCALE = 0.1


def rounded(channels, width, floor):
    """Channels to a multiple of 8, never below `floor` of what was asked."""
    channels *= width
    result = max(8, int(channels + 4) // 8 * 8)
    return result + 8 if result < floor * channels else result


class Tensors:
    """Tensors by name, made up at first use; NumPy in the layout of the project."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.values = {}

    def normal(self, name, shape, scale):
        self.values[name] = (scale * self.rng.normal(size=shape)).astype("float32")
        return self.values[name]

    def norm(self, names, mean, variance):
        """Scale, offset, mean and variance of a batch norm that reads such values."""
        shape = mean.shape
        made = (
            self.rng.uniform(0.7, 1.3, shape),
            self.rng.normal(0, 0.2, shape),
            mean + np.sqrt(variance) * self.rng.normal(0, 0.1, shape),
            variance * self.rng.uniform(0.8, 1.2, shape),
        )
        for name, value in zip(names, made, strict=True):
            self.values[name] = value.astype("float32")
        return [self.values[name] for name in names]


class Torch:
    """PyTorch's functions on `(batch, channels, height, width)`."""

    def __init__(self, tensors, epsilon, same):
        import torch

        self.torch, self.tensors = torch, tensors
        self.epsilon, self.same = epsilon, same
        functional = torch.nn.functional
        self.activations = {
            "swish": functional.silu,
            "relu6": functional.relu6,
            "relu": functional.relu,
        }

    def image(self, x):
        return self.torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))

    def channels(self, x):
        return x.shape[1]

    def conv(self, x, name, filters, kernel, stride=1, depthwise=False, bias=False):
        functional = self.torch.nn.functional
        fan_in = kernel * kernel * (1 if depthwise else x.shape[1])
        shape = (filters, 1 if depthwise else x.shape[1], kernel, kernel)
        weight = self.tensors.normal(f"{name}.weight", shape, self.scale(fan_in, bias))
        offset = self.tensors.normal(f"{name}.bias", (filters,), 0.5) if bias else None
        padding = kernel // 2
        if self.same:  # The missing rows are shared out, the odd one at the end.
            need = [
                max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
                for side in x.shape[2:]
            ]
            (top, left), padding = (need[0] // 2, need[1] // 2), 0
            x = functional.pad(x, (left, need[1] - left, top, need[0] - top))
        return functional.conv2d(
            x,
            self.torch.from_numpy(weight),
            None if offset is None else self.torch.from_numpy(offset),
            stride,
            padding,
            groups=filters if depthwise else 1,
        )

    def scale(self, fan_in, bias):
        return 1 / math.sqrt(fan_in) if bias else _KERNEL_SCALE * math.sqrt(2 / fan_in)

    def norm(self, x, name):
        names = [f"{name}.{key}" for key in ("weight", "bias", "running_mean", "running_var")]
        mean, variance = x.mean((0, 2, 3)).numpy(), x.var((0, 2, 3)).numpy()
        scale, offset, mean, variance = map(
            self.torch.from_numpy, self.tensors.norm(names, mean, variance)
        )
        self.tensors.values[f"{name}.num_batches_tracked"] = np.array(7, "int64")
        return self.torch.nn.functional.batch_norm(
            x, mean, variance, scale, offset, eps=self.epsilon
        )

    def pooled(self, x):
        return x.mean((2, 3), keepdim=True)

    def sigmoid(self, x):
        return self.torch.sigmoid(x)

    def dense(self, x, name, units):
        x = x.mean((2, 3))
        weight = self.tensors.normal(
            f"{name}.weight", (units, x.shape[1]), 1 / math.sqrt(x.shape[1])
        )
        bias = self.tensors.normal(f"{name}.bias", (units,), 0.5)
        linear = self.torch.nn.functional.linear
        x = linear(x, self.torch.from_numpy(weight), self.torch.from_numpy(bias))
        return self.torch.softmax(x, -1).numpy()


class TensorFlow:
    """TensorFlow's functions on `(batch, height, width, channels)`."""

    epsilon = 1e-3

    def __init__(self, tensors):
        import tensorflow as tf

        self.tf, self.tensors = tf, tensors
        self.activations = {
            "swish": tf.nn.silu,
            "relu6": tf.nn.relu6,
            "relu": tf.nn.relu,
        }

    def image(self, x):
        return self.tf.constant(x)

    def channels(self, x):
        return x.shape[3]

    def conv(self, x, name, filters, kernel, stride=1, depthwise=False, bias=False):
        channels = x.shape[3]
        fan_in = kernel * kernel * (1 if depthwise else channels)
        scale = 1 / math.sqrt(fan_in) if bias else _KERNEL_SCALE * math.sqrt(2 / fan_in)
        strides = [1, stride, stride, 1]
        if depthwise:
            shape = (kernel, kernel, channels, 1)
            weight = self.tensors.normal(f"{name}/depthwise_kernel", shape, scale)
            return self.tf.nn.depthwise_conv2d(x, weight, strides, "SAME")
        shape = (kernel, kernel, channels, filters)
        weight = self.tensors.normal(f"{name}/kernel", shape, scale)
        x = self.tf.nn.conv2d(x, weight, strides, "SAME")
        return x + self.tensors.normal(f"{name}/bias", (filters,), 0.5) if bias else x

    def norm(self, x, name):
        names = [f"{name}/{key}" for key in ("gamma", "beta", "moving_mean", "moving_variance")]
        mean, variance = (each.numpy() for each in self.tf.nn.moments(x, (0, 1, 2)))
        scale, offset, mean, variance = self.tensors.norm(names, mean, variance)
        return self.tf.nn.batch_normalization(x, mean, variance, offset, scale, self.epsilon)

    def pooled(self, x):
        return self.tf.reduce_mean(x, (1, 2), keepdims=True)

    def sigmoid(self, x):
        return self.tf.sigmoid(x)

    def dense(self, x, name, units):
        x = self.tf.reduce_mean(x, (1, 2))
        kernel = self.tensors.normal(
            f"{name}/kernel", (x.shape[1], units), 1 / math.sqrt(x.shape[1])
        )
        bias = self.tensors.normal(f"{name}/bias", (units,), 0.5)
        return self.tf.nn.softmax(x @ kernel + bias).numpy()


# --- Names ------------------------------------------------------------------------------------


class TimmNames:
    stem, stem_norm, top, top_norm, head = "conv_stem", "bn1", "conv_head", "bn2", "classifier"

    def block(self, index, stage, within, kind, expands, excites):
        at = f"blocks.{stage}.{within}."
        names = {"reduce": f"{at}se.conv_reduce", "expand_gate": f"{at}se.conv_expand"}
        if kind == "fused":
            inner = (("expand", "conv_exp", "bn1"), ("project", "conv_pwl", "bn2"))
            inner = inner if expands else (("project", "conv", "bn1"),)
        elif expands:
            inner = (
                ("expand", "conv_pw", "bn1"),
                ("depthwise", "conv_dw", "bn2"),
                ("project", "conv_pwl", "bn3"),
            )
        else:
            inner = (("depthwise", "conv_dw", "bn1"), ("project", "conv_pw", "bn2"))
        return names | {role: (at + conv, at + norm) for role, conv, norm in inner}


class TorchvisionNames:
    stem, stem_norm, head = "features.0.0", "features.0.1", "classifier.1"

    def __init__(self, stages):
        self.top, self.top_norm = f"features.{stages + 1}.0", f"features.{stages + 1}.1"

    def block(self, index, stage, within, kind, expands, excites):
        at = f"features.{stage + 1}.{within}.block."
        roles = ["expand"] * expands + ["depthwise"] * (kind == "mb")
        roles += ["gate"] * excites + ["project"]
        place = {role: f"{at}{position}" for position, role in enumerate(roles)}
        names = {role: (f"{module}.0", f"{module}.1") for role, module in place.items()}
        if excites:
            names |= {"reduce": f"{place['gate']}.fc1", "expand_gate": f"{place['gate']}.fc2"}
        return names


class LukemelasNames:
    stem, stem_norm, top, top_norm, head = "_conv_stem", "_bn0", "_conv_head", "_bn1", "_fc"

    def block(self, index, stage, within, kind, expands, excites):
        at = f"_blocks.{index}."
        return {
            "expand": (f"{at}_expand_conv", f"{at}_bn0"),
            "depthwise": (f"{at}_depthwise_conv", f"{at}_bn1"),
            "project": (f"{at}_project_conv", f"{at}_bn2"),
            "reduce": f"{at}_se_reduce",
            "expand_gate": f"{at}_se_expand",
        }


class TensorFlowNames:
    def __init__(self, scope):
        self.scope = scope
        norm = "tpu_batch_normalization"
        self.stem, self.stem_norm = f"{scope}/stem/conv2d", f"{scope}/stem/{norm}"
        self.top, self.top_norm = f"{scope}/head/conv2d", f"{scope}/head/{norm}"
        self.head = f"{scope}/head/dense"

    def block(self, index, stage, within, kind, expands, excites):
        at, norm = f"{self.scope}/blocks_{index}/", "tpu_batch_normalization"
        names = {"reduce": f"{at}se/conv2d", "expand_gate": f"{at}se/conv2d_1"}
        if kind == "fused":
            first = ("conv2d", norm)
            inner = {"expand": first, "project": ("conv2d_1", f"{norm}_1")}
            inner = inner if expands else {"project": first}
        elif expands:
            inner = {
                "expand": ("conv2d", norm),
                "depthwise": ("depthwise_conv2d", f"{norm}_1"),
                "project": ("conv2d_1", f"{norm}_2"),
            }
        else:
            inner = {
                "depthwise": ("depthwise_conv2d", norm),
                "project": ("conv2d", f"{norm}_1"),
            }
        return names | {role: (at + conv, at + bn) for role, (conv, bn) in inner.items()}


# --- The network ------------------------------------------------------------------------------


def run(
    ops,
    names,
    table,
    x,
    *,
    classes,
    width=1.0,
    depth=1.0,
    stem=32,
    activation="swish",
    floor=0.9,
    fixed_ends=False,
    strided_projections=False,
    skipless=(),
):
    """Probabilities of a network for transformed images `(batch, height, width, 3)`.

    Args:
        ops: `Torch` or `TensorFlow`.
        names: Of the project.
        table: One of the tables above.
        x: Images after the input transform.
        classes: Outputs.
        width: Coefficient.
        depth: Coefficient.
        stem: Channels of the stem before scaling.
        activation: Its name in `ops`.
        floor: Of the rounding of channels: 0.9 in V1, 0 in V2.
        fixed_ends: Whether stem, head, and the repeats of the first and last stage are not scaled.
        strided_projections: Whether fused blocks stride in the 1x1 projection.
        skipless: Stages (from 0) without skip connections.
    """
    act = ops.activations[activation]

    def scaled(channels):
        return rounded(channels, width, floor)

    rows = [line.split() for line in table.strip().splitlines()]
    x = ops.image(x)
    x = ops.conv(x, names.stem, stem if fixed_ends else scaled(stem), 3, 2)
    x = act(ops.norm(x, names.stem_norm))
    index = 0
    for stage, (kind, *numbers, ratio) in enumerate(rows):
        repeats, kernel, stride, expansion, into, out = map(int, numbers)
        if not (fixed_ends and stage in (0, len(rows) - 1)):
            repeats = math.ceil(repeats * depth)
        for within in range(repeats):
            strides = stride if within == 0 else 1
            declared = scaled(into if within == 0 else out)
            inner = declared * expansion if expansion != 1 else ops.channels(x)
            reduced = max(1, int(declared * float(ratio))) if float(ratio) else 0
            place = names.block(index, stage, within, kind, expansion != 1, bool(reduced))
            before, own_stride = x, strides
            if expansion != 1:
                fused = kind == "fused"
                step = strides if fused and not strided_projections else 1
                conv, norm = place["expand"]
                x = act(ops.norm(ops.conv(x, conv, inner, kernel if fused else 1, step), norm))
                own_stride = strides // step if fused else strides
            if kind == "mb":
                conv, norm = place["depthwise"]
                x = ops.conv(x, conv, inner, kernel, strides, depthwise=True)
                x, own_stride = act(ops.norm(x, norm)), 1
            if reduced:
                gate = act(ops.conv(ops.pooled(x), place["reduce"], reduced, 1, bias=True))
                gate = ops.conv(gate, place["expand_gate"], inner, 1, bias=True)
                x = x * ops.sigmoid(gate)
            conv, norm = place["project"]
            whole = kind == "fused" and expansion == 1
            x = ops.conv(x, conv, scaled(out), kernel if whole else 1, own_stride)
            x = ops.norm(x, norm)
            x = act(x) if whole else x
            if strides == 1 and ops.channels(before) == scaled(out) and stage not in skipless:
                x = x + before
            index += 1
    x = ops.conv(x, names.top, 1280 if fixed_ends else scaled(1280), 1)
    x = act(ops.norm(x, names.top_norm))
    return ops.dense(x, names.head, classes)


def write_checkpoint(prefix, tensors):
    """Writes a checkpoint of TensorFlow with tensors of these names; returns its prefix."""
    import tensorflow as tf

    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(tensors),
        shape_and_slices=[""] * len(tensors),
        tensors=list(tensors.values()),
    )
    return prefix
