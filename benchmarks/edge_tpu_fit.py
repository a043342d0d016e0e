"""Which variants a Coral Edge TPU takes, and which of them stay on its chip.

    python benchmarks/edge_tpu_fit.py [--overwrite]

Every variant is exported as int8 for Coral, at its own resolution, and the file is judged by the
table of the Edge TPU compiler's limits. Operators and sizes do not depend on the weights, so these
are random; two trained models go through the whole export command besides, which tells what is left
of their accuracy. Writes `benchmarks/results/edge_tpu_fit.json` and `.md`. Needs the photographs
and weights of ../shared beside the repository. No Edge TPU and no compiler take part.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import RESULTS, ROOT, SHARED, describe_machine, machine_line, write_whole

PACKAGES = ("keras-effnet", "keras", "tensorflow", "ai-edge-litert", "numpy")
# Larger ones would be sent to the chip more than eight times over for every image.
LARGEST = 70_000_000
# Arguments of the exports with trained weights; V1's photographs are as large as the crop.
TRAINED = {
    "EfficientNetB0, 5 flowers": [
        *("--model", "EfficientNetB0", "--classes", "5", "--crop", "center"),
        *("--weights", SHARED / "weights" / "efficientnetb0-flowers5.h5"),
        *("--calibration-data", SHARED / "data" / "flowers" / "calibration"),
        *("--evaluation-data", SHARED / "data" / "flowers" / "evaluation"),
    ],
    "EfficientNetV2B0, ImageNet": [
        *("--model", "EfficientNetV2B0"),
        *("--weights", SHARED / "weights" / "efficientnetv2-b0.h5"),
        *("--labels", SHARED / "data" / "imagenet-sample" / "classes.csv"),
        *("--calibration-data", SHARED / "data" / "imagenet-sample" / "calibration"),
        *("--evaluation-data", SHARED / "data" / "imagenet-sample" / "evaluation"),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    parser.add_argument("--variant", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(_judge(args.variant)))
        return
    target = RESULTS / "edge_tpu_fit.json"
    if target.exists() and not args.overwrite:
        sys.exit(f"{target} exists; pass --overwrite to replace it")

    from keras_effnet import list_models
    from keras_effnet.cli.check_tflite import variant_rows

    results = {"machine": describe_machine(PACKAGES), "variants": [], "trained": {}}
    for row in variant_rows(list_models()):
        if row["int8_bytes"] > LARGEST:
            continue
        print(f"{row['name']} …", file=sys.stderr)
        # In a process of its own, whose memory is given back.
        command = [sys.executable, __file__, "--variant", row["name"]]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results["variants"].append(row | json.loads(output.splitlines()[-1]))
    for name, arguments in TRAINED.items():
        print(f"{name} …", file=sys.stderr)
        results["trained"][name] = _export(arguments)
    text = _markdown(results)
    write_whole(target, json.dumps(results, indent=2) + "\n")
    write_whole(target.with_suffix(".md"), text)
    print(text)


def _judge(name: str) -> dict:
    """Exports a variant with random weights, and what the table says of the file."""
    import numpy as np

    from keras_effnet import create_model
    from keras_effnet.export import to_tflite
    from keras_effnet.quantization import QuantizationConfig, quantize_model

    model = create_model(name, weights=None)
    images = np.random.default_rng(0).integers(0, 256, (2, *model.input_shape[1:]))
    config = QuantizationConfig(method="min_max", corrections=(), per_channel_head=False)
    quantized = quantize_model(model, images.astype(np.float32), config, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        export = to_tflite(
            quantized,
            Path(folder) / "m.tflite",
            quantization="int8",
            io_dtype="uint8",
            target="coral",
        )
    verdict = export.verdict
    return {
        "operators": len(verdict.operators),
        "mapped": verdict.count("mapped"),
        "file_bytes": verdict.size,
        "parameter_bytes": verdict.parameter_bytes,
    }


def _export(arguments: list) -> dict:
    """Runs the export command, and what its report says."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, ROOT / "scripts" / "export_tflite.py", *arguments]
        command += ["--quantization", "int8", "--target", "coral", "--report", report]
        command += ["--output", Path(folder) / "m.tflite"]
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
        found = json.loads(report.read_text(encoding="utf-8"))
    [verdict] = (each for each in found["targets"] if each["target"] == "coral")
    reference, scores = found["accuracy"]
    return {
        "operators": verdict["mapped"] + verdict["at_risk"] + verdict["not_mapped"],
        "mapped": verdict["mapped"],
        "file_bytes": verdict["bytes"],
        "parameter_bytes": verdict["parameter_bytes"],
        "planned_bytes": found["sizes"]["int8_bytes"],
        "images": scores["images"],
        "float_top1": reference["top1"],
        "top1": scores["top1"],
        "agreement": scores["agreement"],
    }


def _markdown(results: dict) -> str:
    cache = results["variants"][0]["cache_bytes"]
    lines = [
        "# Variants on the Edge TPU",
        "",
        machine_line(results["machine"]),
        "",
        f"Of about 8 MB on the chip {cache / 1e6:.1f} MB are counted as free for parameters; what "
        "does not fit is sent for every image. By the table of the compiler's limits in "
        "`export/targets.py`, without an Edge TPU. Written by `benchmarks/edge_tpu_fit.py`.",
        "",
        "| variant | input | operators mapped | planned bytes | in the file | on chip |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in results["variants"]:
        lines.append(
            f"| `{row['name']}` | {row['resolution']} | {row['mapped']} of {row['operators']} | "
            f"{row['int8_bytes']:,} | {row['parameter_bytes']:,} | {row['share']:.0%} |"
        )
    lines += [
        "",
        "With trained weights, as `export-tflite --target coral` writes them:",
        "",
        "| model | operators mapped | planned bytes | in the file | images | float top-1 | top-1 "
        "| agreement |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in results["trained"].items():
        lines.append(
            f"| {name} | {row['mapped']} of {row['operators']} | {row['planned_bytes']:,} | "
            f"{row['parameter_bytes']:,} | {row['images']} | {row['float_top1']:.1%} | "
            f"{row['top1']:.1%} | {row['agreement']:.1%} |"
        )
    lines += [
        "",
        "The parameters of the file are those of the plan, and what equalization and the "
        "normalization at the input add.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
