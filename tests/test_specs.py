"""The table of variants."""

import json
from dataclasses import replace

import pytest

from keras_effnet.specs import (
    SPECS,
    ModelSpec,
    PreprocessingSpec,
    StageSpec,
    get_spec,
    list_models,
)

STAGE = StageSpec("mbconv", 2, 3, 1, 16, 24, 6, 0.25)


def test_list_models_keeps_the_order_of_the_table_and_ignores_case():
    assert list_models("efficientnetB?") == [f"EfficientNetB{i}" for i in range(9)]
    assert list_models("*V2*")[:2] == ["EfficientNetV2B0", "EfficientNetV2B1"]
    assert list_models("*lite?") == [f"EfficientNetLite{i}" for i in range(5)]
    assert list_models("*edgetpu*") == [f"EfficientNetEdgeTPU{size}" for size in "SML"]
    assert list_models() == list(SPECS)
    assert list_models("resnet*") == []


@pytest.mark.parametrize("name", ["EfficientNetV2B0", "efficientnetv2-b0", "EFFICIENTNETV2_B0"])
def test_get_spec_accepts_constructor_and_model_names(name):
    assert get_spec(name) is SPECS["EfficientNetV2B0"]


def test_model_names_are_unique():
    assert len({spec.name for spec in SPECS.values()}) == len(SPECS)


def test_unknown_name_lists_the_closest():
    with pytest.raises(ValueError, match="Unknown model 'EfficentNetB4'. Closest: EfficientNetB4"):
        get_spec("EfficentNetB4")
    with pytest.raises(ValueError, match="Closest: none is similar"):
        get_spec("xyz")
    with pytest.raises(ValueError, match="A model name is a string"):
        get_spec(4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"block": "bottleneck"}, "`block` must be one of"),
        ({"repeats": 0}, "`repeats` of StageSpec must be positive"),
        ({"kernel_size": 4}, "`kernel_size` must be odd"),
        ({"strides": 3}, "`strides` must be 1 or 2"),
        ({"se_ratio": 1.5}, "`se_ratio` is a fraction"),
        ({"padding": "valid"}, "`padding` must be one of"),
    ],
)
def test_stage_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(STAGE, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rounding": "up"}, "`rounding` must be one of"),
        ({"padding": "valid"}, "`padding` must be one of"),
        ({"width": 0.0}, "`width` of ModelSpec must be positive"),
        ({"stages": ()}, "at least one StageSpec"),
        ({"stem_strides": 4}, "`stem_strides` must be 1 or 2"),
        ({"dropout_rate": 1.0}, r"`dropout_rate` must be in \[0, 1\)"),
        ({"drop_path_rate": -0.1}, r"`drop_path_rate` must be in \[0, 1\)"),
    ],
)
def test_model_spec_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SPECS["EfficientNetB0"], **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"interpolation": "nearest"}, "`interpolation` must be one of"),
        ({"mean": None}, "given together"),
        ({"mean": (0.5,), "std": (0.5,)}, "one value per RGB channel"),
        ({"std": (0.2, 0.0, 0.2)}, "`std` must be positive"),
        ({"crop_padding": -1}, "`crop_padding` must be >= 0"),
    ],
)
def test_preprocessing_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(PreprocessingSpec(), **changes)


def test_se_ratio_changes_only_the_stages_that_have_one():
    spec = SPECS["EfficientNetV2B0"]
    changed = spec.with_se_ratio(0.5)
    assert [stage.se_ratio for stage in changed.stages] == [0, 0, 0, 0.5, 0.5, 0.5]
    assert changed.published is None, "published figures no longer apply"
    assert spec.with_se_ratio(0.25) is spec
    assert not any(stage.se_ratio for stage in spec.with_se_ratio(0).stages)


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_survives_json(name):
    spec = replace(SPECS[name], published=None, padding="torch")
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_values_that_are_no_spec_are_refused():
    values = SPECS["EfficientNetB0"].to_dict()
    for wrong in ({**values, "colour": "red"}, {**values, "padding": "valid"}, {}):
        with pytest.raises(ValueError, match="no values of a ModelSpec|`padding` must be one of"):
            ModelSpec.from_dict(wrong)


def test_the_mobile_families_follow_their_papers_code():
    lite = [SPECS[f"EfficientNetLite{i}"] for i in range(5)]
    assert [spec.resolution for spec in lite] == [224, 240, 260, 280, 300]
    assert all(spec.activation == "relu6" and spec.fixed_ends for spec in lite)
    edge = [SPECS[f"EfficientNetEdgeTPU{size}"] for size in "SML"]
    assert [spec.resolution for spec in edge] == [224, 240, 300]
    assert all(spec.activation == "relu" and not spec.fixed_ends for spec in edge)
    for spec in (*lite, *edge):
        assert not any(stage.se_ratio for stage in spec.stages)
        transform = spec.preprocessing
        assert (0 * transform.scale + transform.offset, transform.mean) == (-127 / 128, None)
        assert 255 * transform.scale + transform.offset == 1
    assert [stage.block for stage in edge[0].stages] == ["fused_mbconv"] * 3 + ["mbconv"] * 3
