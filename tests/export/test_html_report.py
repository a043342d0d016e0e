"""The page: complete, self-contained, escaped; looked at in Chromium where that is installed."""

import dataclasses
import io
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keras_effnet.export import ExportReport, TFLiteExport, check_file, read_tflite
from keras_effnet.export.html_report import html_report, write_html
from keras_effnet.export.report import ImagesUsed
from keras_effnet.export.targets import TARGETS
from keras_effnet.export.verify import Scores, Thresholds, WorstImage
from keras_effnet.quantization import QuantizationConfig, analyze, quantize_model

NAMES = ("rose", "<script>alert(1)</script>", *(f"class {index}" for index in range(2, 7)))


def jpeg(colour):
    data = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(data, "JPEG")
    return data.getvalue()


@pytest.fixture(scope="module")
def analysis(model, images):
    config = QuantizationConfig(corrections=(), method="min_max")
    quantized = quantize_model(model, images, config, verbose=False)
    return analyze(model, quantized, images[:8], verbose=False)


@pytest.fixture(scope="module")
def report(int8_bytes, analysis):
    return ExportReport(
        command=("keras-effnet", "export-tflite", "--output", "my file.tflite"),
        model={
            "name": "small",
            "weights": "w & co.h5",
            "input_shape": [16, 16, 3],
            "classes": 7,
            "parameters": 1000,
        },
        export=TFLiteExport(Path("my file.tflite"), "int8", "uint8", read_tflite(int8_bytes)),
        calibration=None,
        verification=ImagesUsed("photos", 48, True),
        scores=(
            Scores("Keras model", 48, 0.9, None, 1.0, 0.0, 0.0, None),
            Scores("my file.tflite", 48, 0.875, 0.97, 0.5, 0.01, 0.2, 21.3),
        ),
        seconds={"conversion": 1.26},
        warnings=("Beware of <b>",),
        sizes={"float_bytes": 4000, "int8_bytes": 1100},
        thresholds=Thresholds(min_agreement=0.9),
        failures=("agreement 50.00% is below 90.00%",),
        worst=(WorstImage(3, 0.5, 1, 1, 0.8, 0, 0.6), WorstImage(9, 0.1, None, 2, 0.5, 2, 0.4)),
        targets=tuple(check_file(int8_bytes, target) for target in TARGETS),
        analysis=analysis,
    )


@pytest.fixture(scope="module")
def page(report):
    return html_report(report, names=NAMES, pictures={3: jpeg("red"), 9: jpeg("blue")})


def test_it_tells_everything(page, report, analysis):
    for text in (
        "Failed: agreement 50.00% is below 90.00%",
        "87.5%",
        "97.0%",
        "21.3 dB",
        "min_agreement 0.9",
        "Coral, Edge TPU compiler 16.0",
        "DEPTHWISE_CONV_2D",
        "4,000 bytes",
        "1,100 bytes",
        "w &amp; co.h5",
        "rose 0.60",
        "--output &#x27;my file.tflite&#x27;",
        "Beware of &lt;b&gt;",
        f"All {len(analysis.rows)} tensors",
        "1.3 s",
    ):
        assert text in page, text
    for row in analysis.rows:
        assert row.layer in page
    assert page.count("data:image/jpeg;base64,") == 2


def test_nothing_is_run_or_asked_for(page):
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "url(" not in page and "@import" not in page
    assert "http://" not in page and "https://" not in page


def test_what_is_missing_is_left_out(report):
    bare = dataclasses.replace(
        report,
        worst=(),
        analysis=None,
        targets=(),
        failures=(),
        warnings=(),
        thresholds=Thresholds(),
        sizes={},
    )
    page = html_report(bare)
    assert "Written and verified." in page and "Demanded" not in page
    for text in ("Devices", "Layers with", "largest differences", "Warnings"):
        assert text not in page
    assert "CONV_2D" in page


def test_it_is_written_whole(report, tmp_path):
    path = write_html(tmp_path / "r.html", report)
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    with pytest.raises(FileExistsError):
        write_html(path, report)


def chromium():
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return shutil.which(name)
    message = "needs Chromium: apt-get install chromium"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1200])
def test_chromium_shows_it_without_complaint(page, tmp_path, width):
    source = tmp_path / "r.html"
    # All of it, unfolded.
    source.write_text(page.replace("<details>", "<details open>"), encoding="utf-8")
    picture = tmp_path / "r.png"
    command = [chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", f"--window-size={width},3000", f"--screenshot={picture}"]
    result = subprocess.run(
        [*command, source.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert picture.exists(), result.stderr[-2000:]
    assert "CONSOLE" not in result.stderr
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    # Nothing reaches beyond the width: the margin on the right is the background.
    assert np.ptp(pixels[:, -4:].reshape(-1, 3), axis=0).max() == 0
    assert (np.abs(pixels - [254, 0, 0]).max(axis=2) < 12).sum() > 500  # The red photograph.
