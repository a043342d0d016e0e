"""A trained tfmot model as an integer-only TFLite file, by TensorFlow's converter.

Importing this module needs tf_keras and tensorflow-model-optimization; see `_packages`.
"""

import tempfile

import tensorflow as tf
import tf_keras
from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.python.convert import ConverterError

from .twin import check_tf_keras, is_wrapped


def convert_model(model: tf_keras.Model) -> bytes:
    """Converts a quantized tf_keras model; see `convert`."""
    check_tf_keras(model)
    if not is_wrapped(model):
        raise ValueError(
            f"The model {model.name!r} is not quantized; call `quantize_model` with "
            'engine="tfmot" first.'
        )
    if len(model.inputs) != 1:
        raise ValueError(
            "Only models with one input can be converted. "
            f"Received: {[tensor.name for tensor in model.inputs]}"
        )
    several = len(model.outputs) > 1
    # With the batch fixed before tracing every shape is a constant.
    spec = tf.TensorSpec((1, *model.inputs[0].shape[1:]), tf.float32, name="images")

    @tf.function(input_signature=[spec])
    def serve(images):
        outputs = model(images, training=False)
        if not several:
            return {"outputs": outputs}
        return {f"outputs_{number}": output for number, output in enumerate(outputs)}

    module = tf.Module()
    # The variables must hang on the saved object to be frozen; the model itself would bring its
    # own functions, traced with an unknown batch.
    module.variables_of_model = model.variables
    module.serve = serve
    with tempfile.TemporaryDirectory(prefix="keras-effnet-") as folder:
        tf.saved_model.save(module, folder, signatures=serve.get_concrete_function())
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.inference_input_type = converter.inference_output_type = tf.uint8
        try:
            data = converter.convert()
        except (ConverterError, RuntimeError) as error:
            lines = [line.strip() for line in str(error).splitlines() if "error:" in line]
            reason = (lines or str(error).strip().splitlines() or ["no reason given"])[0]
            raise ValueError(f"The TFLite converter refuses {model.name!r}: {reason}") from error
    floats = float_tensors(data)
    if floats:
        raise ValueError(
            f"The file of {model.name!r} computes in float at {floats[:5]}: these tensors have no "
            "range. Layers that were added after quantization have none; add them to the float "
            "model and quantize that."
        )
    return data


def float_tensors(data: bytes) -> list[str]:
    """Returns the names of the float tensors of a TFLite file."""
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    kinds = (schema.TensorType.FLOAT32, schema.TensorType.FLOAT16)
    return [
        tensor.name.decode()
        for graph in model.subgraphs
        for tensor in graph.tensors
        if tensor.type in kinds
    ]
