"""A plan that nobody compiled, for the tests of what is said about plans."""

from axlearn.common.aot_compilation import AxisTraffic, Plan, PlannedParameter

GIB = 2**30
PLAN = Plan(
    machine="tpu-v5litepod-256-2",
    num_devices=512,
    num_slices=2,
    mesh_shape={"data": 2, "fsdp": 256, "model": 1},
    slice_axes=("data",),
    memory_bytes=16 * GIB,
    parts={"parameters": GIB // 10, "activations and temporaries": 8 * GIB},
    peak_bytes=9 * GIB,
    host_bytes=3 * GIB,
    parameters=[
        PlannedParameter("decoder/emb/token_emb/weight", (32768, 4096), "float32", ((), ()), 2**29, 1),
        PlannedParameter(
            "decoder/transformer/repeat/layer/feed_forward/linear2/weight",
            (32, 11008, 4096),
            "float32",
            ((), (), ("fsdp",)),
            32 * 11008 * 16 * 4,
            256,
        ),
    ],
    num_params=7 * 10**9,
    tokens=2**22,
    model_flops=2e17,
    flops=2.5e17,
    product_bytes=6 * 10**11,
    other_bytes=4 * 10**11,
    traffic=[
        AxisTraffic("all-gather", ("fsdp",), "links of a slice", False, 192, 4e10, 0.2),
        AxisTraffic("all-reduce", ("data",), "network between slices", True, 7, 2e8, 0.064),
    ],
    compute_seconds=2.48,
    product_memory_seconds=0.73,
    other_memory_seconds=0.49,
    compile_seconds=80.0,
)
