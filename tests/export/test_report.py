import json
from pathlib import Path

import pytest

from keras_effnet.export import ExportReport, TFLiteExport, read_tflite, write_report
from keras_effnet.export.report import ImagesUsed, agreement_warning
from keras_effnet.export.verify import MIN_AGREEMENT, Scores


def scores(agreement):
    return Scores("m.tflite", 200, 0.8, None, agreement, 0.01, 0.2, 20.0)


@pytest.fixture
def report(int8_bytes):
    return ExportReport(
        command=("keras-effnet", "export-tflite"),
        model={"name": "small", "weights": "w.h5", "input_shape": [16, 16, 3], "classes": 7},
        export=TFLiteExport(Path("m.tflite"), "int8", "uint8", read_tflite(int8_bytes)),
        calibration=ImagesUsed("photos", 9, True, (("photos/a.jpg", "truncated"),)),
        verification=ImagesUsed("others", 200, True),
        scores=(scores(1.0), scores(0.5)),
        seconds={"conversion": 1.26},
        warnings=("Beware",),
    )


def test_writes_every_key_of_the_schema(report, tmp_path):
    path = write_report(tmp_path / "r.json", report)
    written = json.loads(path.read_text())
    assert sorted(written) == sorted(
        "schema command versions model quantizer file calibration verification accuracy seconds "
        "warnings thresholds failures worst_images targets layers sizes".split()
    )
    documented = ExportReport.__doc__
    assert all(f"`{key}`" in documented for key in (*written, *written["file"]))
    assert written["command"] == ["keras-effnet", "export-tflite"]
    assert {"python", "keras", "tensorflow", "ai-edge-litert"} <= set(written["versions"])
    assert written["file"]["bytes"] == report.export.file.size
    assert written["file"]["ops"] == report.export.file.ops
    assert written["file"]["inner_float_tensors"] == 0
    assert written["file"]["inputs"][0]["dtype"] == "uint8"
    assert written["file"]["inputs"][0]["shape"] == [1, 16, 16, 3]
    assert written["calibration"]["skipped"] == [{"path": "photos/a.jpg", "reason": "truncated"}]
    assert written["verification"]["images"] == 200
    assert [row["agreement"] for row in written["accuracy"]] == [1.0, 0.5]
    assert written["accuracy"][0]["top5"] is None
    assert written["seconds"] == {"conversion": 1.3}
    assert written["warnings"] == ["Beware"]


def test_refuses_to_replace_a_report(report, tmp_path):
    (tmp_path / "r.json").write_text("mine")
    with pytest.raises(FileExistsError, match="exists"):
        write_report(tmp_path / "r.json", report)
    write_report(tmp_path / "r.json", report, overwrite=True)
    assert json.loads((tmp_path / "r.json").read_text())["schema"] == 2


@pytest.mark.parametrize("quantization", sorted(MIN_AGREEMENT))
def test_warns_below_the_expected_agreement_and_not_at_it(quantization):
    wanted = MIN_AGREEMENT[quantization]
    assert agreement_warning(quantization, scores(wanted)) is None
    text = agreement_warning(quantization, scores(wanted - 0.005))
    assert f"The {quantization} file" in text
    assert f"of 200 images (at least {wanted:.0%} are expected)" in text
