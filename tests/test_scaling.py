"""Compound scaling: coefficients, rounding, plans, counts, budgets."""

import math
import time

import pytest

from keras_effnet.scaling import (
    COMPOUND,
    DEPTH_ONLY,
    RESOLUTION_ONLY,
    WIDTH_ONLY,
    Budget,
    CompoundScaling,
    coefficient_candidates,
    largest_model,
    resolve,
    round_filters,
    round_repeats,
    search_scaling,
)
from keras_effnet.specs import SPECS, get_spec

B0 = SPECS["EfficientNetB0"]

# The paper prints two digits, and its B4 and B5 are 4 % below what their layers multiply
# (figures in the test below); every other variant agrees within this.
PAPER_TOLERANCE = 0.0205

# keras.applications; its V2 models hold their normalization as constants, V1 as weights.
TRAINABLE = {
    "EfficientNetB0": 5_288_548,
    "EfficientNetB1": 7_794_184,
    "EfficientNetB2": 9_109_994,
    "EfficientNetB3": 12_233_232,
    "EfficientNetB4": 19_341_616,
    "EfficientNetB5": 30_389_784,
    "EfficientNetB6": 43_040_704,
    "EfficientNetB7": 66_347_960,
}
TOTAL = {
    "EfficientNetB0": 5_330_571,
    "EfficientNetB4": 19_466_823,
    "EfficientNetB7": 66_658_687,
    "EfficientNetV2B0": 7_200_312,
    "EfficientNetV2S": 21_612_360,
}


def test_paper_coefficients_double_the_cost():
    assert COMPOUND.cost == pytest.approx(1.2 * 1.1**2 * 1.15**2)
    assert COMPOUND.cost == pytest.approx(2, rel=0.05)
    for single in (DEPTH_ONLY, WIDTH_ONLY, RESOLUTION_ONLY):
        assert single.cost == pytest.approx(2)


def test_coefficients_are_powers_of_phi():
    assert COMPOUND.coefficients(2) == pytest.approx((1.44, 1.21, 1.3225))
    assert COMPOUND.coefficients(0) == (1, 1, 1)


def test_scaling_one_axis_leaves_the_others():
    deeper, wider, larger = (s.scale(B0, 1) for s in (DEPTH_ONLY, WIDTH_ONLY, RESOLUTION_ONLY))
    assert (deeper.depth, deeper.width, deeper.resolution) == (2, 1, 224)
    assert (wider.depth, wider.width, wider.resolution) == (1, math.sqrt(2), 224)
    assert (larger.depth, larger.width) == (1, 1)
    assert larger.resolution == 320  # 224 * sqrt(2) = 316.8, to a multiple of 8


def test_scale_by_zero_is_the_base():
    assert COMPOUND.scale(B0, 0) is B0


def test_dropout_grows_from_b0_to_b7_as_in_the_paper():
    assert COMPOUND.scale(B0, 6).dropout_rate == pytest.approx(0.5)
    assert COMPOUND.scale(B0, 20).dropout_rate == 0.5
    assert COMPOUND.scale(B0, -20).dropout_rate == 0


def test_official_coefficients_stand_for_phi():
    phi = COMPOUND.phi_of(SPECS["EfficientNetB2"], B0)
    assert phi["depth"] == pytest.approx(1)
    assert phi["width"] == pytest.approx(1)
    assert phi["resolution"] == pytest.approx(math.log(260 / 224) / math.log(1.15))
    assert DEPTH_ONLY.phi_of(SPECS["EfficientNetB2"], B0)["width"] is None
    nominal = [0, 0.5, 1, 2, 3, 4, 5, 6]
    for index, expected in enumerate(nominal):
        found = COMPOUND.phi_of(SPECS[f"EfficientNetB{index}"], B0)
        # Rounded by hand: the larger variants are up to one and a quarter wider and sharper.
        assert all(abs(value - expected) < 1.3 for value in found.values()), (index, found)


def test_growth_below_one_is_refused():
    with pytest.raises(ValueError, match="`beta` is a growth factor and must be at least 1"):
        CompoundScaling(beta=0.9)


@pytest.mark.parametrize(
    "filters, rounding, expected",
    [
        (32.0, "nearest", 32),
        (35.2, "nearest", 32),  # B2's stem: 32 * 1.1
        (36.0, "nearest", 40),  # halves go up
        (3.0, "nearest", 8),  # never below the divisor
        (8.8, "keep_90_percent", 8),  # 8 is 90.9 % of it
        (8.9, "keep_90_percent", 16),  # 8 is 89.9 % of it
        (8.9, "nearest", 8),
    ],
)
def test_round_filters(filters, rounding, expected):
    assert round_filters(filters, 8, rounding) == expected


def test_round_repeats_goes_up_but_not_for_floating_point():
    assert round_repeats(3, 1.1) == 4
    assert round_repeats(10, 1.1) == 11  # 1.1 * 10 = 11.000000000000002
    assert round_repeats(1, 0.3) == 1


@pytest.mark.parametrize("name", TRAINABLE)
def test_trainable_parameters_of_v1(name):
    assert resolve(name).trainable_parameters == TRAINABLE[name]


@pytest.mark.parametrize("name", TOTAL)
def test_parameters(name):
    assert resolve(name).parameters == TOTAL[name]


# In millions. Lite: 4.652 and so on are what the official checkpoints hold without the moving
# statistics; EdgeTPU: timm's counts of the same networks, to three digits after rounding.
MOBILE = {
    "EfficientNetLite0": 4.652,
    "EfficientNetLite1": 5.416,
    "EfficientNetLite2": 6.092,
    "EfficientNetLite3": 8.197,
    "EfficientNetLite4": 13.006,
    "EfficientNetEdgeTPUS": 5.438,
    "EfficientNetEdgeTPUM": 6.900,
    "EfficientNetEdgeTPUL": 10.594,
}
MOBILE_TOLERANCE = 5e-4


@pytest.mark.parametrize("name", MOBILE)
def test_parameters_of_the_mobile_families(name):
    counted = resolve(name).trainable_parameters / 1e6
    assert counted == pytest.approx(MOBILE[name], rel=MOBILE_TOLERANCE)


# What the Lite README counts beside the multiply-adds of the convolutions: batch norm and
# activation, found to be three operations for each of their outputs in all five variants.
LITE_ELEMENTWISE = 3


@pytest.mark.parametrize("name", MOBILE)
def test_multiply_adds_of_the_mobile_families(name):
    plan = resolve(name)
    counted = plan.multiply_adds
    if "Lite" in name:
        outputs = sum(conv.output_filters * conv.output_pixels for conv in plan.convolutions)
        counted += LITE_ELEMENTWISE * outputs
    published = plan.spec.published.multiply_adds * 1e9
    assert counted == pytest.approx(published, rel=0.02)


def test_lite_keeps_its_ends():
    plan, base = resolve("EfficientNetLite4"), resolve("EfficientNetLite0")
    assert plan.stem.output_filters == base.stem.output_filters == 32
    assert plan.top.output_filters == base.top.output_filters == 1280
    blocks = [block.stage for block in plan.blocks]
    assert [blocks.count(stage) for stage in range(1, 8)] == [1, 4, 4, 6, 6, 8, 1]
    # The first block reads what the fixed stem makes, though its own width is scaled.
    assert plan.blocks[0].input_filters == plan.blocks[0].expanded_filters == 32


def test_edgetpu_expands_from_its_declared_width_and_skips_nothing_in_stage_1():
    first, second, *_ = resolve("EfficientNetEdgeTPUM").blocks
    assert (first.input_filters, first.expanded_filters, first.output_filters) == (32, 96, 24)
    assert (second.input_filters, second.expanded_filters, second.output_filters) == (24, 96, 24)
    assert not first.has_skip and not second.has_skip


def test_parameters_match_the_published_ones():
    for spec in SPECS.values():
        if spec.published:
            plan = resolve(spec)
            # Published to two or three digits.
            assert plan.trainable_parameters / 1e6 == pytest.approx(
                spec.published.parameters, rel=0.025
            ), spec.constructor


@pytest.mark.parametrize("name", ["B0", "B1", "B2", "B3", "B6", "B7"])
def test_multiply_adds_are_those_of_the_paper(name):
    spec = SPECS[f"EfficientNet{name}"]
    count = resolve(spec).multiply_adds / 1e9
    assert count == pytest.approx(spec.published.multiply_adds, rel=PAPER_TOLERANCE)


@pytest.mark.parametrize("name, excess", [("B4", 0.046), ("B5", 0.037)])
def test_multiply_adds_where_the_paper_counts_less(name, excess):
    """The plan equals the layers of the built model (test_builder); the paper's table does not."""
    spec = SPECS[f"EfficientNet{name}"]
    count = resolve(spec).multiply_adds / 1e9
    assert count / spec.published.multiply_adds - 1 == pytest.approx(excess, abs=0.001)


def test_first_convolutions_by_hand():
    plan = resolve("EfficientNetB0", classes=10)
    stem = plan.convolutions[0]
    assert (stem.kernel_parameters, stem.multiply_adds) == (3 * 3 * 3 * 32, 864 * 112 * 112)
    block1a = plan.blocks[0]
    assert [conv.name for conv in block1a.convolutions] == [
        "block1a_dwconv",
        "block1a_se_reduce",
        "block1a_se_expand",
        "block1a_project_conv",
    ]
    depthwise, reduce, expand, project = block1a.convolutions
    assert depthwise.kernel_parameters == 9 * 32
    assert depthwise.multiply_adds == 288 * 112 * 112
    assert (reduce.kernel_parameters, expand.kernel_parameters) == (32 * 8, 8 * 32)
    assert reduce.multiply_adds == 256, "squeeze-and-excite works on one position"
    assert project.kernel_parameters == 32 * 16
    head = plan.convolutions[-1]
    assert (head.kernel_parameters, head.multiply_adds) == (12800, 12800)


def test_int8_bytes_by_hand():
    """One byte a kernel value, four a bias, batch norms folded."""
    plan = resolve("EfficientNetB0")
    kernels = sum(conv.kernel_parameters for conv in plan.convolutions)
    outputs = sum(conv.output_filters for conv in plan.convolutions)
    assert plan.int8_bytes == kernels + 4 * outputs
    assert kernels < resolve("EfficientNetB0").trainable_parameters


def test_odd_sizes_round_up():
    plan = resolve("EfficientNetB0", input_size=(33, 64))
    assert plan.blocks[0].input_size == (17, 32)
    assert plan.blocks[-1].output_size == (2, 2)


def test_drop_path_grows_linearly():
    blocks = resolve("EfficientNetB0").blocks
    assert len(blocks) == 16
    assert [block.drop_path_rate for block in blocks] == pytest.approx(
        [0.2 * i / 16 for i in range(16)]
    )


def test_block_names_go_on_after_z():
    names = [block.name for block in resolve("EfficientNetV2XL").blocks if block.stage == 6]
    assert (names[0], names[25], names[26], names[31]) == (
        "block6a_",
        "block6z_",
        "block6aa_",
        "block6af_",
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input_size": 0}, "`input_size` must be positive"),
        ({"channels": 0}, "`channels` must be positive"),
        ({"classes": 0}, "`classes` must be positive"),
    ],
)
def test_resolve_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve(B0, **arguments)


def test_all_variants_are_counted_in_under_a_second():
    """The bar is a second; it takes about 0.05, so a busy machine does not matter."""
    start = time.perf_counter()
    for spec in SPECS.values():
        assert resolve(spec).multiply_adds > 0
    assert time.perf_counter() - start < 1


# --- Budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "budget",
    [
        Budget(multiply_adds=0.5e9, int8_bytes=6e6),
        Budget(int8_bytes=1e6),
        Budget(parameters=20e6),
        Budget(multiply_adds=0.05e9),
    ],
)
def test_largest_model_fits_and_the_next_does_not(budget):
    found = largest_model("EfficientNetB0", budget)
    assert budget.fits(found.plan)
    following = resolve(COMPOUND.scale(B0, round(found.phi + 0.01, 2)))
    assert not budget.fits(following)


def test_budget_of_b0_gives_at_least_b0():
    plan = resolve(B0)
    budget = Budget(multiply_adds=plan.multiply_adds, int8_bytes=plan.int8_bytes)
    assert largest_model(B0, budget).phi >= 0


def test_impossible_and_unbinding_budgets_are_named():
    with pytest.raises(ValueError, match="already the smallest has .* 84,423 parameters"):
        largest_model(B0, Budget(parameters=1000))
    with pytest.raises(ValueError, match="The budget does not limit"):
        largest_model(B0, Budget(parameters=6e6), RESOLUTION_ONLY)
    with pytest.raises(ValueError, match="at least one positive limit"):
        Budget()
    with pytest.raises(ValueError, match="at least one positive limit"):
        Budget(parameters=-1)


def test_candidates_keep_the_constraint():
    candidates = list(coefficient_candidates())
    assert CompoundScaling(1.2, 1.1, 1.15) in candidates
    assert all(abs(candidate.cost - 2) <= 0.1 + 1e-9 for candidate in candidates)
    with pytest.raises(ValueError, match="`step` must be positive"):
        next(coefficient_candidates(step=0))


def test_search_uses_the_budget_and_ranks():
    budget = Budget(multiply_adds=0.5e9, int8_bytes=6e6)
    found = search_scaling("EfficientNetB0", budget)
    assert all(budget.fits(model.plan) for model in found)
    assert min(budget.usage(found[0].plan).values()) > 0.9
    # An objective decides alone: here, the smallest network.
    smallest = search_scaling("EfficientNetB0", budget, objective=lambda m: -m.plan.parameters)
    assert smallest[0].plan.parameters == min(model.plan.parameters for model in found)
    with pytest.raises(ValueError, match="No candidate has a scaling that fits"):
        search_scaling("EfficientNetB0", Budget(parameters=1000))


def test_scaled_spec_keeps_its_family():
    scaled = COMPOUND.scale(get_spec("EfficientNetV2B0"), 1.5)
    assert scaled.rounding == "nearest"
    assert scaled.name == "efficientnetv2-b0-phi1.5"
    assert scaled.published is None
