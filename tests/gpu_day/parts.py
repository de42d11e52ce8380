"""The parts, most valuable first. Each is a function of a module of this package, run in a process of its own."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        function: its module and function; it is called with a `common.Task` and `arguments`.
        limit: the seconds after which it is killed.
        needs: it is not begun with fewer seconds left.
        alone: nothing else may run beside it, because it measures time or fills the memory.
        quick: its dry run takes a few seconds.
    """

    function: str
    limit: int
    needs: int
    arguments: dict = field(default_factory=dict)
    alone: bool = False
    quick: bool = False


def _timed(function: str, limit: int, needs: int, **arguments) -> Part:
    return Part(function, limit, needs, arguments, alone=True)


PRECISIONS = ("bf16", "fp16", "fp32")
PARTS = {
    "machine": Part("benchmarks.machine", 40, 5, quick=True),
    **{
        f"train-{model}-{precision}": Part(
            "training.train_and_resume", 140, 40, {"model": model, "precision": precision}
        )
        for model in ("mini", "stories")
        for precision in PRECISIONS
    },
    "curves": Part("training.curves", 120, 30),
    **{
        f"parity-{precision}": Part("parity.with_trainer", 100, 30, {"precision": precision})
        for precision in ("bf16", "fp32", "fp16")
    },
    "float64": Part("parity.against_float64", 60, 15, quick=True),
    "graphs": Part("decoding.graphs", 120, 25),
    "suite": Part("decoding.suite", 120, 25),
    "syncs": Part("profiling.host_syncs", 80, 20),
    "attention": Part("attention.correctness", 70, 20, quick=True),
    "one-rank": Part("training.one_rank", 45, 15, quick=True),
    "compare-bf16": Part("parity.compare_script", 100, 45, {"precision": "bf16"}),
    "compare-fp32": Part("parity.compare_script", 100, 45, {"precision": "fp32"}),
    "bench": _timed("benchmarks.training", 110, 40, arms="mori,trainer", batch=16, block=1024),
    "decode": _timed("decoding.speed", 70, 25, arms="mori-greedy,generate-greedy", dtypes="bfloat16,float32"),
    "oom": _timed("training.out_of_memory", 110, 45),
    "bench-fp16-128": _timed("benchmarks.training", 80, 35, arms="mori,trainer", batch=4, block=128, precision="fp16"),
    "bench-fp16-512": _timed("benchmarks.training", 80, 35, arms="mori,trainer", batch=16, block=512, precision="fp16"),
    "bench-tuned": _timed(
        "benchmarks.training", 170, 60, arms="mori,trainer-tuned", batch=16, block=1024, suffix="-tuned"
    ),
    "decode-compiled": _timed(
        "decoding.speed", 150, 50, arms="mori-greedy,generate-compiled", dtypes="bfloat16,float32"
    ),
    "profile": _timed("profiling.one_shape", 130, 30, shape="124m", batch=16, block=1024),
    "variants": _timed("profiling.variants", 140, 30),
    "graph-cost": _timed("decoding.graph_cost", 40, 15),
    "bench-small": _timed("benchmarks.training", 100, 40, arms="mori,trainer", batch=4, block=128),
    "attention-speed": _timed("attention.speed", 50, 15),
    "head": _timed("lab.head", 70, 20),
    "bench-compiled": _timed(
        "benchmarks.training", 150, 60, arms="mori,mori-compiled,bare", batch=16, block=1024, suffix="-compiled"
    ),
    "decode-more": _timed(
        "decoding.speed", 90, 25, arms="mori-greedy,generate-greedy,mori-sampled,generate-sampled,contexts",
        dtypes="float32", batches=(1, 8),
    ),
    "profile-llama": _timed("profiling.one_shape", 100, 35, shape="llama-160m", batch=16, block=1024),
    "free-compiler": _timed("lab.free_compiler", 90, 40),
}  # fmt: skip
