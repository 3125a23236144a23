"""The picture of a plan: well-formed, all of it within its frame, and it says what the plan says."""

import dataclasses
import re
import xml.etree.ElementTree as ET

import pytest

from axlearn.common.aot_compilation import Plan, PlannedParameter, plan_picture
from tests.made_up_plan import GIB, PLAN

_SVG = "{http://www.w3.org/2000/svg}"
_PLAN = dataclasses.replace(
    PLAN,
    machine="tpu-v5litepod-256-4",
    num_devices=1024,
    num_slices=4,
    mesh_shape={"data": 4, "fsdp": 256, "model": 1},
    parts={"parameters": GIB, "optimizer": 2 * GIB, "activations and temporaries": 8 * GIB},
    peak_bytes=11 * GIB,
    host_bytes=0,
    parameters=[
        *PLAN.parameters,
        PlannedParameter("decoder/output_norm/scale", (4096,), "float32", ((),), 4 * 4096, 1),
    ],
    traffic=PLAN.traffic[:1],
    compute_seconds=2.0,
    product_memory_seconds=1.0,
    other_memory_seconds=0.4,
    whole=("decoder/emb/token_emb/weight",),
)
_FAILED = dataclasses.replace(
    _PLAN,
    failure="it does not fit",
    peak_bytes=40 * GIB,
    parts={"parameters": GIB, "optimizer": 2 * GIB, "activations and temporaries": 37 * GIB},
    traffic=(),
    product_memory_seconds=None,
    other_memory_seconds=None,
)


def _drawn(plan: Plan) -> ET.Element:
    return ET.fromstring(plan_picture(plan, title="a <recipe> on a machine"))


def _texts(drawing: ET.Element) -> list[str]:
    return [x.text for x in drawing.iter(f"{_SVG}text")]


@pytest.mark.parametrize("plan", [_PLAN, _FAILED], ids=["fits", "fails"])
def test_everything_that_is_drawn_lies_within_the_frame(plan):
    drawing = _drawn(plan)
    width, height = float(drawing.get("width")), float(drawing.get("height"))
    for shape in drawing.iter(f"{_SVG}rect"):
        x, y, w, h = (float(shape.get(name)) for name in ("x", "y", "width", "height"))
        assert x >= 0
        assert y >= 0
        assert x + w <= width + 0.1
        assert y + h <= height + 0.1
    assert all(0 <= float(x.get("y")) <= height for x in drawing.iter(f"{_SVG}text"))


def test_it_says_what_the_plan_says():
    texts = "\n".join(_texts(_drawn(_PLAN)))
    assert "a <recipe> on a machine" in texts
    assert "1024 devices in 4 slices, data across: data 4 x fsdp 256" in texts
    assert "Memory of a device: 11.0 GiB at its peak of 16 GiB: it fits" in texts
    assert "Time of a step: 2.6 s predicted (MFU 62%), 2 s if all overlaps" in texts
    assert re.search(r"layer/feed_forward/linear2/weight\n32 x 11008 x 4096 / fsdp\n.*1 of 256 parts", texts)


def test_what_the_mesh_could_split_further_is_red():
    red = [x.text for x in _drawn(_PLAN).iter(f"{_SVG}text") if x.get("fill") == "#c8453c"]
    assert "emb/token_emb/weight" in red
    assert "red: could be split further (1)" in red
    nothing = dataclasses.replace(_PLAN, whole=())
    assert not any("split further" in text for text in _texts(_drawn(nothing)))


def test_bars_of_memory_are_as_long_as_their_bytes():
    bars = {}
    for shape in _drawn(_PLAN).iter(f"{_SVG}rect"):
        title = shape.find(f"{_SVG}title")
        if title is not None:
            bars[title.text.split(":")[0]] = float(shape.get("width"))
    assert bars["optimizer"] == pytest.approx(2 * bars["parameters"], abs=0.2)
    assert bars["activations and temporaries"] == pytest.approx(8 * bars["parameters"], abs=0.5)


def test_a_step_that_the_compiler_refused_is_drawn_with_what_is_known():
    texts = _texts(_drawn(_FAILED))
    assert "Memory of a device: 40.0 GiB at its peak of 16 GiB: it does not fit" in texts
    assert "activations and temporaries 37.00 GiB" in texts
    assert "Time of a step: not known" in texts
