import csv
import io
import json

import pytest
from PIL import Image

from keras_effnet.cli import main
from keras_effnet.scaling import COMPOUND, Budget, resolve
from keras_effnet.specs import SPECS


def run(capsys, *argv):
    """Exit code, stdout, stderr."""
    try:
        code = main(argv)
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_family_lists_every_variant(capsys):
    code, out, _ = run(capsys, "family")
    assert code == 0
    header, _, *lines = out.splitlines()
    assert header.split()[:3] == ["variant", "input", "parameters"]
    assert [line.split()[0] for line in lines] == list(SPECS)
    b0 = next(line for line in lines if line.startswith("EfficientNetB0 "))
    assert "5,330,571" in b0 and "77.1" in b0 and "arXiv:1905.11946, Table 2" in b0


def test_family_json_holds_the_counts_of_the_plans(capsys):
    code, out, _ = run(capsys, "family", "--json")
    assert code == 0
    for row in json.loads(out):
        plan = resolve(row["name"])
        for count in ("parameters", "multiply_adds", "int8_bytes"):
            assert row[count] == getattr(plan, count)
        published = plan.spec.published
        assert row["top1"] == (published and published.top1)
        assert row["source"] == (published and published.source)


def test_family_tells_phi_relative_to_the_unscaled_variant(capsys):
    _, out, _ = run(capsys, "family", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    b7 = rows["EfficientNetB7"]
    # log(3.1) / log(1.2), log(2) / log(1.1), log(600 / 224) / log(1.15)
    assert (b7["phi_depth"], b7["phi_width"], b7["phi_resolution"]) == (6.21, 7.27, 7.05)
    # V2-B2 is a scaling of V2-B0, not of V1's B0, by the same coefficients as B2.
    assert rows["EfficientNetV2B2"]["phi_depth"] == rows["EfficientNetB2"]["phi_depth"] == 1.0
    # V2-S is a network of its own.
    assert rows["EfficientNetV2S"]["phi_depth"] is None


def test_family_csv_and_pattern(capsys):
    code, out, _ = run(capsys, "family", "*v2b?", "--csv")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["name"] for row in rows] == [f"EfficientNetV2B{i}" for i in range(4)]
    assert int(rows[0]["parameters"]) == resolve("EfficientNetV2B0").parameters


def test_family_draws_a_picture(capsys, tmp_path):
    path = tmp_path / "family.png"
    code, _, err = run(capsys, "family", "--output", str(path))
    assert code == 0 and f"Written: {path}" in err
    with Image.open(path) as picture:
        assert picture.format == "PNG"
    assert [file.name for file in tmp_path.iterdir()] == ["family.png"]

    before = path.read_bytes()
    code, out, err = run(capsys, "family", "--output", str(path))
    assert code == 2 and out == "" and "exists" in err and "--overwrite" in err
    path.write_bytes(b"old")
    code, _, _ = run(capsys, "family", "--output", str(path), "--overwrite")
    assert code == 0 and path.read_bytes() == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["family", "resnet*"], "No variant has a name like 'resnet*'"),
        (["family", "--output", "plot.svg"], "--output is a PNG file. Received: 'plot.svg'"),
        (["family", "--output", "nowhere/plot.png"], "There is no folder 'nowhere'"),
        (["family", "--csv", "--json"], "not allowed with argument"),
        (["scale"], "Either a budget"),
        (["scale", "--phi", "1", "--max-bytes", "6M"], "Either a budget"),
        (["scale", "--max-bytes", "6MiB"], "such as 500k, 6M or 0.5G is needed, not '6MiB'"),
        (["scale", "--max-bytes", "0"], "such as 500k, 6M or 0.5G is needed, not '0'"),
        (["scale", "--max-bytes", "1.2.3"], "is needed, not '1.2.3'"),
        (["scale", "--phi", "nan"], "--phi must be between -12 and 12. Received: nan"),
        (["scale", "--phi", "13"], "--phi must be between -12 and 12. Received: 13"),
        (["scale", "--phi", "1", "--base", "EfficientNetB9"], "Unknown model 'EfficientNetB9'"),
    ],
)
def test_wrong_usage(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == ""
    assert message in err and "Traceback" not in err


def test_an_impossible_budget_is_a_failure(capsys):
    code, out, err = run(capsys, "scale", "--max-bytes", "1k")
    assert code == 1 and out == ""
    assert "No scaling of EfficientNetB0" in err and "Traceback" not in err


def test_scale_keeps_the_budget_with_the_papers_coefficients_first(capsys):
    argv = ("scale", "--max-multiply-adds", "0.5G", "--max-bytes", "6MB", "--json")
    code, out, _ = run(capsys, *argv)
    assert code == 0
    first, *others = json.loads(out)
    assert (first["alpha"], first["beta"], first["gamma"]) == (1.2, 1.1, 1.15)
    assert len(others) == 4
    budget = Budget(multiply_adds=0.5e9, int8_bytes=6e6)
    for row in (first, *others):
        assert row["multiply_adds"] <= budget.multiply_adds
        assert row["int8_bytes"] <= budget.int8_bytes
        share = row["multiply_adds"] / budget.multiply_adds
        assert row["share_of_budget"]["multiply_adds"] == pytest.approx(share)
    # What the search adds uses the budget better than the paper's coefficients.
    assert all(
        sum(row["share_of_budget"].values()) > sum(first["share_of_budget"].values())
        for row in others
    )
    # No network twice.
    assert len({(row["multiply_adds"], row["parameters"]) for row in (first, *others)}) == 5


def test_scale_along_one_axis(capsys):
    code, out, _ = run(
        capsys, "scale", "--max-multiply-adds", "1G", "--axis", "resolution", "--json"
    )
    (row,) = json.loads(out)
    assert code == 0 and row["width"] == row["depth"] == 1
    assert row["parameters"] == resolve("EfficientNetB0").parameters
    assert 0.9e9 < row["multiply_adds"] <= 1e9


def test_scale_by_phi_prints_the_network_and_how_to_build_it(capsys):
    code, out, _ = run(capsys, "scale", "--phi", "-2", "--classes", "10")
    assert code == 0
    spec = COMPOUND.scale(SPECS["EfficientNetB0"], -2)
    assert f"{resolve(spec, classes=10).parameters:,}" in out
    snippet = out.partition("Build the first of them:\n")[2]
    namespace = {}
    exec("\n".join(line.strip() for line in snippet.splitlines()), namespace)
    assert namespace["spec"] == spec
    assert namespace["model"].count_params() == resolve(spec, classes=10).parameters
    assert namespace["model"].output_shape == (None, 10)


def test_help_of_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("family", "scale", "quickstart", "export-tflite"):
        assert command in out
        code, text, _ = run(capsys, command, "--help")
        assert code == 0 and "examples:" in text
