"""Every Triton kernel becomes a cubin for sm_80, sm_90 and sm_100 without a GPU, and spills no register."""

from __future__ import annotations

import importlib
import re

import pytest

pytest.importorskip("triton")
triton_aot = pytest.importorskip("triton_aot")

WARPS = 8
VARIANTS = pytest.mark.parametrize("dtype, architecture", triton_aot.VARIANTS)


def check(module, kernel, *arguments):
    kernel = getattr(importlib.import_module(f"bllkern.backends.triton.{module}"), kernel)
    return triton_aot.assert_compiles_without_spills(kernel, *arguments)


def agreement_types(dtype, *integers):
    pointers = {name: f"*{dtype}" for name in ("a_ptr", "b_ptr", "grad_a_ptr", "grad_b_ptr")}
    return {**pointers, "loss_ptr": "*fp32", "scale": "fp32", **{name: "i32" for name in integers}}


@VARIANTS
@pytest.mark.parametrize("family", ("bernoulli", "gaussian", "gaussian_learned", "poisson"))
def test_agreement_of_units(family, dtype, architecture):
    types = agreement_types(dtype, "rows", "units", "tiles")
    for width in (2048, 4096):
        constants = {"FAMILY": family, "PER_ROW": False, "ROWS": 1, "COLS": width}
        check("agreement", "_units", types, constants, architecture, WARPS)


@pytest.mark.parametrize("shape", ((512, 4), (16, 128), (1, 4096)), ids=str)
@VARIANTS
def test_agreement_of_groups(dtype, shape, architecture):
    constants = {"PER_ROW": False, "ROWS": shape[0], "COLS": shape[1]}
    types = agreement_types(dtype, "groups", "size")
    check("agreement", "_groups", types, constants, architecture, WARPS)


@VARIANTS
def test_agreement_of_long_groups(dtype, architecture):
    types = agreement_types(dtype, "size")
    check("agreement", "_long_groups", types, {"COLS": 2048}, architecture, WARPS)


@pytest.mark.parametrize("index", (True, False), ids=("indices", "probabilities"))
@VARIANTS
@pytest.mark.parametrize("shape", ((64, 16), (1, 4096)), ids=str)
def test_softmax_error(shape, dtype, index, architecture):
    types = {name: "*fp32" for name in ("logits_ptr", "loss_ptr", "share_ptr")} | {"factor": "fp32"}
    types |= {"bias_ptr": f"*{dtype}", "target_ptr": "*i64" if index else f"*{dtype}", "error_ptr": f"*{dtype}"}
    types |= {"rows": "i32", "classes": "i32", "ignore_index": "i32", "smoothing": "fp32"}
    constants = {"INDEX": index, "LATE": dtype == "fp16", "ROWS": shape[0], "COLS": shape[1]}
    warps = WARPS if shape[1] <= 1024 else 2 * WARPS
    check("linear_cross_entropy", "_softmax_error", types, constants, architecture, warps)
    types = {"target_ptr": "*i64", "share_ptr": "*fp32", "rows": "i32", "ignore_index": "i32"}
    check("linear_cross_entropy", "_share", types, {"ROWS": 1024}, architecture, 4)


@pytest.mark.parametrize("family", ("bernoulli", "categorical", "gaussian_learned"))
@VARIANTS
def test_log_evidence(family, dtype, architecture):
    parameters = "*fp32" if family == "categorical" else f"*{dtype}"
    types = {"a_ptr": parameters, "b_ptr": f"*{dtype}", "logits_ptr": "*fp32"}
    types |= {name: "i32" for name in ("rows", "classes", "units", "split_units", "size", "pieces", "piece")}
    constants = {"FAMILY": family, "ROWS": 32, "COLS": 32 if family == "gaussian_learned" else 64}
    check("evidence_cross_entropy", "_log_evidence", types, constants, architecture, 4)


@pytest.mark.parametrize(
    "family, shape, kept",
    (
        ("bernoulli", (32, 64, 1), False),
        ("categorical", (32, 16, 4), False),
        ("categorical", (32, 2, 32), False),
        ("categorical", (32, 64, 1), True),
        ("categorical", (4, 64, 1), True),
        ("gaussian_learned", (16, 32, 2), False),
    ),
)
@VARIANTS
def test_posterior_sum(family, shape, kept, dtype, architecture):
    fp32 = ("error_ptr", "out_ptr") + (("p_ptr",) if family == "categorical" else ()) + (("lse_ptr",) if kept else ())
    integers = ("rows", "terms", "width", "units", "split_terms", "size", "unit_stride", "parameter_stride",
                "error_term", "error_row", "group_size", "lse_group", "lse_row", "lse_term")  # fmt: skip
    types = {"p_ptr": f"*{dtype}", "q_ptr": f"*{dtype}"} | dict.fromkeys(fp32, "*fp32") | dict.fromkeys(integers, "i32")
    constants = dict(zip(("FAMILY", "ROWS", "UNITS", "SIZE"), (family, *shape), strict=True))
    constants |= {} if kept else {"lse_ptr": None}
    for centred in (False, True):
        constants["CENTRED"] = centred
        check("evidence_cross_entropy", "_posterior_sum", types, constants, architecture, 4)


@VARIANTS
def test_normalization(dtype, architecture):
    types = {"x_ptr": f"*{dtype}", "counted_ptr": "*u8", "xn_ptr": f"*{dtype}"}
    types |= {"reciprocal_ptr": "*fp32", "width": "i32"}
    check("gram", "_normalize", types, {"COLS": 2048}, architecture, 4)
    types = {"xn_ptr": f"*{dtype}", "by_xn_ptr": "*fp32", "reciprocal_ptr": "*fp32", "scale_ptr": "*fp32"}
    types |= {"by_x_ptr": f"*{dtype}", "width": "i32", "scale": "fp32"}
    check("gram", "_normalize_backward", types, {"COLS": 2048}, architecture, 4)


@pytest.mark.parametrize(
    "window, dtype, architecture",
    (*((2, *variant) for variant in triton_aot.VARIANTS), (1, "bf16", 90), (3, "bf16", 90)),
)
@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
def test_batch_norm_relu(window, last, dtype, architecture):
    """What a program reads and writes of channels-last images in half precision is 16 bytes for each thread."""
    images = dict.fromkeys(("x_ptr", "z_ptr"), f"*{dtype}")
    sizes = dict.fromkeys(("height", "width", "out_height", "out_width"), "i32") | {"eps": "fp32"}
    shared = images | dict.fromkeys(("weight_ptr", "bias_ptr", "mean_ptr", "variance_ptr"), "*fp32") | sizes
    tile = {"channels": 64, "LAST": last, "ROWS": 32 if last else 2048, "COLS": 64 if last else 1}
    summed = {"ROWS": 16 if last else 2048}
    constants, warps = tile | {"K": window, "SHORTCUT": window == 1}, WARPS // 2 if last else WARPS
    bins = {"P": 4, "Q": 4}
    types = shared | {"shortcut_ptr": f"*{dtype}"}
    compiled = [check("batch_norm_relu", "_forward", types, constants, architecture, warps)]
    types |= dict.fromkeys(("features_ptr", "active_ptr", "along_ptr"), "*fp32") | {"most": "i32"}
    arguments = (constants | summed | bins | {"BINS": 4}, architecture, warps)
    compiled.append(check("batch_norm_relu", "_forward_bins", types, *arguments))
    types = shared | dict.fromkeys(("by_weight_ptr", "by_bias_ptr"), "*fp32") | {"by_z_ptr": f"*{dtype}"}
    arguments = (constants | summed, architecture, warps)
    compiled.append(check("batch_norm_relu", "_sums", types | {"length": "i32"}, *arguments))
    types |= dict.fromkeys(("grad_ptr", "grad_shortcut_ptr"), f"*{dtype}")
    types |= {"by_features_ptr": "*fp32", "values": "i32"}
    constants |= bins | {"OVERLAP": True, "BY_Z": True, "FEATURES": True, "GRAD_X": True, "GRAD_SHORTCUT": window == 1}
    compiled.append(check("batch_norm_relu", "_backward", types, constants, architecture, warps))
    if window == 1:
        types = {"x_ptr": f"*{dtype}"} | dict.fromkeys(("means_ptr", "squares_ptr"), "*fp32")
        types |= dict.fromkeys(("places", "length"), "i32")
        compiled.append(check("_images", "_statistics", types, tile | summed, architecture, 2 if last else WARPS))
    if last:
        assert not any(re.search(r"(ld|st)\.global[.\w:]*\.b16", ptx) for ptx in compiled)


@VARIANTS
def test_statistics_of_pieces(dtype, architecture):
    names = ("means_ptr", "squares_ptr", "mean_ptr", "variance_ptr")
    types = dict.fromkeys(names, "*fp32") | dict.fromkeys(("pieces", "channels", "length", "values"), "i32")
    check("_images", "_combined", types, {"ROWS": 512, "COLS": 8}, architecture, WARPS)
    types = dict.fromkeys(("found_ptr", "sums_ptr"), "*fp32") | dict.fromkeys(("pieces", "channels"), "i32")
    check("_images", "_added", types, {"ROWS": 512, "COLS": 8}, architecture, WARPS)


@VARIANTS
def test_prototypes(dtype, architecture):
    types = {"x_ptr": f"*{dtype}", "mean_ptr": "*fp32", "reciprocal_ptr": "*fp32", "width": "i32"}
    check("prototypes", "_directions", types, {"COLS": 2048}, architecture, 4)
    types |= {"order_ptr": "*i64", "begin_ptr": "*i64", "sum_ptr": "*fp32", "classes": "i32", "parts": "i32"}
    check("prototypes", "_sum_by_class", types, {"ROWS": 16, "COLS": 128}, architecture, 4)
    types = {"x_ptr": f"*{dtype}", "target_ptr": "*i64", "counts_ptr": "*i64", "by_means_ptr": "*fp32"}
    types |= {"by_x_ptr": f"*{dtype}"} | dict.fromkeys(("width", "classes", "ignore_index"), "i32")
    check("prototypes", "_gradient", types, {"COLS": 2048}, architecture, 4)


@VARIANTS
@pytest.mark.parametrize("target", ("*i64", "*fp32", None))
def test_gram_error(target, dtype, architecture):
    types = {"gram_ptr": "*fp32", "error_ptr": f"*{dtype}", "squares_ptr": "*fp32"}
    types |= dict.fromkeys(("first", "rows", "columns", "tiles"), "i32")
    constants = {"LABELS": target == "*i64", "ROWS": 2, "COLS": 1024}
    for name, given in (("target_ptr", target), ("counted_ptr", "*u8" if target == "*i64" else None)):
        types |= {name: given} if given else {}
        constants |= {} if given else {name: None}
    check("gram", "_gram_error", types, constants, architecture, WARPS)


@VARIANTS
def test_scale(dtype, architecture):
    types = {"x_ptr": f"*{dtype}", "factor_ptr": "*fp32", "count": "i32"}
    check("scale", "_scale", types, {"COUNT": 8192}, architecture, WARPS)
